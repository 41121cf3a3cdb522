"""What a CUDA graph does, on a CPU: a function's operations are noted once, and done again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# They read a number from the device, or bring one to it: a capture refuses both.
REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "lift_fresh", "equal", "item"}


class _Notes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        self.names.append(name)
        if not func.is_view and torch.Tag.inplace_view not in func.tags:
            # As they are now: a tensor's shape may be changed in place.
            self.done.append(tree_map_only(Tensor, torch.Tensor.detach, (func, args, kwargs, result)))
        return result


def _tensors(of: Any) -> list[Tensor]:
    return [one for one in tree_flatten(of)[0] if isinstance(one, Tensor)]


def tape(written: Callable[[], list[Tensor]], names: list[str] | None = None) -> Callable[..., Any]:
    """For `Graphs(capture=...)`. written: what a captured function writes to: a capture changes none of it.

    names: is given the operations.
    """

    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        before = [(of, of.detach().clone()) for of in written()]
        notes = _Notes()
        try:
            with notes:
                results = function()
        finally:
            with torch.no_grad():
                for of, value in before:
                    of.data.copy_(value)
        if names is not None:
            names.extend(notes.names)

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, result in notes.done:
                given = {of.untyped_storage().data_ptr() for of in _tensors((args, kwargs))}
                for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() not in given:  # else it was written in place
                        old.data.copy_(new)

        return replay, results

    return capture
