"""The fraction of variance unexplained of a batch, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def fvu(x: Tensor, decoded: Tensor, c: Tensor | None, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, decoded, c [n, d], bias [d], weight [n] -> fvu, the spread of x, and the residual [n, d]."""
    residual = x - (decoded if c is None else decoded.to(x.dtype) + c) - bias
    mean = (x * weight.unsqueeze(-1)).sum(dim=0) / weight.sum().clamp_min(1)
    spread = ((x - mean).square().sum(dim=-1) * weight).sum()
    return (residual.square().sum(dim=-1) * weight).sum() / spread, spread, residual


def fvu_backward(
    d_fvu: Tensor, of_x: Tensor, residual: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """From the gradient of fvu, a scalar, and what `fvu` gave: that of decoded and c [n, d] in `dtype`, of bias [d]."""
    d_out = residual * (weight * (-2 * d_fvu / of_x)).unsqueeze(-1)
    return d_out.to(dtype), d_out.sum(dim=0)
