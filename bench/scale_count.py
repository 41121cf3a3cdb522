"""The bytes that a rank sends: of each collective, intercepted; and of its sockets, as Linux counted them.

torch sends every collective through an operator of `c10d`, DDP's buckets included. `Collectives` is a dispatch mode
that sees them. A collective of a kind that it doesn't know is an error: nothing passes uncounted.

A payload of S bytes among g ranks costs each of them, by the algorithms that move the fewest bytes (rings, as NCCL's
and gloo's; nccl-tests, doc/PERFORMANCE.md): all-gather of S each S (g-1); all-to-all S (g-1) / g; reduce-scatter
S (g-1) / g; all-reduce 2 S (g-1) / g. `socket_bytes` knows nothing of that.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TCP_INFO_BYTES_SENT = 200
"""where linux/tcp.h has tcpi_bytes_sent and tcpi_bytes_retrans (since Linux 4.19): payload sent, and sent again"""


class Sent(NamedTuple):
    """Collectives of one kind, for one purpose."""

    kind: str
    """all-gather, all-to-all, ..."""
    purpose: str
    """the function that asked for them"""
    calls: int
    bytes: float
    """sent by this rank"""


class Collectives(TorchDispatchMode):
    """Counts the collectives that are started in a `with` block by this thread, and in autograd's threads for it.

    purpose: names what a collective is for, from its kind and the innermost frame of Python that asked for it.
    """

    def __init__(self, purpose: Callable[[str, FrameType], str]) -> None:
        super().__init__()
        self.purpose = purpose
        self.found: dict[tuple[str, str], tuple[int, float]] = {}

    @property
    def sent(self) -> list[Sent]:
        """The largest first."""
        counts = [Sent(*which, *counted) for which, counted in self.found.items()]
        return sorted(counts, key=lambda each: (-each.bytes, each.kind, each.purpose))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "symm_mem", "_c10d_functional", "_c10d_functional_autograd"):
            names = [argument.name for argument in func._schema.arguments]
            self._count(func.namespace, func._schema.name, dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs)

    def _count(self, namespace: str, name: str, given: dict[str, Any]) -> None:
        known = KINDS.get(name)
        if known is None:
            raise ValueError(f"{name}: a collective that is not counted; needed one of {', '.join(KINDS)}")
        group = dist.ProcessGroup.unbox(given["process_group"])
        sent = known.sent(given, group.size(), group.rank())
        which = known.kind, self.purpose(known.kind, sys._getframe(2))
        calls, so_far = self.found.get(which, (0, 0.0))
        self.found[which] = calls + 1, so_far + sent


class Kind(NamedTuple):
    """An operator of c10d."""

    kind: str
    sent: Callable[[dict[str, Any], int, int], float]
    """its arguments, the group's size, this rank's number in it -> bytes that this rank sends"""


def _size(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in lists of lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(tensor) for tensor in tensors)


def _to_others(given: dict[str, Any], size: int, rank: int) -> float:
    """An all-to-all of one tensor: all of it but this rank's own part."""
    splits, whole = given["input_split_sizes"], _size(given["input"])
    if not splits:
        return whole * (size - 1) / size
    rows = sum(splits)
    return whole * (rows - splits[rank]) / rows if rows else 0.0


def _list_to_others(given: dict[str, Any], size: int, rank: int) -> float:
    return float(sum(_size(part) for to, part in enumerate(given["input_tensors"]) if to != rank))


def _from_root(of: str, share: Callable[[int], float]) -> Callable[[dict[str, Any], int, int], float]:
    return lambda given, size, rank: _size(given[of]) * share(size) if rank == given["root_rank"] else 0.0


KINDS = {
    "c10d::allreduce_": Kind("all-reduce", lambda given, g, rank: 2 * _size(given["tensors"]) * (g - 1) / g),
    "c10d::allreduce_coalesced_": Kind("all-reduce", lambda given, g, rank: 2 * _size(given["tensors"]) * (g - 1) / g),
    "c10d::allgather_": Kind("all-gather", lambda given, g, rank: _size(given["input_tensors"]) * (g - 1)),
    "c10d::_allgather_base_": Kind("all-gather", lambda given, g, rank: _size(given["input_tensor"]) * (g - 1)),
    "c10d::allgather_into_tensor_coalesced_": Kind(
        "all-gather", lambda given, g, rank: _size(given["inputs"]) * (g - 1)
    ),
    "c10d::reduce_scatter_": Kind("reduce-scatter", lambda given, g, rank: _size(given["input_tensors"]) * (g - 1) / g),
    "c10d::_reduce_scatter_base_": Kind(
        "reduce-scatter", lambda given, g, rank: _size(given["input_tensor"]) * (g - 1) / g
    ),
    "c10d::reduce_scatter_tensor_coalesced_": Kind(
        "reduce-scatter", lambda given, g, rank: _size(given["inputs"]) * (g - 1) / g
    ),
    "c10d::alltoall_base_": Kind("all-to-all", _to_others),
    "c10d::alltoall_": Kind("all-to-all", _list_to_others),
    "c10d::broadcast_": Kind("broadcast", _from_root("tensors", lambda g: g - 1)),
    "c10d::scatter_": Kind("scatter", _from_root("input_tensors", lambda g: (g - 1) / g)),
    "c10d::gather_": Kind(
        "gather", lambda given, g, rank: 0.0 if rank == given["root_rank"] else _size(given["input_tensors"])
    ),
    "c10d::reduce_": Kind(
        "reduce", lambda given, g, rank: 0.0 if rank == given["root_rank"] else _size(given["tensors"])
    ),
    "c10d::send": Kind("send", lambda given, g, rank: _size(given["tensors"])),
    "c10d::recv_": Kind("send", lambda given, g, rank: 0.0),
    "c10d::recv_any_source_": Kind("send", lambda given, g, rank: 0.0),
    "c10d::barrier": Kind("barrier", lambda given, g, rank: 0.0),
    "c10d::monitored_barrier_": Kind("barrier", lambda given, g, rank: 0.0),
}


def socket_bytes() -> int | None:
    """Bytes that this process has sent by its open TCP sockets, as Linux counted them; None on other systems."""
    if sys.platform != "linux":
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                    continue
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed since it was listed
            continue
        if len(info) < TCP_INFO_BYTES_SENT + 16:
            return None  # an older Linux
        sent, again = struct.unpack_from("QQ", info, TCP_INFO_BYTES_SENT)
        total += sent - again
    return total


PURPOSES = {
    "codes.py:Owners.encoded all-gather": "x to all owners",
    "trace.py:ShardedTrace._everyone": "x to all owners",
    "codes.py:Owners.encoded all-to-all": "candidates home",
    "codes.py:Owners.again": "candidates home",
    "codes.py:Owners.own": "codes to all owners",
    "trace.py:_Decoded.forward": "sums of rows home",
    "trace.py:_Decoded.backward": "gradients of sums to all owners",
    "trace.py:ShardedTrace._rows_of": "gradients of sums to all owners",
    "trace.py:_Counted.backward": "gradients of L0 to all owners",
    "trace.py:_Encoded.backward": "gradients of x home",
    "trace.py:ShardedTrace._summed": "gradients of replicated parameters",
    "trace.py:ShardedTrace._over_rows": "gradients of replicated parameters",
    "trace.py:_Total.forward": "sums of the loss",
    "shard.py:Shard.fired": "features that fired",
    "shard.py:Shard.owners_of_dead": "which features are dead",
    "graph.py:_engine_run_backward": "gradients",  # DDP starts its all-reduces from C++
    "scale_steps.py:ddp_sparsify.<locals>.over_ranks": "features that fired, and the FVU",
}
"""what a collective is for, by the innermost of these functions on the stack: "file:function", or with its kind"""


def purpose(kind: str, frame: FrameType | None) -> str:
    """What a collective is for that is asked for here: of PURPOSES, or a function of csae.distributed by its name."""
    own = None
    while frame is not None:
        where, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        here = f"{where.name}:{name}"
        found = PURPOSES.get(here) or PURPOSES.get(f"{here} {kind}")
        if found is not None:
            return found
        ours = where.parts[-3:-1] == ("csae", "distributed")
        if own is not None and not ours:
            return own
        if ours and own is None and where.name != "collectives.py":
            own = here
        frame = frame.f_back
    return own or "other"
