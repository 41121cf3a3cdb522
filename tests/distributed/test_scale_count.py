"""The count of what is sent: against what Linux saw leave the sockets, for every kind of collective."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch.nn.parallel import DistributedDataParallel
from trained import Case, batch, make, share

from csae import Adam
from csae.bench import scale_count
from csae.bench.scale_count import KINDS, Collectives, Sent, purpose, socket_bytes
from csae.distributed import Ranks, sharded

R = 3
NUMBERS = 30_000  # of float32 a rank, a multiple of R
OVERHEAD = 1.01  # gloo's own headers


def collectives() -> dict[str, Callable[[], object]]:
    x = torch.ones(NUMBERS)
    parts = list(x.chunk(R))
    uneven = [NUMBERS // 2, NUMBERS // 4, NUMBERS // 4]
    rank, everyones = dist.get_rank(), [x.clone() for _ in range(R)]
    linear = DistributedDataParallel(torch.nn.Linear(100, 300))

    def exchange(splits: list[int]) -> None:
        got = [splits[rank]] * R
        dist.all_to_all_single(x.new_empty(sum(got)), x, got, splits)

    def around() -> None:
        sending = dist.isend(x, (rank + 1) % R)
        dist.recv(torch.empty_like(x), (rank - 1) % R)
        sending.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(x.clone()),
        "all_gather": lambda: dist.all_gather(everyones, x),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(x.new_empty(R * NUMBERS), x),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty_like(x), x),
        "all_to_all_single, uneven": lambda: exchange(uneven),
        "broadcast": lambda: dist.broadcast(x, 1),
        "scatter": lambda: dist.scatter(parts[0].clone(), parts if rank == 0 else None),
        "gather": lambda: dist.gather(x, everyones if rank == 1 else None, dst=1),
        "send": around,
        "barrier": dist.barrier,
        "DDP": lambda: linear(torch.ones(2, 100)).sum().backward(),
    }


def count(ranks: Ranks | None) -> dict[str, tuple[list[Sent], int]]:
    """By collective: what this rank sent as it is counted, and as Linux saw it."""
    found = {}
    for name, start in collectives().items():
        for _ in range(2):  # DDP does more the first time
            start()
        dist.barrier()
        before = socket_bytes()
        with Collectives(purpose) as counted:
            start()
        dist.barrier()  # all of it has arrived
        after = socket_bytes()
        assert before is not None
        assert after is not None
        found[name] = counted.sent, after - before
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what sockets send")
def test_what_is_counted_is_what_leaves_the_sockets() -> None:
    each = run(R, count)
    whole = 4 * NUMBERS
    for name in each[0]:
        counted = sum(one.bytes for of in each for one in of[name][0])
        seen = sum(of[name][1] for of in each)
        assert counted <= seen <= OVERHEAD * counted + 1000 * R, (name, counted, seen)
    assert each[1]["all_gather"][0] == [Sent("all-gather", "other", 1, 2 * whole)]
    assert [of["all_to_all_single, uneven"][0][0].bytes for of in each] == [whole / 2, whole * 3 / 4, whole * 3 / 4]
    assert each[0]["DDP"][0] == [Sent("all-reduce", "gradients", 1, 2 * 4 * 300 * 101 * 2 / R)]


def _bytes_of_a_step(ranks: Ranks, d_sae: int) -> dict[str, float]:
    case = Case("contextual", {"selection": "jumprelu"}, d_sae=d_sae)
    sae = sharded(lambda: make(case), ranks)
    optimizer = Adam(sae)
    with Collectives(purpose) as counted:
        losses, gradients = sae.gradients(**share(batch(case, 0), ranks))
        optimizer.update(gradients)
        sae.track(losses.code)
    return {each.purpose: each.bytes for each in counted.sent}


@pytest.mark.parametrize("data", [1, 2])
def test_no_gradient_of_a_threshold_travels(data: int) -> None:
    small, large = (run(2 * data, _bytes_of_a_step, d_sae, data=data)[0] for d_sae in (70, 700))
    assert small == large
    assert small["gradients of L0 to all owners"] > 0


@pytest.fixture
def alone(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_collective_that_is_not_known_is_an_error(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_count, "KINDS", {name: KINDS[name] for name in KINDS if "allreduce" not in name})
    with pytest.raises(ValueError, match="c10d::allreduce_: a collective that is not"), Collectives(purpose):
        dist.all_reduce(torch.ones(2))


def test_every_collective_of_torch_is_known() -> None:
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("c10d::")}
    assert names - KINDS.keys() <= {"c10d::allgather_coalesced_", "c10d::check_for_nan"}
