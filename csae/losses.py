"""What an SAE's training loss is made of: sums over the positions of a batch, wherever they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""the sum of a tensor over all processes that share the batch"""


def here(x: Tensor) -> Tensor:
    """`Total` where one process has the whole batch."""
    return x


def fraction_unexplained(x: Tensor, residual: Tensor, weight: Tensor, total: Total = here) -> Tensor:
    """FVU, a scalar: x and what is missed of it [..., d_in], each position by its weight [...]."""
    missed, of_x = total(torch.stack([energy(residual, weight), spread(x, weight, total)]))
    return missed / of_x


def spread(x: Tensor, weight: Tensor, total: Total = here) -> Tensor:
    """Sum of squares of x [..., d_in] less its mean over all processes, each position here by its weight [...]."""
    return energy(x - _mean(x, weight, total), weight)


def energy(x: Tensor, weight: Tensor) -> Tensor:
    """Sum of squares of x [..., d_in], each position by its weight [...]; in weight's dtype, if that is wider."""
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    return (x.square().sum(dim=-1) * weight).sum()


def _mean(x: Tensor, weight: Tensor, total: Total) -> Tensor:
    """Mean [d_in] of x [..., d_in] over its positions, by weight [...]."""
    sums = (x * weight.unsqueeze(-1)).flatten(0, -2).sum(dim=0)
    everywhere = total(torch.cat([sums, weight.sum().to(sums.dtype).view(1)]))
    return everywhere[:-1] / everywhere[-1].clamp_min(1)
