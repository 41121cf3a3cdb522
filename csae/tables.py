"""Tables with a row a feature: random ones, of all features or of those that this process owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

TABLES = ("W_enc", "b_enc", "W_dec", "W_mem", "threshold")
"""the parameters with a row a feature; threshold is one with selection="jumprelu" """

Rows = Callable[[int], range]
"""d_sae -> the features whose rows are here"""

# A whole table of a large SAE does not fit where a share of it does. So it is drawn in blocks, of at most so many
# numbers, and each is cut to the rows that are here.
BLOCK = 1 << 24
# torch fills 16 numbers at a time: blocks of a multiple of them give the bits that one call gives.
ALIGNED = 16

_owned: ContextVar[Rows | None] = ContextVar("owned", default=None)


@contextmanager
def owning(rows: Rows | None) -> Iterator[None]:
    """SAEs that are made in here have only those rows of their tables; all of them with None."""
    before = _owned.set(rows)
    try:
        yield
    finally:
        _owned.reset(before)


def rows_here(d_sae: int) -> range:
    """The features whose rows an SAE that is made now has."""
    rows = _owned.get()
    return range(d_sae) if rows is None else rows(d_sae)


def random_table(d_sae: int, d: int) -> Tensor:
    """[rows, d] of standard normal numbers: the rows that are here of what torch.randn(d_sae, d) gives, bit by bit."""
    here = rows_here(d_sae)
    if here == range(d_sae):
        return torch.randn(d_sae, d)
    table = torch.empty(len(here), d)
    for start, stop in _blocks(d_sae, d):
        block = torch.randn(stop - start, d)
        first, last = max(start, here.start), min(stop, here.stop)
        if first < last:
            table[first - here.start : last - here.start] = block[first - start : last - start]
    return table


def random_directions(d_sae: int, d: int) -> Tensor:
    """[rows, d]: `random_table` with rows of length one."""
    rows = random_table(d_sae, d)
    return rows.div_(rows.norm(dim=1, keepdim=True))


def _blocks(d_sae: int, d: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of rows begin and end. The last has 16 rows at least: torch draws the last 16 numbers twice."""
    most = max(ALIGNED, BLOCK // d // ALIGNED * ALIGNED)
    start = 0
    while start < d_sae:
        stop = start + most if d_sae - start - most >= ALIGNED else d_sae
        yield start, stop
        start = stop
