"""What travels between ranks: a few functions, the same on gloo (CPUs) and NCCL (GPUs).

Each is called by all ranks of a group, with tensors of equal shapes and dtypes on the group's device. Tensors travel as
bytes, so any dtype can: neither backend takes all of them. Sums are made where they arrive, in the order of ranks, so
they have the same bits on every rank and in every run; the backends' own reductions promise neither.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Up to here one collective of R times the bytes is quicker than two of twice the bytes.
SMALL_BYTES = 1 << 16
# Its name in torch 2.13, and before.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class Coming(NamedTuple):
    """What is on its way from other ranks. What is computed meanwhile runs beside it."""

    work: dist.Work | None
    sent: Tensor
    """held until it has gone"""
    got: Tensor

    def wait(self) -> Tensor:
        """What came. On a GPU the stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.got


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [...] of each rank -> [R, ...], in the order of ranks: an all-gather."""
    return gathering(x, group).wait()


def gathering(x: Tensor, group: ProcessGroup) -> Coming:
    """As `gather`, to be waited for."""
    R = group.size()
    if _is_alone(group) or x.numel() == 0:
        return Coming(None, x, x.unsqueeze(0).expand(R, *x.shape))
    sent = _bytes(x)
    got = sent.new_empty(R * sent.numel())
    work = getattr(dist, ALL_GATHER)(got, sent, group=group, async_op=True)
    return Coming(work, sent, got.view(x.dtype).view(R, *x.shape))


def exchange(parts: Tensor, group: ProcessGroup) -> Tensor:
    """parts [R, ...], the i-th for rank i -> [R, ...], the i-th from rank i: an all-to-all."""
    return exchanging(parts, group).wait()


def exchanging(parts: Tensor, group: ProcessGroup) -> Coming:
    """As `exchange`, to be waited for."""
    if _is_alone(group) or parts.numel() == 0:
        return Coming(None, parts, parts)
    sent = _bytes(parts)
    got = torch.empty_like(sent)
    work = dist.all_to_all_single(got, sent, group=group, async_op=True)
    return Coming(work, sent, got.view(parts.dtype).view(parts.shape))


def sum_home(parts: Tensor, group: ProcessGroup) -> Tensor:
    """parts [R, ...], the i-th for rank i -> the sum [...] of what came for this rank, in the order of ranks.

    A reduce-scatter with a fixed order, of the same bytes. Half precision is summed in float32.
    """
    return in_order(exchange(parts, group))


def total(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [...] of each rank -> their sum [...], in the order of ranks, the same on each: an all-reduce."""
    R = group.size()
    if _is_alone(group):
        return x
    if x.numel() * x.element_size() <= SMALL_BYTES:
        return in_order(gather(x, group))
    most = -(-x.numel() // R)
    padded = torch.nn.functional.pad(x.reshape(-1), (0, R * most - x.numel()))
    return gather(sum_home(padded.view(R, most), group), group).view(-1)[: x.numel()].view(x.shape)


def in_order(parts: Tensor) -> Tensor:
    """parts [R, ...] -> their sum, one after the other. Half precision is summed in float32."""
    if parts.shape[0] == 1:
        return parts[0]
    half = parts.dtype in (torch.bfloat16, torch.float16)
    found = parts[0].float() if half else parts[0].clone()
    for part in parts[1:]:
        found += part
    return found.to(parts.dtype)


def _is_alone(group: ProcessGroup) -> bool:
    return group.size() == 1


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)
