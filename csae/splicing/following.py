"""Which text a pass through a language model goes on with, and which of its positions are text.

Models name and build their caches differently, so argument names are not looked at. A cache is recognised by its type,
and its content by marks: after a pass each position gets a mark, a hash of the bits that the cache holds for it, and
before the next pass the marks are read again. They tell which row came from which (beams), how many positions were kept
(rejected tokens), and which positions never went through the splice. A cache that fits no known text is refused.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOM = 64  # positions that a table has room for at first
SAMPLED = 8  # numbers of a position that its mark is made of
SAMPLED_OF_STATE = 64  # and of each tensor of a recurrent state
DEEPEST = 4  # how far inside an object its tensors lie

FACTORS = torch.randint(-(2**62), 2**62, [SAMPLED_OF_STATE], generator=torch.Generator().manual_seed(7)) | 1


class Content(NamedTuple):
    """What a cache holds."""

    length: int | None
    """positions, where the cache says so"""
    first: int | None
    """the position of the first mark; None for a recurrent state, whose one mark covers all positions"""
    marks: Tensor
    """[B, t] int64, none of them 0"""


@dataclass
class Text:
    """B texts of one batch, as far as they went through the model: tables [B, room, ...], of `length` positions."""

    length: int = 0
    tables: dict[str, Tensor] = field(default_factory=dict)
    owners: list[Any] = field(default_factory=list)
    """weak references to the caches that hold it"""

    def table(self, name: str) -> Tensor:
        """[B, length, ...]"""
        return self.tables[name][:, : self.length]

    def append(self, new: Mapping[str, Tensor]) -> None:
        """n more positions, a table [B, n, ...] each."""
        n = next(iter(new.values())).shape[1]
        for name, values in new.items():
            table = self.tables.get(name)
            if table is None:
                table = values.new_zeros(values.shape[0], max(ROOM, n), *values.shape[2:])
            if self.length + n > table.shape[1]:
                table = torch.cat([table, torch.zeros_like(table), values.new_zeros(values.shape)], dim=1)
            table[:, self.length : self.length + n] = values
            self.tables[name] = table
        self.length += n

    def part(self, rows: Tensor | None, length: int) -> Text:
        """A new text of some rows (all if None) and the first `length` positions."""
        text = Text()
        text.length = length
        text.tables = {
            name: table.clone() if rows is None else table.index_select(0, rows.to(table.device))
            for name, table in self.tables.items()
        }
        return text

    def owned_by(self, cache: Any) -> bool:
        """Whether this very cache holds it."""
        return any(owner() is _referred(cache) for owner in self.owners)

    def is_alive(self) -> bool:
        """Whether any cache holds it."""
        return any(owner() is not None for owner in self.owners)

    def own(self, cache: Any) -> None:
        """The cache holds it from now on."""
        self.owners.append(weakref.ref(_referred(cache)))

    def disown(self, cache: Any) -> None:
        """The cache holds something else."""
        self.owners = [owner for owner in self.owners if owner() is not _referred(cache)]

    def found_in(self, content: Content) -> tuple[Tensor | None, int] | None:
        """How a cache continues this text: the row that each of its rows comes from (None if none moved), and how many
        positions it kept. None where it holds anything else.

        Raises ValueError where rows can't be told apart.
        """
        new = content.marks.to(self.tables["marks"].device)  # [new rows, t]
        if content.first is None:
            marks = self.table("marks")
            # Rows of a batch share one position: the last one that is possible for all of them.
            ends = (marks == new[:, :, None]).any(dim=1).all(dim=0).nonzero()
            kept = int(ends[-1]) + 1 if len(ends) else 0
            first = max(0, kept - 1)
        else:
            first, kept = content.first, content.length or 0
        if not 0 < kept <= self.length:
            return None
        marks = self.tables["marks"][:, first:kept]
        unknown = marks == 0
        if len(new) == len(marks) and bool(((marks == new) | unknown).all()) and not bool(unknown.all()):
            return None, kept
        fits = ((marks[None] == new[:, None]) | unknown).all(dim=2) & ~unknown.all(dim=1)  # [new rows, rows]
        if not bool(fits.any(dim=1).all()):
            return None
        rows = fits.int().argmax(dim=1)
        before = self.tables["marks"][:, :kept]
        alike = (before[None] == before[rows][:, None]).all(dim=2)  # [new rows, rows]
        if bool((fits & ~alike).any()):
            raise ValueError(
                f"the cache was reordered, and the {marks.shape[1]} positions that it still holds do not tell which of "
                f"{len(marks)} texts each row is; needed rows that stay where they are: generate without beams"
            )
        return rows, kept


def caches_in(values: Iterable[Any]) -> Iterator[Any]:
    """The caches among arguments or outputs: those of transformers, and other objects that hold earlier passes."""
    for value in values:
        if value is None or isinstance(value, Tensor | nn.Module | str | bytes | int | float | bool | Mapping):
            continue
        if isinstance(value, list | tuple):
            # States are a list; keys and values a tuple of tuples. A plain tuple of tensors is something else.
            nested = any(_has_states(part) for part in value if isinstance(part, list | tuple))
            if nested or (isinstance(value, list) and any(state.dim() > 2 for state in _states(value, deepest=1))):
                yield value
        elif _is_cache(value) or _has_states(value):
            yield value


def is_known(cache: Any) -> bool:
    """Whether it is surely a cache; other objects are one only by what they hold."""
    return isinstance(cache, list | tuple) or _is_cache(cache)


@torch.no_grad()
def content_of(cache: Any, rows: int | None) -> Content | None:
    """What a cache holds, None if nothing. rows: how many texts the pass is of, if that is known.

    Raises ValueError where it holds positions but shows none of them.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # the other one holds an encoder's output
    # The same layer from pass to pass, whatever it holds at the moment.
    layer = max(_layers(cache), key=lambda layer: (layer.is_full, layer.number), default=None)
    if layer is not None and layer.keys.shape[-2]:
        length, keys = layer.length, layer.keys
        _settle(keys)
        # A sliding cache holds the last positions only; a static one has unused room behind them.
        held = keys[:, :, :length] if keys.shape[-2] > length else keys
        return Content(length, length - held.shape[-2], _marks(held[:, 0, :, :SAMPLED]))
    said = layer.length if layer is not None else _length(cache)
    states = [state for state in _states(cache) if state.numel()]
    if not states and said:
        raise ValueError(
            f"{named(cache)} says that it holds {said} positions but shows none; use another, such as DynamicCache"
        )
    if said == 0 or not any(bool(_bits(state).any()) for state in states):
        return None  # made, and not filled yet
    by_row = [_rows_first(state, rows) for state in states]
    same = [state for state in by_row if len(state) == len(by_row[0])]
    mark = torch.zeros(len(same[0]), dtype=torch.int64, device=same[0].device)
    for state in same:
        _settle(state)
        flat = state.reshape(len(state), -1)
        chosen = torch.linspace(0, flat.shape[1] - 1, min(flat.shape[1], SAMPLED_OF_STATE)).long()
        mark = mark * 31 + _marks(flat[:, chosen.to(flat.device)]).to(mark.device)
    return Content(said, None, (mark | 1).unsqueeze(1))


def _rows_first(state: Tensor, rows: int | None) -> Tensor:
    """A state [rows, ...], or of all layers in one tensor, [layers, rows, ...] -> [rows, ...]."""
    return state.transpose(0, 1) if rows not in (None, state.shape[0]) and state.shape[1] == rows else state


def _is_cache(value: Any) -> bool:
    cache_utils = sys.modules.get("transformers.cache_utils")
    known = cache_utils is not None and isinstance(value, cache_utils.Cache)
    return known or callable(getattr(value, "get_seq_length", None))


class _Layer(NamedTuple):
    """A layer of a cache that keeps keys."""

    is_full: bool  # it holds all positions, whatever their number
    number: int
    keys: Tensor  # [B, heads, positions, d]; no positions where it does not show them
    length: int  # how many went through it


def _layers(cache: Any) -> Iterator[_Layer]:
    """The layers that keep keys and hold something."""
    if isinstance(cache, list | tuple):
        for number, layer in enumerate(cache):
            if isinstance(layer, list | tuple) and layer and isinstance(layer[0], Tensor) and layer[0].dim() == 4:
                yield _Layer(True, number, layer[0], layer[0].shape[-2])
        return
    layers = getattr(cache, "layers", None)
    for number, layer in enumerate(layers if isinstance(layers, list | tuple) else ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and (keys.dim() == 4 or not keys.numel()):
            length = _length(layer)
            if length:
                keys = keys if keys.dim() == 4 else keys.new_empty(1, 1, 0, 1)
                yield _Layer(not getattr(layer, "is_sliding", False), number, keys, length)


def _length(holder: Any) -> int | None:
    """What a cache, or a layer of one, says how many positions it holds; None where it doesn't know."""
    try:
        return int(holder.get_seq_length())
    # Caches of recurrent states have no such method, or one that raises what it likes.
    except Exception:
        return None


def _states(holder: Any, deepest: int = DEEPEST) -> Iterator[Tensor]:
    """The floating tensors inside lists, dictionaries and plain objects."""
    if isinstance(holder, Tensor):
        if holder.is_floating_point() and holder.dim() > 1:
            yield holder
    elif deepest and not isinstance(holder, nn.Module | type):
        if isinstance(holder, Mapping):
            parts: Iterable[Any] = holder.values()
        elif isinstance(holder, list | tuple):
            parts = holder
        else:
            parts = vars(holder).values() if hasattr(holder, "__dict__") else ()
        for part in parts:
            yield from _states(part, deepest - 1)


def _has_states(holder: Any) -> bool:
    return next(_states(holder), None) is not None


def _marks(values: Tensor) -> Tensor:
    """values [..., n], n at most SAMPLED_OF_STATE -> [...] int64, not 0: other bits, another mark."""
    bits = _bits(values).to(torch.int64)
    return (bits * FACTORS[: bits.shape[-1]].to(bits.device)).sum(dim=-1) | 1


def _bits(values: Tensor) -> Tensor:
    """The same bits as integers, of any floating dtype."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(integers[values.element_size()])


def _settle(held: Tensor) -> None:
    """Wait for caches that are moved to the host and back: they are on a CUDA stream of their own.

    Which device a cache on the host came from is not known, so each one that this process uses is waited for.
    """
    if held.device.type == "cpu" and torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):  # waiting would open any other
                torch.cuda.synchronize(device)


def _referred(cache: Any) -> Any:
    """What a weak reference can be to."""
    return next(_states(cache)) if isinstance(cache, list | tuple) else cache


def named(cache: Any) -> str:
    """How messages call a cache."""
    return f"the cache (a {type(cache).__name__})"
