"""Dense feature activations of a contextual SAE, with what it carried to each position: edits and slices keep it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Functions whose result has the positions of its argument, by the name that method and function share:
# elementwise,
POINTWISE = {
    *("abs", "bfloat16", "clamp", "clamp_max", "clamp_min", "clip", "clone", "contiguous", "cpu", "cuda", "detach"),
    *("add", "div", "divide", "multiply", "mul", "neg", "negative", "positive", "sub", "subtract", "true_divide"),
    *(
        "double",
        "empty_like",
        "float",
        "full_like",
        "half",
        "maximum",
        "minimum",
        "nan_to_num",
        "ones_like",
        "pin_memory",
    ),
    *("pow", "rand_like", "randn_like", "relu", "requires_grad", "sqrt", "square", "to", "type", "type_as", "where"),
    *("zeros_like", "zero", "fill", "lerp", "pin_memory", "threshold"),
}
# or with some numbers replaced by others,
EDITS = {
    *("copy", "index_add", "index_copy", "index_fill", "index_put", "masked_fill", "masked_scatter", "scatter"),
    *("scatter_add", "setitem"),
}
# or reshaped,
SHAPES = {"flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view", "view_as"}
# or selecting positions along a dimension, which is the argument of this number.
PARTS = {"chunk": 2, "index_select": 1, "narrow": 1, "select": 1, "split": 2, "tensor_split": 2, "unbind": 1}
_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
JOINS = {"cat": 1, "concat": 1, "concatenate": 1, "stack": 1}


class FeatureActs(Tensor):
    """Feature activations [..., d_sae] that know `carried`: c [..., d_in] of the same positions, or None.

    Results of torch's functions keep `carried` where their positions are known: copies, edits, arithmetic, another
    dtype or device, an index of positions, batches joined or split. Any other result is an ordinary tensor, and so is a
    mixture of activations with different `carried`.

    Views share memory: once one is overwritten with other positions, all of them lose `carried`.
    """

    _carried: Tensor | None = None
    _memory: _Memory

    @property
    def carried(self) -> Tensor | None:
        return None if self._carried is None or self._memory.of_others else self._carried

    @classmethod
    def of(cls, feature_acts: Tensor, carried: Tensor, view_of: FeatureActs | None = None) -> Self:
        acts = feature_acts.as_subclass(cls)
        acts._carried, acts._memory = carried, _Memory() if view_of is None else view_of._memory
        return acts

    def forget(self) -> None:
        """Drop `carried`, for all views: the memory holds other positions now."""
        if self._carried is not None:
            self._memory.of_others = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        acts = self.as_subclass(Tensor).detach().clone().requires_grad_(self.requires_grad)
        return acts.as_subclass(type(self)) if self.carried is None else self.of(acts, self.carried)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            given = [of for of in tree_leaves((args, kwargs)) if isinstance(of, FeatureActs)]
            name, in_place = _name(func)
            if func == _SET_DATA and isinstance(args[0], FeatureActs):
                args[0]._carried = None  # its storage was replaced
                return found
            if in_place or kwargs.get("out") is not None:
                target = kwargs.get("out") if not in_place else args[0] if args else kwargs
                for changed in tree_leaves(target):
                    if isinstance(changed, FeatureActs) and not _stays(name, changed, given, args):
                        changed.forget()
                return found
            if not given or isinstance(found, FeatureActs):  # nothing to do
                return found
            with torch.no_grad():
                carried = _carried(name, func, args, kwargs, given, found)
            if carried is None:
                return found
            if isinstance(found, Tensor):
                return cls.of(found, carried, _viewed(found, given))
            return type(found)(cls.of(*pair, _viewed(pair[0], given)) for pair in zip(found, carried, strict=True))


class _Memory:
    """State that views of one memory share."""

    of_others = False
    """whether other positions were written to it"""


def _viewed(found: Tensor, given: list[FeatureActs]) -> FeatureActs | None:
    """Which of the arguments a result is a view of, if any."""
    at = found.untyped_storage()._cdata
    return next((of for of in given if of._carried is not None and of.untyped_storage()._cdata == at), None)


def carried_of(feature_acts: Tensor) -> Tensor | None:
    """What was carried to the positions of feature activations, where that is known."""
    return feature_acts.carried if isinstance(feature_acts, FeatureActs) else None


def _name(func: Any) -> tuple[str, bool]:
    """The name of a function without underscores, and whether it writes to its first argument."""
    if func == _GET_DATA:
        return "detach", False
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        bare = name.strip("_")
        if bare == "setitem":
            return bare, True
        operators = "add", "sub", "mul", "div", "truediv", "pow"
        for operator in operators:
            if bare in (operator, f"r{operator}", f"i{operator}"):
                return operator.replace("true", ""), bare == f"i{operator}"
        return bare, False
    return name.rstrip("_"), name.endswith("_")


def _carried_to_all(name: str, first: FeatureActs, given: list[FeatureActs]) -> Tensor | None:
    """`carried` of a result that has all positions of its arguments and no others."""
    if name in POINTWISE:
        return first.carried if all(_same(of.carried, first.carried) for of in given) else None
    # A second tensor's numbers may come from other positions.
    return first.carried if name in EDITS and len(given) == 1 else None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one is other or (one.shape == other.shape and one.device == other.device and torch.equal(one, other))


def _stays(name: str, changed: FeatureActs, given: list[FeatureActs], args: Any) -> bool:
    """Whether the positions are the same after a write."""
    if changed.carried is None or _carried_to_all(name, changed, given) is not None:
        return True
    if name != "setitem" or len(given) != 2 or not isinstance(args[2], FeatureActs):
        return False
    # A part of it that was changed and put back, as acts[0] *= 2 does.
    there = _at(changed.carried, args[1], args[2]) if _of_positions(args[1], changed.ndim) else None
    return _same(there, args[2].carried)


def _carried(name: str, func: Any, args: Any, kwargs: Any, given: list[FeatureActs], found: Any) -> Any:
    """`carried` of a new result, or of each of several; None where it is not known."""
    first = given[0]
    carried, ndim = first.carried, first.ndim
    if carried is None:
        return None
    if name in POINTWISE | EDITS:
        same = isinstance(found, Tensor) and found.shape == first.shape
        return _carried_to_all(name, first, given) if same else None
    if name in SHAPES:
        whole = isinstance(found, Tensor) and found.ndim > 1 and found.shape[-1] == first.shape[-1]
        return carried.reshape(*found.shape[:-1], carried.shape[-1]) if whole else None
    if name == "getitem" and len(given) == 1:
        return _at(carried, args[1], found) if _of_positions(args[1], ndim) else None
    if not args:  # all are given by name
        return None
    if name in PARTS and len(given) == 1 and isinstance(args[0], FeatureActs):
        dim = kwargs.get("dim", kwargs.get("axis", args[PARTS[name]] if len(args) > PARTS[name] else 0))
        return func(carried, *args[1:], **kwargs) if _leads(dim, ndim) else None
    if name in JOINS and isinstance(args[0], list | tuple) and len(args[0]) == len(given):
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        of_each = [of.carried for of in given]
        leads = _leads(dim, ndim + (name == "stack")) and not any(of is None for of in of_each)
        return func(of_each, *args[1:], **kwargs) if leads else None
    return None


def _at(carried: Tensor, index: Any, found: Tensor) -> Tensor | None:
    """carried[index], where the index picks whole positions."""
    try:
        there = carried[index]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    whole = there.ndim == found.ndim > 0 and there.shape[:-1] == found.shape[:-1]
    return there if whole and there.shape[-1] == carried.shape[-1] else None


def _leads(dim: Any, ndim: int) -> bool:
    """Whether a dimension of ndim is not the last one, of features."""
    return isinstance(dim, int) and not isinstance(dim, bool) and -ndim <= dim < ndim and dim % ndim != ndim - 1


def _of_positions(index: Any, ndim: int) -> bool:
    """Whether an index takes all features of what it takes of [..., d_sae]."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in parts):
        if parts[-1] is Ellipsis:
            parts = parts[:-1]
        elif len(parts) > 1 and parts[-2] is Ellipsis and isinstance(parts[-1], slice) and parts[-1] == slice(None):
            parts = parts[:-2]
        else:
            return False
    if len(parts) >= ndim and isinstance(parts[-1], slice) and parts[-1] == slice(None):
        parts = parts[:-1]
    taken = 0
    for part in parts:
        if part is Ellipsis or isinstance(part, bool):
            return False
        if str(getattr(part, "dtype", "")) in ("torch.bool", "torch.uint8", "bool"):  # a mask, of torch or numpy
            taken += part.ndim
        elif part is not None:
            taken += 1
    return taken < ndim
