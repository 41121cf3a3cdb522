"""Rows of random tables are the same bits, whether all are drawn at once or some are kept of many blocks."""

from __future__ import annotations

import pytest
import torch

from csae import TopKSAE, tables
from csae.distributed.ranks import split
from csae.tables import owning, random_directions, random_table


@pytest.mark.parametrize("d", [1, 5, 16, 33])
@pytest.mark.parametrize("d_sae", [1, 7, 16, 31, 32, 33, 47, 200, 1001])
def test_blocks_are_parts_of_one_draw(d_sae: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK", 500)
    for draw in (random_table, random_directions):
        torch.manual_seed(1)
        whole, after = draw(d_sae, d), torch.randn(3)
        for rows in split(d_sae, 3):
            torch.manual_seed(1)
            with owning(lambda d_sae, rows=rows: rows):
                found = draw(d_sae, d)
            assert torch.equal(found, whole[rows.start : rows.stop])
            assert torch.equal(torch.randn(3), after)


def test_no_block_is_a_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK", 500)
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size: drawn.append(size) or randn(*size))
    with owning(lambda d_sae: range(40, 50)):
        sae = TopKSAE(16, 1000, 4)
    assert sae.W_dec.shape == sae.W_enc.shape == (10, 16)
    assert sae.b_enc.shape == sae.tokens_since_fired.shape == (10,)
    assert max(rows for rows, _ in drawn) < 64
    assert sum(rows for rows, _ in drawn) == 1000
    assert TopKSAE(16, 30, 4).W_dec.shape == (30, 16)
