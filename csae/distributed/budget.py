"""A budget of features that the tokens of all ranks share: which of their candidates are the largest of all.

Positive floating-point numbers are in the order of their bits, read as whole numbers. So the smallest value within the
budget is found a byte at a time: each rank counts the values that begin as it does, by their next byte, and the counts
are added up. That is a message of 2 KB for each byte of a value, however many tokens there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from csae.distributed.collectives import gather, total


def within_budget(values: Tensor, mask: Tensor | None, k: int, group: ProcessGroup) -> Tensor:
    """[n, k_max] bool: which values [n, k_max] at home are among the N k largest positive ones of all ranks.

    N is the number of tokens of all ranks, or of those in their masks [n] bool. Of equal ones at the border those of
    lower ranks come first, then of lower tokens, then of lower slots. NaN is within, and takes none of the budget.
    """
    counts = values > 0
    tokens = torch.full((), len(values), device=values.device)
    if mask is not None:
        counts, tokens = counts & mask.unsqueeze(-1), mask.sum()
    whole = torch.int32 if values.dtype == torch.float32 else torch.int64
    bits = torch.where(counts, values.contiguous().view(whole).long(), -1)
    left = total(tokens, group) * k
    begins = torch.zeros_like(left)  # the bytes that are known, of the smallest value within
    for shift in range(8 * (whole.itemsize - 1), -1, -8):
        alike = (bits >= 0) & (bits >> (shift + 8) == begins)
        byte = torch.where(alike, (bits >> shift) & 255, 256).flatten()
        found = torch.zeros(257, dtype=torch.int64, device=values.device)
        found = total(found.scatter_add_(0, byte, torch.ones_like(byte))[:-1], group)
        larger = found.flip(0).cumsum(0).flip(0) - found
        chosen = (larger >= left).sum().clamp_max(255)  # the least byte with fewer larger ones than the budget has left
        left = left - larger[chosen]
        begins = begins * 256 + chosen
    equal = (bits == begins) & counts
    of_ranks = gather(equal.sum(), group)
    before = of_ranks[: group.rank()].sum()
    first = (equal.flatten().cumsum(0).view_as(equal) + before) <= left
    return (bits > begins) | (equal & first) | values.isnan()
