"""The lengths of a look-back's heads: queries and keys have unit length, values a bounded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from csae.kernels import cpu
from csae.kernels.portable import on_native

# What the root mean square of a head's values stays below.
VALUE_BOUND = 4.0


def unit_heads(heads: Tensor, gain: Tensor | None = None) -> Tensor:
    """heads [..., n_heads, d] -> the same with a mean square of one in each head, times its gain; zero stays zero.

    gain: [n_heads]. As queries and keys are normalised in Henry et al. 2020 (arXiv 2010.04245).
    """
    return _Scaled.apply(heads, gain, 1e-6, 1.0)


def bounded_heads(values: Tensor) -> Tensor:
    """values [..., n_heads, d_value] -> the same with a mean square below VALUE_BOUND squared in each head."""
    return _Scaled.apply(values, None, 1.0, VALUE_BOUND**-2)


def value_scale(values: Tensor) -> Tensor:
    """values [..., n_heads, d_value] -> [..., n_heads, 1]: what `bounded_heads` multiplies them with."""
    return _scale(values, 1.0, VALUE_BOUND**-2)


def _scale(heads: Tensor, least: float, weight: float) -> Tensor:
    """(least + weight * mean square)^(-1/2) of each head."""
    wide = torch.promote_types(heads.dtype, torch.float32)
    norms = torch.linalg.vector_norm(heads, dim=-1, keepdim=True, dtype=wide)
    return torch.rsqrt(least + norms.square() * (weight / heads.shape[-1]))


class _Scaled(torch.autograd.Function):
    """heads * _scale(heads) * gain: on a CPU in one pass over memory each way, where autograd would make many."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, gain: Tensor | None, least: float, weight: float) -> Tensor:
        ctx.native = not torch.compiler.is_compiling() and on_native(heads)
        if ctx.native:
            heads = heads.contiguous()
            out, scale = cpu.scale_heads(heads, gain, least, weight)
        else:
            scale = _scale(heads, least, weight)
            out = (heads * scale if gain is None else heads * (scale * gain.unsqueeze(-1))).to(heads.dtype)
        ctx.save_for_backward(heads, gain, scale)
        ctx.weight = weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        heads, gain, scale = ctx.saved_tensors
        if ctx.native:
            d_heads, d_gains = cpu.scale_heads_backward(grad.contiguous(), heads, gain, scale, ctx.weight)
        else:
            d_gains = (grad * heads).sum(dim=-1, keepdim=True) * scale
            factor = scale if gain is None else scale * gain.unsqueeze(-1)
            along = d_gains * (factor * scale * (-ctx.weight / heads.shape[-1]))
            d_heads = torch.addcmul(grad * factor, heads, along).to(heads.dtype)
        return (
            d_heads,
            None if gain is None else d_gains.squeeze(-1).flatten(0, -2).sum(dim=0).to(gain.dtype),
            None,
            None,
        )
