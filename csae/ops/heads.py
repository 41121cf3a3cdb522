"""RMSNorm of a look-back's heads: queries and keys get a mean square of one, values a bounded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from csae.kernels.portable import scaled_heads

from .backend import fake, gradient, kernels, no_gradient, operator
from .checks import refuse_tangents

# What the root mean square of a head's values stays below.
VALUE_BOUND = 4.0
# A head is multiplied by (least + weight * mean square)^(-1/2), with this least and weight.
UNIT, BOUNDED = (1e-6, 1.0), (1.0, VALUE_BOUND**-2)


def unit_heads(heads: Tensor, gain: Tensor | None = None) -> Tensor:
    """RMSNorm of each head: heads [..., n_heads, d] -> heads / sqrt(1e-6 + mean(heads^2)) * gain, of the same shape.

    gain: [n_heads], 1 if not given. As queries and keys are normalised in Henry et al. 2020 (arXiv 2010.04245).
    """
    return _scaled(heads, gain, *UNIT)


def bounded_heads(values: Tensor) -> Tensor:
    """values [..., n_heads, d_value] -> values / sqrt(1 + mean(values^2) / VALUE_BOUND^2), of the same shape.

    The root mean square of each head is below VALUE_BOUND; small values stay as they are.
    """
    return _scaled(values, None, *BOUNDED)


def value_scale(values: Tensor) -> Tensor:
    """values [..., n_heads, d_value] -> [..., n_heads, 1]: what `bounded_heads` multiplies them with."""
    return scaled_heads.head_scale(values, *BOUNDED)


def _scaled(heads: Tensor, gain: Tensor | None, least: float, weight: float) -> Tensor:
    refuse_tangents(heads, gain)
    if heads.device.type == "cpu" or not torch.compiler.is_compiling():  # not `place`, which a compiler can't trace
        return _scale_heads(heads, gain, least, weight)[0]
    return _Scaled.apply(heads, gain, least, weight)


class _Scaled(torch.autograd.Function):
    """For a compiler on a GPU: plain PyTorch, which it may fuse, with a shorter backward pass than autograd finds."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, gain: Tensor | None, least: float, weight: float) -> Tensor:
        out, scale = scaled_heads.scale_heads(heads, gain, least, weight)
        ctx.save_for_backward(heads, gain, scale)
        ctx.weight = weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        heads, gain, scale = ctx.saved_tensors
        d_heads, d_gain = scaled_heads.scale_heads_backward(grad, heads, gain, scale, ctx.weight)
        return d_heads, None if gain is None else d_gain, None, None


@operator("scale_heads")
def _scale_heads(heads: Tensor, gain: Tensor | None, least: float, weight: float) -> tuple[Tensor, Tensor]:
    by = kernels("scaled_heads", heads.device, heads.dtype)
    out, scale = by.scale_heads(heads, gain, least, weight)
    return out.contiguous(), scale.contiguous()


@fake("scale_heads")
def _(heads, gain, least, weight):
    wide = torch.promote_types(heads.dtype, torch.float32)
    return heads.new_empty(heads.shape), heads.new_empty(*heads.shape[:-1], 1, dtype=wide)


@operator("scale_heads_backward")
def _scale_heads_backward(
    grad: Tensor, heads: Tensor, gain: Tensor | None, scale: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    by = kernels("scaled_heads", heads.device, heads.dtype)
    d_heads, d_gain = by.scale_heads_backward(grad, heads, gain, scale, weight)
    return d_heads.contiguous(), d_gain


@fake("scale_heads_backward")
def _(grad, heads, gain, scale, weight):
    return heads.new_empty(heads.shape), (scale if gain is None else gain).new_empty(heads.shape[-2])


no_gradient("scale_heads_backward")


def _setup_context(ctx, inputs, output):
    heads, gain, _, weight = inputs
    _, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)  # of scale, which has none
    ctx.save_for_backward(heads, gain, scale)
    ctx.weight = weight


def _backward(ctx, grad, _grad_scale):
    """With out = heads * scale * gain, scale = (least + weight * mean(heads^2))^(-1/2), grad = d loss / d out:

    d heads = grad * scale * gain - heads * <grad, heads> * gain * scale^3 * weight / d
    d gain  = sum over tokens of <grad, heads> * scale
    """
    if grad is None:
        return None, None, None, None
    heads, gain, scale = ctx.saved_tensors
    d_heads, d_gain = _scale_heads_backward(grad, heads, gain, scale, ctx.weight)
    return d_heads, None if gain is None else d_gain, None, None


gradient("scale_heads", _setup_context, _backward)
