"""Tokens go in pieces: what travels beside what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import run
from torch import Tensor

from csae.distributed import Ranks, codes
from csae.distributed.codes import Owners
from csae.distributed.collectives import Coming


class Log:
    """What began and ended, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def of(self, what: str, begin: Callable[..., Coming]) -> Callable[..., Any]:
        """`begin`, which notes that something is on its way, and that it was waited for."""
        count = 0

        def began(*given: Any) -> Any:
            nonlocal count
            number, count = count, count + 1
            self.events.append(f"{what} {number} begins")
            return Waited(begin(*given), lambda: self.events.append(f"{what} {number} is there"))

        return began


class Waited:
    def __init__(self, coming: Coming, note: Callable[[], None]) -> None:
        self.coming, self.note = coming, note

    def wait(self) -> Tensor:
        found = self.coming.wait()
        self.note()
        return found


def _logged(ranks: Ranks, travels: str) -> list[str]:
    log = Log()
    codes.PIECE = 8  # of two ranks: 4 tokens of each
    codes.gathering = log.of("x", codes.gathering)
    codes.exchanging = log.of(travels, codes.exchanging)
    owners = Owners((5, 5), ranks.features)
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(ranks.rank))
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))

    def encode(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
        log.events.append("product")
        return tuple((x @ table.T).relu().topk(m))  # type: ignore[return-value]

    if travels == "candidates":
        owners.encoded(encode, x, 2)
    else:
        sparse_decode = codes.sparse_decode

        def summed(*given: Any) -> Tensor:
            log.events.append("sums")
            return sparse_decode(*given)

        codes.sparse_decode = summed
        owners.decoded(torch.ones(20, 2), torch.zeros(20, 2, dtype=torch.int64), table)
    return log.events


def test_while_one_piece_is_encoded_the_next_travels() -> None:
    expected = ["x 0 begins"]
    for piece in range(3):
        expected += [f"x {piece + 1} begins"] * (piece < 2) + [f"x {piece} is there", "product"]
        expected += [f"candidates {piece} begins"]
    expected += [f"candidates {piece} is there" for piece in range(3)]
    assert run(2, _logged, "candidates") == [expected] * 2


def test_while_sums_of_one_piece_travel_the_next_are_made() -> None:
    expected = [event for piece in range(3) for event in ("sums", f"home {piece} begins")]
    expected += [f"home {piece} is there" for piece in range(3)]
    assert run(2, _logged, "home") == [expected] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_message_of_one_token(dtype: torch.dtype) -> None:
    values, indices = torch.tensor([[3.0, 2.0, 1.0]], dtype=dtype), torch.tensor([[7, 2**31 - 1, 0]])
    found = codes._unpacked(codes._packed(values, indices), dtype)
    assert found[0].equal(values)
    assert found[1].equal(indices)
