"""fvu: the fraction of variance unexplained of a batch by a sum of parts, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import fake, gradient, kernels, no_gradient, operator, place


def fused(x: Tensor, parts: tuple[Tensor, ...], weight: Tensor) -> bool:
    """Whether `fvu` has kernels for these, which take fewer launches than PyTorch's operations."""
    *sums, bias = parts
    dtypes = {of.dtype for of in sums}
    return (
        not torch.compiler.is_compiling()
        and x.numel() > 0
        and not x.requires_grad
        and 1 <= len(sums) <= 2
        and bias.dim() == 1
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16}
        and {x.dtype, bias.dtype, weight.dtype} == {torch.float32}
        and place("fvu", x.device, x.dtype) == "triton"
    )


def fvu(x: Tensor, parts: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the sum of the parts leaves of x's variance, a scalar; and x less that sum, without a gradient.

        residual = x - (decoded + c + bias)
        fvu      = sum_t weight_t |residual_t|^2 / sum_t weight_t |x_t - mean|^2        mean: of x, by weight

    Args:
        x: [..., d] float32. It gets no gradient.
        parts: decoded [..., d], c [..., d] if there is one, in decoded's dtype, and bias [d] float32.
        weight: [...] float32.
    """
    decoded, *c, bias = parts
    share, _, residual = _fvu(x, decoded, c[0] if c else None, bias, weight)
    return share, residual


@operator("fvu")
def _fvu(x: Tensor, decoded: Tensor, c: Tensor | None, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = [None if of is None else of.reshape(x.shape[:-1].numel(), bias.shape[0]) for of in (x, decoded, c)]
    share, of_x, residual = kernels("fvu", x.device, x.dtype).fvu(*rows, bias, weight.reshape(-1))
    return share, of_x, residual.view(x.shape)


@fake("fvu")
def _(x, decoded, c, bias, weight):
    return x.new_empty(()), x.new_empty(()), x.new_empty(x.shape)


@operator("fvu_backward")
def _fvu_backward(
    d_fvu: Tensor, of_x: Tensor, residual: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows = residual.reshape(residual.shape[:-1].numel(), residual.shape[-1])
    by = kernels("fvu", residual.device, residual.dtype)
    d_out, d_bias = by.fvu_backward(d_fvu, of_x, rows, weight.reshape(-1), dtype)
    return d_out.view(residual.shape), d_bias


@fake("fvu_backward")
def _(d_fvu, of_x, residual, weight, dtype):
    return residual.new_empty(residual.shape, dtype=dtype), residual.new_empty(residual.shape[-1])


no_gradient("fvu_backward")


def _setup_context(ctx, inputs, output):
    _, decoded, c, _, weight = inputs
    _, of_x, residual = output
    ctx.mark_non_differentiable(of_x, residual)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(of_x, residual, weight)
    ctx.dtype, ctx.has_c = decoded.dtype, c is not None


def _backward(ctx, d_fvu, _d_of_x, _d_residual):
    """d decoded_t = d c_t = -2 weight_t residual_t d fvu / (the spread of x);   d bias = the sum of these."""
    if d_fvu is None:
        return None, None, None, None, None
    d_parts, d_bias = _fvu_backward(d_fvu, *ctx.saved_tensors, ctx.dtype)
    return None, d_parts, d_parts if ctx.has_c else None, d_bias, None


gradient("fvu", _setup_context, _backward)
