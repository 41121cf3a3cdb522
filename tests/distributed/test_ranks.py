"""Ranks and what travels between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run
from torch.distributed.tensor import Shard, distribute_tensor

from csae.distributed import Ranks, joined
from csae.distributed.collectives import SMALL_BYTES, exchange, gather, sum_home, total
from csae.distributed.ranks import split
from csae.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)


def _collect(ranks: Ranks | None) -> Any:
    if ranks is None:
        return None
    me, R = ranks.feature_rank, ranks.n_features
    group = ranks.features
    for dtype in DTYPES:
        x = torch.arange(6).view(2, 3).T.to(dtype) + me  # not contiguous
        x = x.bool() if dtype == torch.bool else x
        everyone = gather(x, group)
        assert everyone.dtype == dtype
        assert everyone.shape == (R, 3, 2)
        assert torch.equal(everyone[me], x)
        parts = torch.stack([x + 10 * of for of in range(R)]).to(dtype)
        got = exchange(parts, group)
        assert got.dtype == dtype
        assert torch.equal(got[me], parts[me])
    assert gather(torch.tensor(float(me)), group).tolist() == list(range(R))
    assert gather(torch.zeros(0, 3), group).shape == (R, 0, 3)
    from_each = exchange(torch.tensor([[100 * me + of] for of in range(R)]), group)
    assert from_each[:, 0].tolist() == [100 * of + me for of in range(R)]

    torch.manual_seed(0)  # the same on all ranks
    numbers = torch.randn(R, R, 1000)
    expected = numbers[0, me].clone()
    for of in range(1, R):
        expected += numbers[of, me]
    assert torch.equal(sum_home(numbers[me], group), expected)
    for n in (7, SMALL_BYTES // 4 + 5):  # both ways
        numbers = torch.randn(R, n)
        expected = numbers[0].clone()
        for of in range(1, R):
            expected += numbers[of]
        assert torch.equal(total(numbers[me], group), expected)
    assert torch.equal(total(torch.tensor(2), group), torch.tensor(2 * R))
    return ranks.rank, ranks.size, ranks.data_rank, ranks.feature_rank, list(ranks.rows(10))


def test_collectives() -> None:
    rows = [list(of) for of in split(10, 3)]
    assert run(3, _collect) == [(of, 3, 0, of, rows[of]) for of in range(3)]


def test_collectives_of_replicas() -> None:
    halves = [list(range(5)), list(range(5, 10))]
    assert run(4, _collect, data=2) == [(of, 4, of // 2, of % 2, halves[of % 2]) for of in range(4)]


def test_one_process_has_no_ranks() -> None:
    assert run(1, _collect) == [None]


def _rows_as_dtensor(ranks: Ranks, d_sae: int) -> None:
    table = torch.arange(d_sae).float()
    own = distribute_tensor(table, ranks.mesh["features"], [Shard(0)]).to_local()
    assert own.tolist() == list(ranks.rows(d_sae))


@pytest.mark.parametrize("d_sae", [7, 8, 2])
def test_rows_are_split_as_dtensor_splits_them(d_sae: int) -> None:
    run(3, _rows_as_dtensor, d_sae)


def test_split_covers_all() -> None:
    for n in range(12):
        for parts in range(1, 6):
            found = split(n, parts)
            assert len(found) == parts
            assert [row for rows in found for row in rows] == list(range(n))


def test_replicas_that_do_not_divide_the_world_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="data: given 2 replicas; needed a divisor of the 3"), joined("cpu", 5, data=2):
        pass
    with pytest.raises(UserError, match="device: given mps; needed cuda or cpu"), joined("mps", 5):
        pass
