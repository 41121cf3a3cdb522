"""sparse_decode: the rows of a table that a code names, weighted and summed; a weighted embedding bag."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import fake, gradient, kernels, no_gradient, operator
from .checks import autocast_to, check_device, check_floats, check_shape, check_tensor, refuse_tangents


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """out_t = sum_i values_ti * W_dec[indices_ti]: the decoder, and the memory of the look-back.

    k is a capacity: a row's length is the place after its last non-zero value (NaN is non-zero). Entries at or behind
    it take no part: they cost nothing, their indices are not looked at, and the gradient of their values is zero. So a
    token costs a gather of as many rows as its length, whatever k and d_sae are. The gradient of W_dec is summed in a
    fixed order: it is the same to the bit in every run.

    Args:
        values: [..., k], float32, bfloat16 or float16 (float64 on a CPU); in any order.
        indices: [..., k] int64, each from 0 to d_sae - 1. A feature may be named more than once.
        W_dec: [d_sae, d_out], values' dtype and device.

    Returns:
        [..., d_out] in values' dtype, accumulated in float32. NaN and infinities propagate to their token.

    The gradient flows to values and W_dec.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; on a CPU also an index out of range. On CUDA, where that check would
            stall the device, the token becomes NaN.
    """
    for name, tensor in (("values", values), ("indices", indices), ("W_dec", W_dec)):
        check_tensor(name, tensor)
    values, W_dec = autocast_to(values, W_dec)
    check_floats(values=values, W_dec=W_dec)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: given dtype {indices.dtype}; needed torch.int64, as topk_encode gives them")
    check_device("indices", indices, "values", values)
    if values.dim() == 0:
        raise ValueError("values: given a scalar; needed [..., k]")
    check_shape("indices", indices, tuple(values.shape), "[..., k] as values")
    check_shape("W_dec", W_dec, (None, None), "[d_sae, d_out]")
    refuse_tangents(values, W_dec)
    return _sparse_decode(values, indices, W_dec)


@operator("sparse_decode")
def _sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    pairs = _pairs(indices)
    out = kernels("sparse_decode", values.device, values.dtype).gather_sum(values.reshape(pairs.shape), pairs, W_dec)
    return out.view(*values.shape[:-1], W_dec.shape[1])


@fake("sparse_decode")
def _(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], W_dec.shape[1])


def decode_backward(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The gradient of sparse_decode's values [n, k], from that of what it gave, [n, d_out]."""
    return _sparse_decode_backward(grad, values, indices, W_dec, True, False)[0]


@operator("sparse_decode_backward")
def _sparse_decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of values and W_dec; one that is not needed comes back empty."""
    sums = kernels("sparse_decode", values.device, values.dtype)
    pairs = _pairs(indices)
    code, rows = (values.reshape(pairs.shape), pairs), grad.reshape(pairs.shape[0], W_dec.shape[1])
    return (
        sums.gather_dot(rows, *code, W_dec).view(values.shape) if need_values else values.new_empty(0),
        sums.feature_sum(*code, rows, W_dec.shape[0]) if need_W else values.new_empty(0),
    )


@fake("sparse_decode_backward")
def _(grad, values, indices, W_dec, need_values, need_W):
    return (
        values.new_empty(values.shape) if need_values else values.new_empty(0),
        W_dec.new_empty(W_dec.shape) if need_W else values.new_empty(0),
    )


no_gradient("sparse_decode_backward")


def _pairs(indices: Tensor) -> Tensor:
    """[..., k] -> [n, k], also where k or n is zero."""
    return indices.reshape(indices.shape[:-1].numel(), indices.shape[-1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """With grad_t = d loss / d out_t, over pairs (t, i) of a token and a place in its code, before its length:

    d values_ti = <grad_t, W_dec[indices_ti]>                                      an SDDMM
    d W_dec[f]  = sum over (t, i) with indices_ti = f of values_ti * grad_t        an SpMM: code^T grad
    """
    need_values, _, need_W = ctx.needs_input_grad
    d_values, d_W = _sparse_decode_backward(grad, *ctx.saved_tensors, need_values, need_W)
    return d_values if need_values else None, None, d_W if need_W else None


gradient("sparse_decode", _setup_context, _backward)
