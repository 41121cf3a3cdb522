"""topk_encode: the encoder product and the exact selection of its k largest entries, as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csae.kernels.cpu import topk_coarse
from csae.kernels.cpu.topk_coarse import LEAST_ROWS

from .backend import fake, gradient, kernels, no_gradient, operator, place
from .checks import autocast_to, check_floats, check_k, check_shape, check_tensor, refuse_tangents


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each token, relu'd: relu(topk(W_enc x + b_enc, k)).

    The encoder of a TopK SAE (Gao et al. 2024, arXiv 2406.04093). Selection is exact, on the float32
    accumulator. The pre-activations [n, d_sae] never exist whole, and are not kept for backward.

    Args:
        x: [..., d_in], float32, bfloat16 or float16 (float64 on a CPU).
        W_enc: [d_sae, d_in], x's dtype and device.
        b_enc: [d_sae], x's dtype and device.
        k: features kept a token, 1 <= k <= d_sae.

    Returns:
        values: [..., k] in x's dtype, relu'd, ordered by pre-activation, largest first; equal ones by lower
            index first.
        indices: [..., k] int64.

    A token with a NaN among its pre-activations gets k NaN values at indices 0..k-1. Infinities are
    selected as the numbers they are.

    The gradient flows to x, W_enc and b_enc through the selected entries with a positive value.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or k.
    """
    x, W_enc, b_enc = encoded(x, W_enc, b_enc)
    check_k(k, W_enc.shape[0])
    return _topk_encode(x, W_enc, b_enc, k)


def encoded(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., d_in], W_enc [d_sae, d_in] and b_enc [d_sae], checked, in autocast's dtype where that is on."""
    for name, tensor in (("x", x), ("W_enc", W_enc), ("b_enc", b_enc)):
        check_tensor(name, tensor)
    x, W_enc, b_enc = autocast_to(x, W_enc, b_enc)
    check_floats(x=x, W_enc=W_enc, b_enc=b_enc)
    if x.dim() == 0:
        raise ValueError("x: given a scalar; needed [..., d_in]")
    check_shape("W_enc", W_enc, (None, x.shape[-1]), "[d_sae, d_in]")
    check_shape("b_enc", b_enc, (W_enc.shape[0],), "[d_sae]")
    refuse_tangents(x, W_enc, b_enc)
    return x, W_enc, b_enc


@operator("topk_encode")
def _topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    values, indices = kernels("topk_encode", x.device, x.dtype).topk_encode(rows, W_enc, b_enc, k)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


@fake("topk_encode")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@operator("topk_encode_backward")
def _topk_encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, W_enc and b_enc; one that is not needed comes back empty."""
    # A NaN value passes its gradient on, so that a broken token is seen and not silently left out.
    grad = torch.where(values <= 0, 0, grad_values).reshape(-1, values.shape[-1])
    indices = indices.reshape(-1, indices.shape[-1])
    d_sae, d_in = W_enc.shape
    d_x, d_W, d_b = (x.new_empty(0) for _ in range(3))
    if need_x:
        d_x = kernels("sparse_decode", x.device, x.dtype).gather_sum(grad, indices, W_enc).view(x.shape)
    if need_W or need_b:
        n, k = indices.shape
        rows = {"W": x.reshape(n, d_in)} if need_W else {}
        rows |= {"b": x.new_ones(n, 1)} if need_b else {}
        tokens = torch.arange(n, device=x.device).unsqueeze(1).expand(n, k)
        sums = kernels("feature_rows", x.device, x.dtype)
        active = torch.where(values.reshape(n, k) <= 0, d_sae, indices)  # the others are in no sum
        pairs = sums.sort_pairs(active.reshape(-1), tokens.reshape(-1), d_sae)
        found = sums.feature_sums(pairs, [grad.reshape(-1)] * len(rows), list(rows.values()))
        gradients = dict(zip(rows, found, strict=True))
        d_W, d_b = gradients.get("W", d_W), gradients["b"].squeeze(1) if need_b else d_b
    return d_x, d_W, d_b


@fake("topk_encode_backward")
def _(grad_values, values, indices, x, W_enc, need_x, need_W, need_b):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        W_enc.new_empty(W_enc.shape) if need_W else x.new_empty(0),
        W_enc.new_empty(W_enc.shape[:1]) if need_b else x.new_empty(0),
    )


no_gradient("topk_encode_backward")


def encode_wide(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk_encode` with values as they were selected: in float32 for half precision. No gradient flows."""
    x, W_enc, b_enc = autocast_to(x.detach(), W_enc.detach(), b_enc.detach())
    return _encode_wide(x, W_enc, b_enc, k)


@operator("encode_wide")
def _encode_wide(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, wide = x.reshape(x.shape[:-1].numel(), x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
    values, indices = kernels("topk_encode", x.device, x.dtype).topk_encode(rows, W_enc, b_enc, k, dtype=wide)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


@fake("encode_wide")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape, wide = (*x.shape[:-1], k), torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=torch.int64)


no_gradient("encode_wide")


def _setup_context(ctx, inputs, output):
    x, W_enc, _, _ = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values, indices, x, W_enc)


def _backward(ctx, grad_values, _grad_indices):
    """With grad_ti = d loss / d values_ti where values_ti > 0, else 0; over pairs (t, i) of a token and a place:

    d x_t      = sum_i grad_ti * W_enc[indices_ti]                              an embedding bag
    d W_enc[f] = sum over (t, i) with indices_ti = f of grad_ti * x_t           an SpMM
    d b_enc[f] = sum over (t, i) with indices_ti = f of grad_ti
    """
    values, indices, x, W_enc = ctx.saved_tensors
    need_x, need_W, need_b, _ = ctx.needs_input_grad
    d_x, d_W, d_b = _topk_encode_backward(grad_values, values, indices, x, W_enc, need_x, need_W, need_b)
    return d_x if need_x else None, d_W if need_W else None, d_b if need_b else None, None


gradient("topk_encode", _setup_context, _backward)


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def encoder(W_enc: Tensor, b_enc: Tensor, k: int) -> Encode:
    """`topk_encode` for repeated use with the same weights: rounded tables are made once. No gradient flows.

    Returns:
        A function of x [..., d_in] that gives values and indices [..., k]. When the weights change, make another.
    """
    W_enc, b_enc = autocast_to(W_enc.detach(), b_enc.detach())

    def by_table(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        check_floats(x=x, W_enc=W_enc, b_enc=b_enc)
        check_shape("W_enc", W_enc, (None, x.shape[-1]), "[d_sae, d_in]")
        return _encode_by_table(x, *given)

    encode = repeated(W_enc, b_enc, k, [], topk_encode, _round_table, by_table)
    return lambda x: encode(*autocast_to(x.detach()))


def repeated(
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    table: list[Tensor],
    topk_encode: Callable[..., tuple[Tensor, Tensor]],
    round_table: Callable[..., list[Tensor]],
    encode_by_table: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    encoded: int = 0,
) -> Encode:
    """`encoder` from its three parts, operators or kernels.

    table: `round_table` of the weights, or empty: it is then made with the call that brings the rows to LEAST_ROWS.
    encoded: how many rows went before. What the table gives may differ in the last bit.
    """
    looked, last = bool(table), None

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal encoded, looked, table, last
        encoded += x.shape[:-1].numel()
        if not looked and encoded >= LEAST_ROWS:
            table, looked = round_table(W_enc, b_enc, k), True
        if not table:
            return topk_encode(x, W_enc, b_enc, k)
        values, indices, last = encode_by_table(x, W_enc, b_enc, k, table, last)
        return values, indices

    return encode


def round_table(W_enc: Tensor, b_enc: Tensor, k: int) -> list[Tensor]:
    """The weights rounded to bfloat16, for `encoder` and the recurrence; empty where that is no gain."""
    return _round_table(W_enc.detach(), b_enc.detach(), k)


@operator("round_table")
def _round_table(W_enc: Tensor, b_enc: Tensor, k: int) -> list[Tensor]:
    return kernels("topk_encode", W_enc.device, W_enc.dtype).round_table(W_enc, b_enc, k)


@fake("round_table")
def _(W_enc: Tensor, b_enc: Tensor, k: int) -> list[Tensor]:
    if place("topk_encode", W_enc.device, W_enc.dtype) != "cpu" or not topk_coarse.worthwhile(W_enc, k):
        return []
    tables = W_enc, W_enc[:: topk_coarse.every(k)]
    return [of for rows in tables for of in topk_coarse.like_rounded(rows)]


@operator("encode_by_table")
def _encode_by_table(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, table: list[Tensor], last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    by = kernels("topk_encode", x.device, x.dtype)
    values, indices, reached = by.encode_by_table(rows, W_enc, b_enc, k, table, last)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k), reached


@fake("encode_by_table")
def _(x, W_enc, b_enc, k, table, last):
    shape = (*x.shape[:-1], k)
    reached = x.new_empty(2, x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64), reached


def encode_and_keep(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`topk_encode`, and the pre-activations that it chose from, for `encode_again`. No gradient flows.

    Returns:
        values, indices, and kept [n, d_sae] float32: the pre-activations. The caller bounds n.
    """
    x, W_enc, b_enc = autocast_to(x.detach(), W_enc.detach(), b_enc.detach())
    return _encode_and_keep(x, W_enc, b_enc, k)


def encode_again(kept: Tensor, a: Tensor, W_a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk_encode` of what was kept less W_a a, by a product of width r instead of d_in. No gradient flows.

    With x' = x - W a and W_a = W_enc W, the pre-activations of x' are those of x less W_a a. That is 2 n r d_sae
    operations and 8 n d_sae bytes, where encoding x' takes 2 n d_in d_sae operations. The result differs from
    `topk_encode(x')` by the rounding of W_a and of one more sum.

    Args:
        kept: what `encode_and_keep` or this gave for tokens x; becomes what belongs to x'.
        a: [..., r]. W_a: [d_sae, r].
        k: as it was.
    """
    a, W_a = autocast_to(a.detach(), W_a.detach())
    return _encode_again(kept, a, W_a, k)


no_gradient("round_table")
no_gradient("encode_by_table")


def with_encode_gradient(x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The values of a code of x that was found without a gradient, with the gradient that `topk_encode` gives them."""
    x, W_enc, b_enc, values = autocast_to(x, W_enc, b_enc, values)
    refuse_tangents(x, W_enc, b_enc)
    return _with_encode_gradient(x, W_enc, b_enc, values, indices)


@operator("encode_and_keep")
def _encode_and_keep(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    values, indices, kept = kernels("topk_encode", x.device, x.dtype).encode_and_keep(rows, W_enc, b_enc, k)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k), kept


@fake("encode_and_keep")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    kept = x.new_empty(x.shape[:-1].numel(), W_enc.shape[0], dtype=wide)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64), kept


@operator("encode_again", ("kept",))
def _encode_again(kept: Tensor, a: Tensor, W_a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
    values, indices = kernels("topk_encode", a.device, a.dtype).encode_again(kept, rows, W_a, k)
    return values.view(*a.shape[:-1], k), indices.view(*a.shape[:-1], k)


@fake("encode_again")
def _(kept: Tensor, a: Tensor, W_a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*a.shape[:-1], k)
    return a.new_empty(shape), a.new_empty(shape, dtype=torch.int64)


@operator("with_encode_gradient")
def _with_encode_gradient(x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return values.clone()


@fake("with_encode_gradient")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return torch.empty_like(values)


def _setup_given(ctx, inputs, output):
    x, W_enc, _, values, indices = inputs
    ctx.save_for_backward(values, indices, x, W_enc)


def _backward_given(ctx, grad_values):
    values, indices, x, W_enc = ctx.saved_tensors
    need_x, need_W, need_b = ctx.needs_input_grad[:3]
    d_x, d_W, d_b = _topk_encode_backward(grad_values, values, indices, x, W_enc, need_x, need_W, need_b)
    return d_x if need_x else None, d_W if need_W else None, d_b if need_b else None, None, None


gradient("with_encode_gradient", _setup_given, _backward_given)
