"""Ranks that should have the same numbers, and don't."""

from __future__ import annotations

import pytest
import torch
from processes import run
from trained import Case, make

from csae import Adam
from csae.distributed import Ranks, check_replicas, sharded
from csae.distributed import replicas as module
from csae.distributed.replicas import checksum
from csae.errors import UserError


def _changed(ranks: Ranks, name: str, on: int) -> str:
    sae = sharded(lambda: make(Case(sae={"selection": "jumprelu"})), ranks)
    optimizer = Adam(sae)
    check_replicas(sae, optimizer)
    tensors = dict(sae.state_dict()) | {"moment": optimizer.state[sae.W_enc]["exp_avg_sq"]}
    if ranks.rank == on:
        tensors[name].view(-1)[-1:] += 1
    with pytest.raises(UserError) as error:
        check_replicas(sae, optimizer)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "on", "message"),
    [
        ("W_dec", 3, "W_dec: ranks 1 and 3 should have the same numbers"),
        ("W_dec", 0, "W_dec: ranks 0 and 2 should have the same numbers"),
        ("b_dec", 1, "b_dec: ranks 0 and 1 should have the same numbers"),
        ("tokens_since_fired", 2, "tokens_since_fired: ranks 0 and 2"),
        ("threshold", 3, "threshold: ranks 1 and 3"),
        ("moment", 2, "W_enc.exp_avg_sq: ranks 0 and 2"),
    ],
)
def test_a_difference_is_one_line_on_all_ranks(name: str, on: int, message: str) -> None:
    messages = run(4, _changed, name, on, data=2)
    assert len(set(messages)) == 1
    assert messages[0].startswith(message)


def test_checksums_see_each_bit_and_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = torch.arange(1000).to(dtype)
        whole = checksum(x)
        monkeypatch.setattr(module, "BLOCK", 77)
        assert checksum(x) == whole
        monkeypatch.undo()
        if dtype != torch.bool:
            assert checksum(x.flip(0)) != whole
        other = x.clone()
        other.view(torch.uint8)[501] ^= 1
        assert checksum(other) != whole
    assert checksum(torch.zeros(0)) == 0
    assert checksum(torch.tensor(1.0)) != 0
