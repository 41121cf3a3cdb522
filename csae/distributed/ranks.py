"""Ranks: which process this is among those that torchrun started, and which features' rows it owns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from csae.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """What a rank knows of the others. The world is a mesh of n_data rows of n_features ranks each."""

    rank: int
    """its number in the world"""
    size: int
    """how many there are in the world"""
    world: ProcessGroup
    hosts: ProcessGroup
    """the world as well, by gloo: for what lies on the hosts, such as Python objects (`csae.distributed.agreement`)"""
    features: ProcessGroup
    """the ranks that own other features' rows, this one included: together they hold the whole SAE"""
    data: ProcessGroup
    """this rank's replicas, this one included: they own the same rows"""
    files: ProcessGroup
    """all ranks on gloo, apart from the training's groups: a thread that writes files may use it meanwhile"""
    n_features: int
    feature_rank: int
    n_data: int
    data_rank: int
    device: torch.device
    mesh: DeviceMesh
    """of shape [n_data, n_features], its dimensions named "data" and "features\""""

    def rows(self, d_sae: int) -> range:
        """The features whose rows this rank owns; none where there are fewer features than ranks."""
        return split(d_sae, self.n_features)[self.feature_rank]


def split(n: int, parts: int) -> list[range]:
    """n rows in as many parts, as `DTensor` with `Shard(0)` splits them (torch.chunk); the last ones may be empty."""
    most = -(-n // parts)
    return [range(min(n, part * most), min(n, (part + 1) * most)) for part in range(parts)]


@contextmanager
def joined(device: str | None, timeout_s: float, data: int = 1) -> Iterator[Ranks | None]:
    """The ranks, where torchrun started several; None in one process.

    Args:
        device: "cuda" or "cpu"; cuda where there is one if not given. A rank takes the GPU of its LOCAL_RANK.
        timeout_s: seconds after which a collective that others don't join fails.
        data: how many replicas of the SAE train side by side.

    Raises UserError where a rank has no GPU of its own, or the ranks can't be split into so many replicas.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size <= 1:
        yield None
        return
    if data < 1 or size % data:
        raise UserError(f"data: given {data} replicas; needed a divisor of the {size} processes that torchrun started")
    own = _own_device(device)
    backend = "nccl" if own.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    device_id = own if own.type == "cuda" else None
    store = _store_of_this_start(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        rank = int(os.environ["RANK"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    yield ranks_of_world(own, timeout, data)
    # Not after an error: NCCL may wait here for ranks that are gone. The end of the process closes all connections.
    dist.destroy_process_group()


def ranks_of_world(device: torch.device, timeout: timedelta, data: int = 1) -> Ranks:
    """The ranks of a process group that exists, in so many replicas. All ranks call it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    n_features = size // data
    mesh = torch.arange(size).view(data, n_features)
    # Other groups would have a timeout of their own. All ranks make all groups, in the same order.
    rows = [_group(of, size, timeout) for of in mesh.tolist()]
    columns = [_group(of, size, timeout) for of in mesh.T.tolist()]
    data_rank, feature_rank = divmod(rank, n_features)
    groups = columns[feature_rank], rows[data_rank]
    named = DeviceMesh.from_group(list(groups), device.type, mesh=mesh, mesh_dim_names=("data", "features"))
    return Ranks(
        rank=rank,
        size=size,
        world=_group(list(range(size)), size, timeout),
        hosts=dist.new_group(backend="gloo", timeout=timeout),
        features=groups[1],
        data=groups[0],
        files=dist.new_group(backend="gloo", timeout=timeout),
        n_features=n_features,
        feature_rank=feature_rank,
        n_data=data,
        data_rank=data_rank,
        device=device,
        mesh=named,
    )


def _group(members: list[int], size: int, timeout: timedelta) -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world if len(members) == size else dist.new_group(members, timeout=timeout)


def _store_of_this_start(timeout: timedelta) -> dist.Store | None:
    """What torchrun keeps for its processes; None where it does not.

    It keeps the same for those that it starts again, with the addresses of those before: torch 2.13 would connect to
    them. So each start has names of its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", kept)


def _own_device(device: str | None) -> torch.device:
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise UserError(f"device: given {kind}; needed cuda or cpu: torchrun's processes take a GPU each")
    if kind == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK") or 0)
    if local >= torch.cuda.device_count():
        raise UserError(
            f"device: {torch.cuda.device_count()} GPUs for process {local} of this machine; needed one for each: "
            "torchrun --nproc-per-node with as many as there are"
        )
    own = torch.device("cuda", local)
    torch.cuda.set_device(own)
    return own
