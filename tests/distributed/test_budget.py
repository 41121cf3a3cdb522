"""A budget that the tokens of all ranks share: the entries of one process, equal ones at the border included."""

from __future__ import annotations

import pytest
import torch
from processes import run
from torch import Tensor

from csae import reference
from csae.distributed import Ranks
from csae.distributed.budget import within_budget

K, SLOTS = 3, 8


def candidates(kind: str) -> tuple[Tensor, Tensor | None]:
    """values [12, SLOTS], each row largest first, and which of the tokens count."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(12, SLOTS, generator=generator).relu()
    mask = None
    if kind == "ties":
        values = (values * 2).round()
    if kind == "few":
        values = values.where(torch.rand(12, SLOTS, generator=generator) < 0.1, 0)
    if kind == "masked":
        mask = torch.rand(12, generator=generator) > 0.3
    if kind == "none counts":
        mask = torch.zeros(12, dtype=torch.bool)
    if kind == "double":
        values = values.double() / 3
    if kind == "small":
        values = values * 1e-40
    values = values.sort(dim=1, descending=True).values
    if kind == "nan":
        values[5] = torch.nan
    return values, mask


def _within(ranks: Ranks | None, kind: str) -> Tensor:
    values, mask = candidates(kind)
    rank, size = ranks.rank, ranks.size
    each = 12 // size
    own = slice(rank * each, (rank + 1) * each)
    return within_budget(values[own], None if mask is None else mask[own], K, ranks.world)


@pytest.mark.parametrize("kind", ["plain", "ties", "few", "masked", "none counts", "double", "small", "nan"])
def test_the_entries_of_one_process(kind: str) -> None:
    values, mask = candidates(kind)
    # An encoder that gives these values: the reference then selects among them.
    wanted, _, _ = reference.batch_topk_encode(
        values, torch.eye(SLOTS).to(values), values.new_zeros(SLOTS), K, SLOTS, mask
    )
    for size in (2, 3):
        found = torch.cat(run(size, _within, kind))
        if mask is not None:
            assert not (found & ~mask.unsqueeze(1)).any()
        assert torch.equal(found, (wanted > 0) | wanted.isnan())
