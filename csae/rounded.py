"""Copies of an SAE's tables in bfloat16: what a step under autocast takes instead of a cast of the whole table.

`csae.adam.Adam` writes a table's copy in the pass that updates the table, where that costs less than a cast (`kept`): 2
bytes a parameter, where a cast reads 4 and writes 2. A step uses copies inside of `Copies.used` only.

A copy counts while its table is as it was when both were written: the same parameter, in the same memory, with no write
since. A write is seen by the parameter's `_version`, as autograd sees it. A write through `.data`, or from another
library, is not: so `used` is for loops that make none between two steps, as `csae train` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from csae.ops.backend import place

DTYPE = torch.bfloat16


class _State(NamedTuple):
    """What tells a parameter from the same one after a write, or in other memory."""

    version: int
    storage: StorageWeakRef  # its address is not used again as long as this is alive
    view: tuple[object, ...]

    @classmethod
    def of(cls, table: Tensor) -> _State:
        view = (table.dtype, table.shape, table.stride(), table.storage_offset())
        return cls(table._version, StorageWeakRef(table.untyped_storage()), view)


class _Copy(NamedTuple):
    rounded: Tensor
    table: Tensor  # the parameter that it is of
    state: _State | None  # of the parameter; None where they were never written together, or are being written


class Copies:
    """The copies of one SAE's tables, by the parameters' names."""

    def __init__(self) -> None:
        self._kept: dict[str, _Copy] = {}
        self._asked: set[str] = set()  # since the last update

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, ()  # copied or loaded, there are none yet

    @contextmanager
    def used(self) -> Iterator[None]:
        """`SAE.gradients` in here takes tables from these copies, where they are current. It changes no result."""
        before = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(before)

    def current(self) -> dict[str, Tensor]:
        """The copies that a step takes now, by name: none outside of `used`."""
        if _in_use.get() is not self:
            return {}
        return {name: copy.rounded for name, copy in self._kept.items() if _is_current(copy.table, copy)}

    def forget(self) -> None:
        """Drop all copies: those of the next step are casts."""
        self._kept.clear()

    def of(self, name: str, table: Tensor) -> Tensor | None:
        """The copy [d_sae, d] of a table, or None where there is none, or it is not current."""
        self._asked.add(name)
        copy = self._kept.get(name)
        if copy is None or _is_current(table, copy):
            return None if copy is None else copy.rounded
        del self._kept[name]  # it may be on a device that the table has left
        return None

    def to_write(self, name: str, table: Tensor, whole: bool) -> Tensor | None:
        """[d_sae, d]: the copy that is to be written with the table; None where no step has asked for it.

        whole: all of its rows will be written.
        """
        if name not in self._asked or torch.compiler.is_compiling() or not kept(table):
            return None
        self._asked.discard(name)
        copy = self._kept.get(name)
        if copy is None or copy.rounded.device != table.device or copy.rounded.shape != table.shape:
            copy = _Copy(torch.empty_like(table, dtype=DTYPE, memory_format=torch.contiguous_format), table, None)
        if not whole and not _is_current(table, copy):
            copy.rounded.copy_(table.detach())
        self._kept[name] = _Copy(copy.rounded, table, None)
        return copy.rounded

    def written(self, name: str) -> None:
        """Say that the table and the copy that `to_write` gave were written together just now."""
        copy = self._kept[name]
        self._kept[name] = copy._replace(state=_State.of(copy.table))


_in_use: ContextVar[Copies | None] = ContextVar("copies", default=None)


def copy_of(name: str, table: Tensor) -> Tensor | None:
    """The copy of a parameter that is in use, where one is and autocast asks for its dtype."""
    if torch.compiler.is_compiling():
        return None
    copies, kind = _in_use.get(), table.device.type
    if copies is None or table.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return copies.of(name, table) if torch.get_autocast_dtype(kind) == DTYPE else None


def kept(table: Tensor) -> bool:
    """Whether an optimizer is to keep a copy: where the kernel that updates the table writes it in the same pass."""
    return place("feature_rows", table.device, table.dtype) == "triton"


def _is_current(table: Tensor, copy: _Copy) -> bool:
    return copy.table is table and copy.state is not None and copy.state == _State.of(table)
