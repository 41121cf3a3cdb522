"""What an SAE's training loss is made of: sums over the positions of a batch, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from csae.ops.fvu import fused, fvu

Total = Callable[[Tensor], Tensor]
"""the sum of a tensor over all processes that share the batch"""


def here(x: Tensor) -> Tensor:
    """`Total` where one process has the whole batch."""
    return x


def fraction_unexplained(x: Tensor, residual: Tensor, weight: Tensor, total: Total = here) -> Tensor:
    """FVU, a scalar: x and what is missed of it [..., d_in], each position by its weight [...]."""
    return _share(energy(residual, weight), x, weight, total)


def unexplained(x: Tensor, parts: tuple[Tensor, ...], weight: Tensor, total: Total = here) -> tuple[Tensor, Tensor]:
    """FVU, a scalar, of x [..., d] and its reconstruction; and what is missed of it, without a gradient.

    parts: what adds up to the reconstruction (`Ran.parts`).
    """
    if total is here and fused(x, parts, weight):
        return fvu(x, parts, weight)
    x_hat = added(parts)
    if torch.compiler.is_compiling():  # it derives the backward pass by itself, and fuses it
        residual = x - x_hat
        return fraction_unexplained(x, residual, weight, total), residual.detach()
    missed, residual = _Missed.apply(x, x_hat, weight)  # type: ignore[no-untyped-call]
    return _share(missed, x, weight, total), residual


def added(parts: tuple[Tensor, ...]) -> Tensor:
    """The sum of the parts, in their order."""
    return reduce(torch.add, parts)


def spread(x: Tensor, weight: Tensor, total: Total = here) -> Tensor:
    """Sum of squares of x [..., d_in] less its mean over all processes, each position here by its weight [...]."""
    return energy(x - _mean(x, weight, total), weight)


def energy(x: Tensor, weight: Tensor) -> Tensor:
    """Sum of squares of x [..., d_in], each position by its weight [...]; in weight's dtype, if that is wider."""
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    return (x.square().sum(dim=-1) * weight).sum()


def _share(missed: Tensor, x: Tensor, weight: Tensor, total: Total) -> Tensor:
    """What is missed, as a share of the spread of x; both summed over all processes."""
    of_x = spread(x, weight, total)
    if total is here:
        return missed / of_x
    missed, of_x = total(torch.stack([missed, of_x]))
    return missed / of_x


def _mean(x: Tensor, weight: Tensor, total: Total) -> Tensor:
    """Mean [d_in] of x [..., d_in] over its positions, by weight [...]."""
    sums, positions = (x * weight.unsqueeze(-1)).reshape(weight.numel(), x.shape[-1]).sum(dim=0), weight.sum()
    if total is not here:
        everywhere = total(torch.cat([sums, positions.to(sums.dtype).view(1)]))
        sums, positions = everywhere[:-1], everywhere[-1]
    return sums / positions.clamp_min(1)


class _Missed(Function):
    """x, x_hat [..., d], weight [...] -> the energy of x - x_hat, and x - x_hat; in fewer passes than autograd takes.

    energy = sum over positions of weight * |x - x_hat|^2        d x_hat = -2 weight (x - x_hat) d energy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        residual = x - x_hat
        ctx.save_for_backward(residual, weight)
        ctx.mark_non_differentiable(residual)
        ctx.set_materialize_grads(False)  # of residual, which has none
        ctx.dtypes = x.dtype, x_hat.dtype
        return energy(residual, weight), residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_energy: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if d_energy is None:
            return None, None, None
        residual, weight = ctx.saved_tensors
        d_x_hat = residual * (weight * (-2 * d_energy)).unsqueeze(-1)
        of_x, of_x_hat = ctx.dtypes
        d_x = -d_x_hat.to(of_x) if ctx.needs_input_grad[0] else None
        return d_x, d_x_hat.to(of_x_hat) if ctx.needs_input_grad[1] else None, None
