"""An owner's part of codes: its entries stand at the front, so that gathers stop behind them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from csae.distributed import codes
from csae.distributed.codes import Owners
from csae.ops import sparse_decode
from csae.reference import before_length


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 1 of two, which owns features 5 to 8 of 9; as wide as on a GPU. The tokens of all have their home here."""
    monkeypatch.setattr(codes, "gather", lambda x, group: x.unsqueeze(0))
    return Owners((5, 4), SimpleNamespace(rank=lambda: 1), even=True)  # type: ignore[arg-type]


def test_own_entries_are_before_the_length_and_no_other_row_is_gathered(owner: Owners) -> None:
    torch.manual_seed(0)
    n, k = 30, 4
    indices = torch.rand(n, 9).argsort(dim=1)[:, :k]
    values = torch.rand(n, k).sort(dim=1, descending=True).values
    values[torch.arange(k) >= torch.randint(0, k + 1, (n, 1))] = 0  # ragged rows
    values[3] = math.nan
    mine = (indices >= 5) & (values != 0)
    own = owner.own(values, indices)
    assert own.values.shape == (n, k)  # nothing was asked of the device
    live = before_length(own.values)
    assert torch.equal(live.sum(dim=1), mine.sum(dim=1))
    assert torch.equal(own.rows[live], (indices - 5)[mine])
    torch.testing.assert_close(own.values[live], values[mine], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(own.places[live], torch.arange(k).expand(n, k)[mine])

    # Row 0 is what slots behind the length name: poisoned, it reaches only the tokens that name it.
    table = torch.randn(4, 6)
    table[0] = math.nan
    out = sparse_decode(own.values, own.rows, table)
    named = (mine & (indices == 5)).any(dim=1) | (mine & values.isnan()).any(dim=1)
    assert torch.equal(out.isnan().any(dim=1), named)
