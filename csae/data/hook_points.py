"""Hook points: the places of a language model where activations are read or replaced.

    resid.out:11                the residual stream after block 11, counted from 0 as the model does: layer 12
    resid.in:11                 before it: the same as resid.out:10
    mlp.in:11, mlp.out:11       what the MLP of block 11 is given, and what it gives
    attn.in:11, attn.out:11     the same of its attention, or of what mixes positions in the place of one
    model.layers.11.mlp         any module by its path: what it gives; with .in behind it, what it is given
    blocks.11.hook_mlp_out      TransformerLens's names of resid_pre, resid_post, attn_out and mlp_out, where they are
                                the same; dictionary_learning's, such as mlp_out_layer_11; and sparsify's, which are
                                paths in the model without its head: layers.11.mlp

Names may hold `*`, `?` and `[...]`, each within one part: model.layers.*.mlp, mlp.out:*. Of what a module is given or
gives, the first tensor [B, T, width] is meant. A place has one name: the short form where there is one, else the path.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from csae.data.blocks import PROBE_TOKENS, Blocks, hidden, in_windows, with_hidden
from csae.data.places import SHORT_FORM, Place, in_transformer_lens, matching, name_of_layer, our_name
from csae.data.probe import Call, Probed, input_of, probe, with_input
from csae.errors import UserError, shown

LISTED = "`csae hooks MODEL` lists what there is"
_probed: weakref.WeakKeyDictionary[nn.Module, Probed] = weakref.WeakKeyDictionary()


class HookPoint(NamedTuple):
    """A place of a language model: what one of its modules is given, or what it gives, [B, T, width]."""

    name: str
    """the one name of the place"""
    module: nn.Module
    path: str
    """of the module in the model"""
    side: str
    """ "in": what the module is given. "out": what it gives."""
    width: int
    block: int | None
    """the block that it is in, from 0; None outside"""
    when: int
    """a place with a higher number is reached later in a pass; 0 where no pass has shown it yet"""


class HookPoints:
    """The hook points of a language model of transformers.

    Residual streams are known by `csae.data.blocks`. The first time that another place is asked for, the model runs on
    2 windows of 4 tokens (`csae.data.probe`).
    """

    def __init__(self, model: nn.Module, name: str, blocks: Blocks) -> None:
        """name: of the model, for messages."""
        self._model, self._name, self._blocks = model, name, blocks
        self._names: tuple[Probed, dict[str, str]] | None = None

    def one(self, name: str) -> HookPoint:
        """The hook point of a name. Raises UserError where there is none, where it names several, or none [B, T, d]."""
        points = self.find(name)
        if len(points) > 1:
            several = f"{points[0].name} to {points[-1].name}"
            raise UserError(
                f"hook {shown(repr(name))}: {len(points)} places of {self._name}, {several}; needed one: name it"
            )
        return points[0]

    def one_name(self, name: str) -> str:
        """The one name of the place that a name stands for; the name itself where it stands for none."""
        found = SHORT_FORM.fullmatch(name)
        if found and found[1] == "resid" and int(found[3]) < len(self._blocks.modules):
            return self.one(name).name
        return name if SHORT_FORM.fullmatch(name) else self._all_names().get(name, name)

    def find(self, pattern: str) -> tuple[HookPoint, ...]:
        """The hook points that a name or a pattern stands for, in the model's order; one at least.

        Raises UserError, in one line, where nothing fits, or where the tensor at any of them is no [B, T, width].
        """
        found = SHORT_FORM.fullmatch(pattern)
        if found and found[1] == "resid":
            return (self._resid(found[2], int(found[3]), pattern),)
        names = self._all_names()
        if pattern in names:
            return (self._point(names[pattern], pattern),)
        if not re.search(r"[*?\[]", pattern):
            raise UserError(self._unknown(pattern))
        canonical = dict.fromkeys(names[name] for name in matching(pattern, names))
        if not canonical:
            raise UserError(f"hook {shown(repr(pattern))}: fits no place of {self._name}; {LISTED}")
        return tuple(self._point(name, pattern) for name in canonical)

    def all(self) -> list[HookPoint]:
        """Every place with a tensor [B, T, width], in the order in which a pass reaches them."""
        points = []
        for name in dict.fromkeys(self._all_names().values()):
            path, side = self._where(name)
            call = self._probed().calls[path]
            if _fault(call, side) is None:
                points.append(self._point(name, name))
        return sorted(points, key=lambda point: point.when)

    def others_name(self, point: HookPoint) -> str | None:
        """What TransformerLens calls a place; None where it has no such name, or where that may be another tensor."""
        found = SHORT_FORM.fullmatch(point.name)
        if not found:
            return None
        kind, side, block = found[1], found[2], int(found[3])
        if kind == "resid":
            return f"blocks.{block}.hook_resid_{'post' if side == 'out' else 'pre'}"
        if side == "out" and f"blocks.{block}.hook_{kind}_out" in self._all_names():
            return f"blocks.{block}.hook_{kind}_out"
        return None

    def places(self, hook: str | int, to: str | None = None) -> tuple[Place, ...]:
        """The places of a name, a pattern or a layer; of two patterns, pairs in the same blocks.

        Raises UserError where they don't pair up, or where a pair predicts what the model reaches earlier.
        """
        if isinstance(hook, int):
            self._check_layer(hook)
            hook = name_of_layer(hook)
        if to is None:
            return tuple(Place(point.name) for point in self.find(hook))
        self._probed()  # it says what is reached when
        points, targets = self.find(hook), self.find(to)
        said = f"from {shown(repr(hook))}, to {shown(repr(to))}: "
        one_each = len(points) == len(targets) == 1
        if not one_each and [point.block for point in points] != [target.block for target in targets]:
            raise UserError(
                f"{said}{len(points)} and {len(targets)} places of {self._name}; needed one of each, or one of each in "
                "every block that has any"
            )
        for point, target in zip(points, targets, strict=True):
            if point.name == target.name:
                raise UserError(f"{said}both are {point.name}; a transcoder predicts another place: leave --to out")
            if target.when < point.when:
                raise UserError(f"{said}{self._name} reaches {target.name} before {point.name}; needed the other order")
        return tuple(Place(point.name, target.name) for point, target in zip(points, targets, strict=True))

    def _check_layer(self, layer: int) -> None:
        n_layers = len(self._blocks.modules)
        if isinstance(layer, bool) or not 1 <= layer <= n_layers:
            raise UserError(f"layer: given {layer}; {self._name} has layers 1 to {n_layers}")

    def _resid(self, side: str, block: int, given: str) -> HookPoint:
        n_blocks = len(self._blocks.modules)
        if block >= n_blocks:
            raise UserError(
                f"hook {given!r}: {self._name} has blocks 0 to {n_blocks - 1}; after the last is resid.out:"
                f"{n_blocks - 1}, which is layer {n_blocks}"
            )
        if side == "in" and block:
            side, block = "out", block - 1
        module, name = self._blocks.modules[block], f"resid.{side}:{block}"
        probed = _probed.get(self._model)
        path = next(path for path, one in _paths(self._model).items() if one is module)
        call = probed.calls[path] if probed and path in probed.calls else None
        when = 0 if call is None else call.ends if side == "out" else call.begins
        return HookPoint(name, module, path, side, self._blocks.d_in, block, when)

    def _point(self, name: str, given: str) -> HookPoint:
        path, side = self._where(name)
        probed = self._probed()
        call = probed.calls[path]
        fault = _fault(call, side)
        if fault is not None:
            raise UserError(f"hook {shown(repr(given))}: {path} of {self._name} {fault}")
        width = (call.given if side == "in" else call.gives)[-1]
        when = call.ends if side == "out" else call.begins
        return HookPoint(name, probed.modules[path], path, side, width, self._block_of(path), when)

    def _where(self, name: str) -> tuple[str, str]:
        """The module's path and the side of a canonical name."""
        found = SHORT_FORM.fullmatch(name)
        if found:
            block = int(found[3])
            path = self._block_paths()[block] if found[1] == "resid" else self._probed().parts[block][found[1]].path
            assert path is not None
            return path, found[2]
        return (name, "out") if name in self._probed().modules else (name.removesuffix(".in"), "in")

    def _block_of(self, path: str) -> int | None:
        inside = (number for number, block in enumerate(self._block_paths()) if f"{path}.".startswith(f"{block}."))
        return next(inside, None)

    def _block_paths(self) -> list[str]:
        paths = {module: path for path, module in reversed(_paths(self._model).items())}
        return [paths[block] for block in self._blocks.modules]

    def _probed(self) -> Probed:
        known = _probed.get(self._model)
        if known is None or known.modules != _paths(self._model):
            known = _probed[self._model] = probe(self._model, self._name, self._blocks, _paths(self._model))
        return known

    def _all_names(self) -> dict[str, str]:
        """The canonical name by each name."""
        probed = self._probed()
        if self._names is not None and self._names[0] is probed:
            return self._names[1]
        names: dict[str, str] = {}
        for block, (path, parts) in enumerate(zip(self._block_paths(), probed.parts, strict=True)):
            before = f"resid.out:{block - 1}" if block else "resid.in:0"
            short = {f"resid.in:{block}": before, f"resid.out:{block}": f"resid.out:{block}"}
            paths = {f"{path}.in": before, path: f"resid.out:{block}"}
            lens = {f"blocks.{block}.hook_resid_pre": before, f"blocks.{block}.hook_resid_post": f"resid.out:{block}"}
            lens |= {f"resid_pre_layer_{block}": before, f"resid_post_layer_{block}": f"resid.out:{block}"}
            if not block:
                lens["resid_in_layer_0"] = before
            for kind, part in parts.items():
                if part.path is None:
                    continue
                if not part.adds_stream:
                    lens[f"{kind}_out_layer_{block}"] = f"{kind}.out:{block}"
                lens[f"{kind}_in_layer_{block}"] = f"{kind}.in:{block}"
                for side in ("in",) if part.adds_stream else ("in", "out"):
                    name = f"{kind}.{side}:{block}"
                    short[name] = name
                    paths[part.path + (".in" if side == "in" else "")] = name
                # Where norms or factors come between, theirs is another tensor.
                if probed.adds_up[block] and all(part.path for part in parts.values()):
                    lens[f"blocks.{block}.hook_{kind}_out"] = f"{kind}.out:{block}"
            names |= lens | short | paths
        for path in probed.modules:
            names.setdefault(path, path)
        for path in probed.modules:
            names.setdefault(f"{path}.in", f"{path}.in")  # a module that is called so itself comes first
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        for name, canonical in list(names.items()):
            if name.startswith(prefix):
                names.setdefault(name.removeprefix(prefix), canonical)
        self._names = probed, names
        return names

    def _unknown(self, name: str) -> str:
        """Why a name without a pattern stands for nothing."""
        given, found = f"hook {shown(repr(name))}: ", SHORT_FORM.fullmatch(our_name(name))
        n_blocks = len(self._blocks.modules)
        if found and int(found[3]) >= n_blocks:
            return f"{given}{self._name} has blocks 0 to {n_blocks - 1}"
        found = SHORT_FORM.fullmatch(name)
        if found:
            block = int(found[3])
            part = self._probed().parts[block][found[1]]
            what = "MLP" if found[1] == "mlp" else "attention"
            if part.adds_stream:
                return (
                    f"{given}the {what} of block {block} of {self._name} adds the stream to what it gives; name the "
                    f"module in {part.path} whose output you mean"
                )
            inside = self._block_paths()[block].count(".") + 1
            there = [
                point.name
                for point in self.all()
                if point.block == block and (point.path.count(".") == inside or SHORT_FORM.fullmatch(point.name))
            ]
            return (
                f"{given}block {block} of {self._name} has no {what} to name ({part.missing}), but "
                f"{', '.join(there)}; {LISTED}"
            )
        if reason := in_transformer_lens(name):
            return f"{given}TransformerLens's name of {reason}; {LISTED}"
        return f"{given}{self._name} has no such place; {LISTED}"


def on_read(point: HookPoint, windows: torch.Size, take: Callable[[Tensor], object]) -> RemovableHandle:
    """Calls take(acts [B, T, width]) at each run of a hook point's module, until the handle is removed.

    windows: [B, T] of the pass. The module's run raises UserError where the tensor there has another shape.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(_checked(point, windows, _input(point, args, kwargs)[1]))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        take(_checked(point, windows, in_windows(hidden(output), windows)))

    if point.side == "in":
        return point.module.register_forward_pre_hook(before, with_kwargs=True)
    return point.module.register_forward_hook(after)


def on_replace(point: HookPoint, windows: torch.Size, replace: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Puts replace(acts) in the place of acts [B, T, width] at a hook point, until the handle is removed.

    As `on_read` otherwise.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, acts = _input(point, args, kwargs)
        return with_input(args, kwargs, key, replace(_checked(point, windows, acts)))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        given = hidden(output)
        return with_hidden(output, replace(_checked(point, windows, in_windows(given, windows))).view_as(given))

    if point.side == "in":
        return point.module.register_forward_pre_hook(before, with_kwargs=True)
    return point.module.register_forward_hook(after)


def _input(point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
    found = input_of(args, kwargs)
    if found is None:
        raise UserError(f"hook {point.name!r}: {point.path} is given no tensor [B, T, {point.width}]")
    return found


def _checked(point: HookPoint, windows: torch.Size, acts: Any) -> Tensor:
    if not isinstance(acts, Tensor) or acts.shape != (*windows, point.width):
        gives = list(acts.shape) if isinstance(acts, Tensor) else f"a {type(acts).__name__}"
        raise UserError(f"hook {point.name!r}: {gives} is there; needed {[*windows, point.width]}")
    return acts


def _paths(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in a model by path; a compiled one has the path that it would have uncompiled."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            modules.setdefault(path.replace("_orig_mod.", "").removesuffix("._orig_mod"), module)
    return modules


def _fault(call: Call, side: str) -> str | None:
    """Why what a module is given or gives is no hook point; None where it is one."""
    if call.runs != 1:
        return f"runs {call.runs} times in a pass through the model; needed once"
    shape, does = (call.given, "is given") if side == "in" else (call.gives, "gives")
    if not isinstance(shape, torch.Size) or len(shape) != 3 or shape[:2] != (2, PROBE_TOKENS):
        what = list(shape) if isinstance(shape, torch.Size) else shape
        return f"{does} {what} for 2 windows of {PROBE_TOKENS} tokens; needed [2, {PROBE_TOKENS}, d]"
    return None
