"""What each module of a language model is given and gives, in a pass over a few tokens, and what it does in its block.

Nothing goes by a module's name where what it does decides: the MLP of a block is the module that maps the stream's
width to itself at each position alone, and its attention the one that mixes positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csae.data.blocks import Blocks, hidden, in_windows, probe_tokens, run_probe
from csae.errors import first_line

# Where several modules of a block do the same, the one that is called by the usual name is taken.
USUAL_NAMES = {
    "mlp": ("mlp", "ffn", "feed_forward"),
    "attn": ("attn", "self_attn", "attention", "self_attention"),
}

NONE = {
    "mlp": "no module in it maps the stream's width to itself at each position alone",
    "attn": "no module in it mixes positions",
}


@dataclass
class Call:
    """A module in the probe pass."""

    runs: int = 0
    given: Any = "nothing"
    """the shape of the first input [B, T, width], or what there is instead, in words"""
    gives: Any = "nothing"
    begins: int = 0
    """when, counted in what began and ended before it"""
    ends: int = 0


class Part(NamedTuple):
    """The MLP or the attention of a block."""

    path: str | None
    """of the module in the model; None where there is none"""
    missing: str = ""
    """why there is none"""
    adds_stream: bool = False
    """what it gives is a sum with the stream that it is given beside its input"""


class Probed(NamedTuple):
    """What a probe pass shows of a model."""

    modules: dict[str, nn.Module]  # by path
    calls: dict[str, Call]  # by path
    parts: list[dict[str, Part]]  # for each block, its "mlp" and "attn"
    adds_up: list[bool]  # for each block, whether it gives the stream + what the attention gives + what the MLP gives


@dataclass
class _Doing:
    """A module inside a block that maps the stream's width to itself, in the probe pass."""

    output: Tensor
    mixes: bool
    """whether its output at a position depends on earlier positions"""
    bends: bool
    """whether it is more than a linear map and a bias"""
    adds_stream: bool
    failed: str = ""


@dataclass
class _Pass:
    calls: dict[nn.Module, Call] = field(default_factory=dict)
    doing: dict[nn.Module, _Doing] = field(default_factory=dict)
    clock: int = 0
    trying: bool = False
    """a module runs once more, with another input"""


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor] | None:
    """The first input [B, T, width] of a module's call, and its number or name; None where there is none."""
    return next(
        (
            (key, value)
            for key, value in _arguments(args, kwargs)
            if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
        ),
        None,
    )


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int | str, Any]]:
    """The arguments of a call by number or name."""
    return [*enumerate(args), *kwargs.items()]


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another value in the place of one of them."""
    if isinstance(key, str):
        return args, kwargs | {key: value}
    return (*args[:key], value, *args[key + 1 :]), kwargs


def probe(model: nn.Module, name: str, blocks: Blocks, modules: dict[str, nn.Module]) -> Probed:
    """Runs the model once on 2 windows of 4 tokens, and some of its modules two or three times.

    modules: of the model, by path.

    Raises UserError, in one line, where the model does not run.
    """
    seen = _Pass()
    inside = {module for block in blocks.modules for module in block.modules()} - set(blocks.modules)
    shape = torch.Size([*probe_tokens(model, name).shape, blocks.d_in])
    given_to: dict[nn.Module, Tensor] = {}
    given_by: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if seen.trying:
            return
        call = seen.calls.setdefault(module, Call())
        seen.clock += 1
        call.runs, call.begins = call.runs + 1, seen.clock
        found = input_of(args, kwargs)
        call.given = _described([*args, *kwargs.values()]) if found is None else found[1].shape
        if module in blocks.modules and found is not None:
            given_to[module] = found[1].clone()  # some models go on to add to it in place

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if seen.trying:
            return
        call = seen.calls[module]
        seen.clock += 1
        call.ends = seen.clock
        first = hidden(output) if not isinstance(output, (tuple, list)) or len(output) else output
        call.gives = first.shape if isinstance(first, Tensor) else f"a {type(first).__name__}"
        found = input_of(args, kwargs)
        is_flat = False
        if isinstance(first, Tensor) and first.dim() == 2:
            is_flat = True
            if found is not None and found[1].shape == shape:
                first = in_windows(first, shape[:2])
        if not isinstance(first, Tensor) or first.shape != shape:
            return
        if module in blocks.modules:
            given_by[module] = first.clone()
        if found is None or found[1].shape != shape:
            return
        if module in inside and any(parameter.dim() > 1 for parameter in module.parameters()):
            seen.trying = True
            try:
                seen.doing[module] = doing = _try(module, args, kwargs, first.clone())
                if is_flat and not doing.mixes and not doing.failed:  # its rows are the positions, in their order
                    call.gives = shape
            finally:
                seen.trying = False

    hooks = []
    for module in model.modules():
        hooks += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        run_probe(model, name, f"model {name!r}: csae can't see its modules: ")
    finally:
        for hook in hooks:
            hook.remove()
    paths: dict[nn.Module, str] = {}
    for path, module in modules.items():
        paths.setdefault(module, path)
    parts, adds_up = [], []
    for block in blocks.modules:
        before_it, after_it = given_to[block], given_by[block]
        parts.append(_parts(block, after_it, seen, paths))
        of_parts = [module for module, path in paths.items() if path in {part.path for part in parts[-1].values()}]
        total = before_it.double() + sum(seen.doing[module].output.double() for module in of_parts)
        adds_up.append(
            not any(part.adds_stream for part in parts[-1].values()) and _alike(total, after_it, after_it.dtype)
        )
    return Probed(modules, {path: seen.calls.get(module, Call()) for path, module in modules.items()}, parts, adds_up)


def _try(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> _Doing:
    """Runs a module with another first position, with a mean of both, and with twice what it is given beside it."""
    key, given = input_of(args, kwargs) or (0, output)
    changed = given.clone()
    changed[:, 0] = changed[:, 0].flip(-1) + 1
    others = [
        (other, value)
        for other, value in _arguments(args, kwargs)
        if other != key and isinstance(value, Tensor) and value.shape == output.shape and value.is_floating_point()
    ]
    try:
        otherwise = _run_with(module, args, kwargs, key, changed)
        mixes = not _alike(otherwise[:, 1:], output[:, 1:], output.dtype)
        between = _run_with(module, args, kwargs, key, (given + changed) / 2)
        bends = not _alike(between * 2, otherwise + output, output.dtype)
        adds_stream = False
        for other, value in others:
            doubled = _run_with(module, args, kwargs, other, value * 2)
            adds_stream |= _alike(doubled.double() - output.double(), value, output.dtype)
    # A module may raise anything on what it was not made for.
    except Exception as error:
        return _Doing(output, False, False, False, first_line(error))
    return _Doing(output, mixes, bends, adds_stream)


def _run_with(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Tensor
) -> Tensor:
    """What a module gives with another value for one of its arguments; its own hooks don't run."""
    args, kwargs = with_input(args, kwargs, key, value)
    found = input_of(args, kwargs)
    given = hidden(module.forward(*args, **kwargs))
    return given if found is None else in_windows(given, found[1].shape[:2])


def _parts(block: nn.Module, stream: Tensor, seen: _Pass, paths: dict[nn.Module, str]) -> dict[str, Part]:
    """The MLP and the attention among the outermost modules of a block that map the stream's width to itself."""
    found: dict[str, list[nn.Module]] = {"mlp": [], "attn": []}
    failed: list[str] = []

    def look(parent: nn.Module) -> None:
        for module in parent.children():
            doing = seen.doing.get(module)
            gives_stream = doing is not None and not doing.adds_stream and torch.equal(doing.output, stream)
            if doing is None or gives_stream:
                look(module)
            elif doing.failed:
                failed.append(f"{paths[module]} does not run by itself ({doing.failed})")
            elif (doing.mixes or doing.bends) and seen.calls[module].gives == stream.shape:
                found["attn" if doing.mixes else "mlp"].append(module)

    look(block)
    parts = {}
    for kind, modules in found.items():
        usual = [module for module in modules if paths[module].rpartition(".")[2] in USUAL_NAMES[kind]]
        one = modules if len(modules) == 1 else usual
        if len(one) == 1:
            parts[kind] = Part(paths[one[0]], adds_stream=seen.doing[one[0]].adds_stream)
        elif modules:
            parts[kind] = Part(None, "it could be " + " or ".join(paths[module] for module in modules))
        else:
            parts[kind] = Part(None, failed[0] if failed else NONE[kind])
    return parts


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same to rounding of a dtype."""
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= torch.finfo(dtype).eps ** 0.5 * other.norm())


def _described(inputs: list[Any]) -> str:
    tensor = next((one for one in inputs if isinstance(one, Tensor)), None)
    return "no tensor" if tensor is None else str(list(tensor.shape))
