"""What travels between ranks: four functions, the same on gloo (CPUs) and NCCL (GPUs).

Each is called by all ranks of a group, with tensors of equal shapes and dtypes on the group's device. Tensors travel as
bytes, so any dtype can: neither backend takes all of them. Sums are made where they arrive, in the order of ranks, so
they have the same bits on every rank and in every run; the backends' own reductions promise neither.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Up to here one collective of R times the bytes is quicker than two of twice the bytes.
SMALL_BYTES = 1 << 16
# Its name in torch 2.13, and before.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [...] of each rank -> [R, ...], in the order of ranks: an all-gather."""
    R = group.size()
    if R == 1 or x.numel() == 0:
        return x.unsqueeze(0).expand(R, *x.shape)
    sent = _bytes(x)
    got = sent.new_empty(R * sent.numel())
    getattr(dist, ALL_GATHER)(got, sent, group=group)
    return got.view(x.dtype).view(R, *x.shape)


def exchange(parts: Tensor, group: ProcessGroup) -> Tensor:
    """parts [R, ...], the i-th for rank i -> [R, ...], the i-th from rank i: an all-to-all."""
    if group.size() == 1 or parts.numel() == 0:
        return parts
    sent = _bytes(parts)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got.view(parts.dtype).view(parts.shape)


def sum_home(parts: Tensor, group: ProcessGroup) -> Tensor:
    """parts [R, ...], the i-th for rank i -> the sum [...] of what came for this rank, in the order of ranks.

    A reduce-scatter with a fixed order, of the same bytes. Half precision is summed in float32.
    """
    return _sum(exchange(parts, group))


def total(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [...] of each rank -> their sum [...], in the order of ranks, the same on each: an all-reduce."""
    R = group.size()
    if R == 1:
        return x
    if x.numel() * x.element_size() <= SMALL_BYTES:
        return _sum(gather(x, group))
    most = -(-x.numel() // R)
    padded = torch.nn.functional.pad(x.reshape(-1), (0, R * most - x.numel()))
    return gather(sum_home(padded.view(R, most), group), group).view(-1)[: x.numel()].view(x.shape)


def _sum(parts: Tensor) -> Tensor:
    """parts [R, ...] -> their sum, one after the other."""
    if parts.shape[0] == 1:
        return parts[0]
    half = parts.dtype in (torch.bfloat16, torch.float16)
    found = parts[0].float() if half else parts[0].clone()
    for part in parts[1:]:
        found += part
    return found.to(parts.dtype)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)
