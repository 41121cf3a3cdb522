"""threshold_encode: the encoder product, and the exact selection of what is above a threshold, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from csae.kernels.cpu import topk_coarse
from csae.kernels.cpu.threshold_encode import worthwhile

from .backend import fake, gradient, kernels, no_gradient, operator, place
from .checks import autocast_to, check_device, check_floats, check_k, check_shape, check_tensor
from .topk_encode import Encode, _topk_encode_backward, encoded, repeated


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """All pre-activations W_enc x + b_enc of each token that are above zero and above a threshold.

    The encoder of a JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435; a threshold a feature), and of a
    BatchTopK SAE in use (Bussmann et al. 2024, arXiv 2412.06410; one threshold). Values keep their size: v where
    v > threshold, not v - threshold. Selection is exact, on the float32 accumulator, before values are rounded. The
    pre-activations [n, d_sae] never exist whole, and are not kept for backward.

    Args:
        x: [..., d_in], float32, bfloat16 or float16 (float64 on a CPU).
        W_enc: [d_sae, d_in], x's dtype and device.
        b_enc: [d_sae], x's dtype and device.
        threshold: [] or [d_sae], float32 or x's dtype, on x's device. NaN selects nothing.
        k_max: room for the features of a token, 1 <= k_max <= d_sae. Of a token that has more, the k_max largest.

    Returns:
        values: [..., k_max] in x's dtype, largest first, equal ones by lower index first. Zero behind the last.
        indices: [..., k_max] int64; 0 where values are zero.

    A token with a NaN among its pre-activations gets k_max NaN values at indices 0..k_max-1.

    The gradient flows to x, W_enc and b_enc through the selected entries. threshold gets none: for JumpReLU's
    straight-through estimator see `near_threshold`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or k_max.
    """
    x, W_enc, b_enc = encoded(x, W_enc, b_enc)
    check_k(k_max, W_enc.shape[0], "k_max")
    return _threshold_encode(x, W_enc, b_enc, _wide(threshold, x, W_enc), k_max)


def near_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int
) -> tuple[Tensor, Tensor]:
    """The positive pre-activations v of each token with |v - threshold| < bandwidth / 2. No gradient flows.

    Those are what JumpReLU's straight-through estimator needs, with a rectangle as its kernel (Rajamanoharan et al.
    2024, arXiv 2407.14435): d H(v - threshold) / d threshold = -1 / bandwidth for them, and 0 for all others. See
    `csae.ops.straight_through`.

    Args: as `threshold_encode`. bandwidth: above 0. k_max: of a token that has more, the k_max largest.

    Returns:
        values [..., k_max], the pre-activations in float32 (float64 for float64), largest first; 0 behind the last.
        indices [..., k_max] int64; 0 behind the last.

    A token with a NaN among its pre-activations gets NaN, as in `threshold_encode`.
    """
    x, W_enc, b_enc = encoded(x.detach(), W_enc.detach(), b_enc.detach())
    check_k(k_max, W_enc.shape[0], "k_max")
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, float | int) or not bandwidth > 0:
        raise ValueError(f"bandwidth: given {bandwidth!r}; needed a number above 0")
    return _near_threshold(x, W_enc, b_enc, _wide(threshold, x, W_enc), float(bandwidth), k_max)


def threshold_and_near(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`threshold_encode_wide` and `near_threshold` of the same tokens: on a CPU by one product. No gradient flows."""
    x, W_enc, b_enc = encoded(x.detach(), W_enc.detach(), b_enc.detach())
    return _threshold_and_near(x, W_enc, b_enc, _wide(threshold, x, W_enc), bandwidth, k_max)


@operator("threshold_encode")
def _threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    by = kernels("threshold_encode", x.device, x.dtype)
    return shaped(x, by.threshold_encode(rows_of(x), W_enc, b_enc, threshold, k_max))


@fake("threshold_encode")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    return like_code(x, k_max, x.dtype)


def _setup_context(ctx, inputs, output):
    x, W_enc = inputs[:2]
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values, indices, x, W_enc)


def _backward(ctx, grad_values, _grad_indices):
    """As topk_encode's: the gradient of a selected value is that of its pre-activation."""
    values, indices, x, W_enc = ctx.saved_tensors
    need_x, need_W, need_b = ctx.needs_input_grad[:3]
    d_x, d_W, d_b = _topk_encode_backward(grad_values, values, indices, x, W_enc, need_x, need_W, need_b)
    return d_x if need_x else None, d_W if need_W else None, d_b if need_b else None, None, None


gradient("threshold_encode", _setup_context, _backward)


@operator("near_threshold")
def _near_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int
) -> tuple[Tensor, Tensor]:
    by = kernels("threshold_encode", x.device, x.dtype)
    return shaped(x, by.near_threshold(rows_of(x), W_enc, b_enc, threshold, bandwidth, k_max))


@fake("near_threshold")
def _(x, W_enc, b_enc, threshold, bandwidth, k_max):
    return like_code(x, k_max, wide(x))


no_gradient("near_threshold")


@operator("threshold_and_near")
def _threshold_and_near(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by, given = kernels("threshold_encode", x.device, x.dtype), (rows_of(x), W_enc, b_enc, threshold)
    if place("threshold_encode", x.device, x.dtype) == "cpu":
        *code, values, indices = by.threshold_and_near(*given, bandwidth, k_max)
        return *shaped(x, code), *shaped(x, (values, indices))
    code = by.threshold_encode(*given, k_max, dtype=wide(x))
    return *shaped(x, code), *shaped(x, by.near_threshold(*given, bandwidth, k_max))


@fake("threshold_and_near")
def _(x, W_enc, b_enc, threshold, bandwidth, k_max):
    return *like_code(x, k_max, wide(x)), *like_code(x, k_max, wide(x))


no_gradient("threshold_and_near")


# --- for repeated use, for many ranks, and for a second encode of the same tokens: without a gradient --------


def threshold_encoder(W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> Encode:
    """`threshold_encode` for repeated use with the same weights and threshold; see `topk_encode.encoder`."""
    W_enc, b_enc = autocast_to(W_enc.detach(), b_enc.detach())
    threshold = _wide(threshold, W_enc, W_enc)

    def once(x: Tensor, W_enc: Tensor, b_enc: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
        return threshold_encode(x, W_enc, b_enc, threshold, k_max)

    def round_table(W_enc: Tensor, b_enc: Tensor, k_max: int) -> list[Tensor]:
        return _threshold_table(W_enc, b_enc, threshold, k_max)

    def by_table(
        x: Tensor, W_enc: Tensor, b_enc: Tensor, k_max: int, table: list[Tensor], last: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        check_floats(x=x, W_enc=W_enc, b_enc=b_enc)
        check_shape("W_enc", W_enc, (None, x.shape[-1]), "[d_sae, d_in]")
        return *_threshold_encode_by_table(x, W_enc, b_enc, threshold, k_max, table), last

    encode = repeated(W_enc, b_enc, k_max, [], once, round_table, by_table)
    return lambda x: encode(*autocast_to(x.detach()))


def threshold_table(W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> list[Tensor]:
    """The weights rounded to bfloat16, for the recurrence; empty where that is no gain."""
    return _threshold_table(W_enc.detach(), b_enc.detach(), _wide(threshold, W_enc, W_enc), k_max)


def threshold_encode_wide(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int
) -> tuple[Tensor, Tensor]:
    """`threshold_encode` with values as they were selected: in float32 for half precision. No gradient flows."""
    x, W_enc, b_enc = encoded(x.detach(), W_enc.detach(), b_enc.detach())
    return _threshold_encode_wide(x, W_enc, b_enc, _wide(threshold, x, W_enc), k_max)


def threshold_encode_and_keep(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `topk_encode.encode_and_keep`, selecting as `threshold_encode` does."""
    x, W_enc, b_enc = encoded(x.detach(), W_enc.detach(), b_enc.detach())
    return _threshold_encode_and_keep(x, W_enc, b_enc, _wide(threshold, x, W_enc), k_max)


def threshold_encode_again(
    kept: Tensor, a: Tensor, W_a: Tensor, threshold: Tensor, k_max: int
) -> tuple[Tensor, Tensor]:
    """As `topk_encode.encode_again`, selecting as `threshold_encode` does. kept is written."""
    a, W_a = autocast_to(a.detach(), W_a.detach())
    return _threshold_encode_again(kept, a, W_a, _wide(threshold, a, W_a), k_max)


@operator("threshold_table")
def _threshold_table(W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> list[Tensor]:
    by = kernels("threshold_encode", W_enc.device, W_enc.dtype)
    return by.threshold_table(W_enc, b_enc, threshold, k_max)


@fake("threshold_table")
def _(W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> list[Tensor]:
    if place("threshold_encode", W_enc.device, W_enc.dtype) != "cpu" or not worthwhile(W_enc, k_max):
        return []
    return list(topk_coarse.like_rounded(W_enc))


no_gradient("threshold_table")


@operator("threshold_encode_by_table")
def _threshold_encode_by_table(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, table: list[Tensor]
) -> tuple[Tensor, Tensor]:
    by = kernels("threshold_encode", x.device, x.dtype)
    return shaped(x, by.threshold_encode_by_table(rows_of(x), W_enc, b_enc, threshold, k_max, table))


@fake("threshold_encode_by_table")
def _(x, W_enc, b_enc, threshold, k_max, table):
    return like_code(x, k_max, x.dtype)


no_gradient("threshold_encode_by_table")


@operator("threshold_encode_wide")
def _threshold_encode_wide(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int
) -> tuple[Tensor, Tensor]:
    by = kernels("threshold_encode", x.device, x.dtype)
    return shaped(x, by.threshold_encode(rows_of(x), W_enc, b_enc, threshold, k_max, dtype=wide(x)))


@fake("threshold_encode_wide")
def _(x, W_enc, b_enc, threshold, k_max):
    return like_code(x, k_max, wide(x))


no_gradient("threshold_encode_wide")


@operator("threshold_encode_and_keep")
def _threshold_encode_and_keep(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    by = kernels("threshold_encode", x.device, x.dtype)
    *code, kept = by.threshold_encode_and_keep(rows_of(x), W_enc, b_enc, threshold, k_max)
    return *shaped(x, code), kept


@fake("threshold_encode_and_keep")
def _(x, W_enc, b_enc, threshold, k_max):
    return *like_code(x, k_max, x.dtype), like_kept(x, W_enc)


no_gradient("threshold_encode_and_keep")


@operator("threshold_encode_again", ("kept",))
def _threshold_encode_again(
    kept: Tensor, a: Tensor, W_a: Tensor, threshold: Tensor, k_max: int
) -> tuple[Tensor, Tensor]:
    by = kernels("threshold_encode", a.device, a.dtype)
    return shaped(a, by.threshold_encode_again(kept, rows_of(a), W_a, threshold, k_max))


@fake("threshold_encode_again")
def _(kept, a, W_a, threshold, k_max):
    return like_code(a, k_max, a.dtype)


# --- shared with batch_topk_encode ----------------------------------------------------------------------------


def wide(x: Tensor) -> torch.dtype:
    """The dtype of selection."""
    return torch.promote_types(x.dtype, torch.float32)


def rows_of(x: Tensor) -> Tensor:
    """[..., d] -> [n, d], also where n or d is zero."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def shaped(x: Tensor, code: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A code [n, k] of x [..., d] -> [..., k]."""
    values, indices = code
    shape = (*x.shape[:-1], values.shape[1])
    return values.view(shape), indices.view(shape)


def like_code(x: Tensor, k_max: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An uninitialised code of x."""
    shape = (*x.shape[:-1], k_max)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int64)


def like_kept(x: Tensor, W_enc: Tensor) -> Tensor:
    """Uninitialised pre-activations of x, to be kept."""
    return x.new_empty(x.shape[:-1].numel(), W_enc.shape[0], dtype=wide(x))


def _wide(threshold: Tensor, x: Tensor, W_enc: Tensor) -> Tensor:
    """threshold [] or [d_sae], checked, in the dtype of selection of x."""
    check_tensor("threshold", threshold)
    if threshold.dtype not in (torch.float32, x.dtype):
        also = "" if x.dtype == torch.float32 else f" or {x.dtype} as x has"
        raise TypeError(f"threshold: given dtype {threshold.dtype}; needed torch.float32{also}")
    check_device("threshold", threshold, "x", x)
    if threshold.dim() != 0:
        check_shape("threshold", threshold, (W_enc.shape[0],), "[] or [d_sae]")
    return threshold.detach().to(wide(x))
