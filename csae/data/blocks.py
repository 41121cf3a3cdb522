"""The blocks of a causal language model of transformers, found by what they do in a pass over a few tokens.

The residual stream after L blocks is what Hugging Face calls hidden_states[L]. Names are not looked at, so any model
will do that hands one stream [B, T, d_in] from block to block. Another one is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csae import versions
from csae.errors import UserError, first_line

PROBE_TOKENS = 4
_found: weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module, Blocks]] = weakref.WeakKeyDictionary()


class Blocks(NamedTuple):
    """The blocks of a causal language model: block L - 1 gives the residual stream after L blocks."""

    modules: tuple[nn.Module, ...]
    d_in: int  # the width of the stream


def find_blocks(model: Any, name: str) -> Blocks:
    """The blocks of a causal language model of transformers, recognised by what they do.

    The first time, the model runs on 2 windows of 4 tokens, in evaluation mode and without a cache. Its blocks are a
    list of modules, as many as the model has layers. Each must run once, in order; give a stream [B, T, d_in]; and be
    given the stream of the block before, unchanged. Of several such lists the one with most parameters is taken. The
    result at a token must not depend on later tokens. Raises UserError, in one line, where there are no such blocks.
    """
    versions.check("transformers")
    model = getattr(model, "_orig_mod", model)
    config = text_config(model, name)
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
    shape = probe_tokens(model, name).shape
    refused = f"model {name!r}: csae can't read its residual stream: "
    outputs: list[Any] = []

    def before(number: int, given: list[Any]) -> None:
        if number != len(outputs):
            ran = f"block {number + 1} of {len(blocks)} runs after {len(outputs)} runs of blocks"
            raise UserError(f"{refused}{ran}; needed each one once, in order")
        if number == 0:
            return
        if not any(_same(one, hidden(outputs[-1])) for one in given):
            raise UserError(f"{refused}block {number + 1} is not given what block {number} gave first")
        others = outputs[-1][1:] if isinstance(outputs[-1], (tuple, list)) else ()
        like = [other for other in others if isinstance(other, Tensor) and other.shape == hidden(outputs[-1]).shape]
        if any(_same(one, other) for one in given for other in like):
            raise UserError(f"{refused}block {number} hands on more than one stream")

    def after(number: int, output: Any) -> None:
        stream = hidden(output) if isinstance(output, (tuple, list)) and len(output) else output
        if not isinstance(stream, Tensor) or stream.dim() != 3 or stream.shape[:2] != shape:
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
    try:
        run_probe(model, name, refused)
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != len(blocks):
        raise UserError(f"{refused}{len(outputs)} of its {len(blocks)} blocks ran; needed each one once")
    widths = sorted({hidden(output).shape[-1] for output in outputs})
    if len(widths) > 1:
        raise UserError(f"{refused}its blocks give streams of widths {widths}; needed one")
    return hidden(outputs[-1])


def probe_tokens(model: Any, name: str) -> Tensor:
    """Two windows of 4 tokens [2, 4] that differ in the last token."""
    n_vocab = n_vocab_of(model, name)
    tokens = (n_vocab // 2 + torch.arange(PROBE_TOKENS).repeat(2, 1)) % n_vocab
    tokens[1, -1] = (tokens[1, -1] + 1) % n_vocab
    return tokens


def run_probe(model: Any, name: str, refused: str) -> None:
    """Runs the model on `probe_tokens`, in evaluation mode. Raises UserError that begins with `refused` where it can't.

    A UserError of a hook is passed on as it is.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            run(model, probe_tokens(model, name).to(device_of(model)))
    except UserError:
        raise
    # A model may raise anything on what it was not made for.
    except Exception as error:
        raise UserError(f"{refused}it does not run on {PROBE_TOKENS} tokens ({first_line(error)})") from error
    finally:
        for module, training in modes:
            module.training = training


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


def run(model: Any, tokens: Tensor) -> Any:
    """What the model gives for tokens [B, T], as it is without a cache and without being compiled."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_it = any(one.name == "use_cache" or one.kind is one.VAR_KEYWORD for one in parameters)
    # A compiled module does not call hooks that it was not compiled with. Before dynamo is imported, there is none.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with eager:
        return model(input_ids=tokens, **({"use_cache": False} if takes_it else {}))


def text_config(model: Any, name: str) -> Any:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise UserError(
            f"model {name!r}: given a {type(model).__name__}; needed a causal language model of transformers"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def n_vocab_of(model: Any, name: str) -> int:
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        n_vocab = getattr(text_config(model, name), "vocab_size", None)
    if not isinstance(n_vocab, int):
        raise UserError(f"model {name!r} has no table of token embeddings; needed a causal language model")
    return n_vocab


def device_of(model: Any) -> torch.device:
    """Where the model's first weights are. Weights that are loaded when they are used take tokens from the CPU."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def hidden(output: Any) -> Tensor:
    """The residual stream in what a block gives: a tensor, or a tuple or list that begins with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_hidden(output: Any, stream: Tensor) -> Any:
    """What a block gives, with another residual stream in it."""
    if not isinstance(output, (tuple, list)):
        return stream
    parts = (stream, *output[1:])
    return output._make(parts) if hasattr(output, "_make") else type(output)(parts)


def in_windows(first: Tensor, windows: torch.Size) -> Tensor:
    """What a module gives for windows [B, T]: [B * T, d], as some mixtures of experts have it, as [B, T, d]."""
    flat = isinstance(first, Tensor) and first.dim() == 2 and len(first) == windows.numel()
    return first.view(*windows, -1) if flat else first


def checked_replacement(acts: Tensor, replaced: Tensor, mask: Tensor | None = None) -> Tensor:
    """What takes the place of acts [B, T, d]: `replaced`, in its dtype; with a mask [B, T] only where that is true."""
    if not isinstance(replaced, Tensor) or not replaced.is_floating_point():
        given = replaced.dtype if isinstance(replaced, Tensor) else type(replaced).__name__
        raise TypeError(f"replace: gave {given}; needed a floating-point tensor of the shape of acts")
    if replaced.shape != acts.shape:
        raise ValueError(f"replace: gave {tuple(replaced.shape)}; needed the shape of acts, {tuple(acts.shape)}")
    replaced = replaced.to(acts)
    return replaced if mask is None else torch.where(mask.to(acts.device)[..., None], replaced, acts)


def replacing_hook(replace: Callable[[Tensor], Tensor], mask: Tensor | None = None) -> Callable[..., Any]:
    """A forward hook that puts replace(acts) in the place of a block's output."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        acts = hidden(output)
        return with_hidden(output, checked_replacement(acts, replace(acts), mask))

    return hook
