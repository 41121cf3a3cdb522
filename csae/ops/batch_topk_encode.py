"""batch_topk_encode: the encoder product, and the exact selection of a budget that a batch shares, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import fake, gradient, kernels, no_gradient, operator
from .checks import autocast_to, check_device, check_k, check_shape, check_tensor
from .threshold_encode import like_code, like_kept, rows_of, shaped, wide
from .topk_encode import _topk_encode_backward, encoded


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    k_max: int,
    mask: Tensor | None = None,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The n k largest positive pre-activations of n tokens together: k on average, up to k_max for one.

    The encoder of a BatchTopK SAE in training (Bussmann et al. 2024, arXiv 2412.06410). Selection is exact, on the
    float32 accumulator. It costs what `threshold_encode` does where `guess` is near: all that is above the guess is
    found, and if that is no less than n k, the rest can't be selected. Otherwise it searches again.

    Args:
        x: [..., d_in], float32, bfloat16 or float16 (float64 on a CPU).
        W_enc: [d_sae, d_in], x's dtype and device.
        b_enc: [d_sae], x's dtype and device.
        k: features a token on average, 1 <= k <= k_max.
        k_max: the most features of a token, up to d_sae. Of a token that has more, the k_max largest take part.
        mask: [...] bool, x's leading dimensions; the n tokens that count are those where it is True. The code of others
            is empty. None: all.
        guess: [], float32 or x's dtype: about the threshold, say that of the step before. The result does not depend on
            it, only the time. None: there is none.

    Returns:
        values: [..., k_max] in x's dtype, of each token largest first, equal ones by lower index first; zero behind the
            last. Of equal ones at the border of the budget the lower token's come first, then those of lower index.
        indices: [..., k_max] int64; 0 where values are zero.
        threshold: [] float32 (float64 for float64), the smallest value selected; 0 where fewer than n k take part.

    A token that counts and has a NaN among its pre-activations gets k_max NaN values at indices 0..k_max-1, and takes
    none of the budget.

    The gradient flows to x, W_enc and b_enc through the selected entries.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, k or k_max.
    """
    x, W_enc, b_enc = encoded(x, W_enc, b_enc)
    mask, guess = _checked(x, W_enc, k, k_max, mask, guess)
    return _batch_topk_encode(x, W_enc, b_enc, k, k_max, mask, guess)


@operator("batch_topk_encode")
def _batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, k_max: int, mask: Tensor | None, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    by = kernels("threshold_encode", x.device, x.dtype)
    *code, threshold = by.batch_topk_encode(rows_of(x), W_enc, b_enc, k, k_max, mask, guess)
    return *shaped(x, code), threshold


@fake("batch_topk_encode")
def _(x, W_enc, b_enc, k, k_max, mask, guess):
    return *like_code(x, k_max, x.dtype), x.new_empty((), dtype=wide(x))


def _setup_context(ctx, inputs, output):
    x, W_enc = inputs[:2]
    values, indices, threshold = output
    ctx.mark_non_differentiable(indices, threshold)
    ctx.save_for_backward(values, indices, x, W_enc)


def _backward(ctx, grad_values, _grad_indices, _grad_threshold):
    """As topk_encode's: the gradient of a selected value is that of its pre-activation."""
    values, indices, x, W_enc = ctx.saved_tensors
    need_x, need_W, need_b = ctx.needs_input_grad[:3]
    d_x, d_W, d_b = _topk_encode_backward(grad_values, values, indices, x, W_enc, need_x, need_W, need_b)
    return d_x if need_x else None, d_W if need_W else None, d_b if need_b else None, *(None,) * 4


gradient("batch_topk_encode", _setup_context, _backward)


def batch_encode_and_keep(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    k_max: int,
    mask: Tensor | None = None,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `topk_encode.encode_and_keep`, selecting as `batch_topk_encode` does. No gradient flows.

    Returns:
        values, indices, threshold, and kept [n, d_sae] float32: the pre-activations. The caller bounds n.
    """
    x, W_enc, b_enc = encoded(x.detach(), W_enc.detach(), b_enc.detach())
    mask, guess = _checked(x, W_enc, k, k_max, mask, guess)
    return _batch_encode_and_keep(x, W_enc, b_enc, k, k_max, mask, guess)


def batch_encode_again(
    kept: Tensor,
    a: Tensor,
    W_a: Tensor,
    k: int,
    k_max: int,
    mask: Tensor | None = None,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `topk_encode.encode_again`, selecting as `batch_topk_encode` does. kept is written. No gradient flows."""
    a, W_a = autocast_to(a.detach(), W_a.detach())
    mask, guess = _checked(a, W_a, k, k_max, mask, guess)
    return _batch_encode_again(kept, a, W_a, k, k_max, mask, guess)


@operator("batch_encode_and_keep")
def _batch_encode_and_keep(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, k_max: int, mask: Tensor | None, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by = kernels("threshold_encode", x.device, x.dtype)
    *code, threshold, kept = by.batch_encode_and_keep(rows_of(x), W_enc, b_enc, k, k_max, mask, guess)
    return *shaped(x, code), threshold, kept


@fake("batch_encode_and_keep")
def _(x, W_enc, b_enc, k, k_max, mask, guess):
    return *like_code(x, k_max, x.dtype), x.new_empty((), dtype=wide(x)), like_kept(x, W_enc)


no_gradient("batch_encode_and_keep")


@operator("batch_encode_again", ("kept",))
def _batch_encode_again(
    kept: Tensor, a: Tensor, W_a: Tensor, k: int, k_max: int, mask: Tensor | None, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    by = kernels("threshold_encode", a.device, a.dtype)
    *code, threshold = by.batch_encode_again(kept, rows_of(a), W_a, k, k_max, mask, guess)
    return *shaped(a, code), threshold


@fake("batch_encode_again")
def _(kept, a, W_a, k, k_max, mask, guess):
    return *like_code(a, k_max, a.dtype), a.new_empty((), dtype=wide(a))


def _checked(
    x: Tensor, W_enc: Tensor, k: int, k_max: int, mask: Tensor | None, guess: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """mask as [n], and guess in the dtype of selection."""
    check_k(k_max, W_enc.shape[0], "k_max")
    check_k(k, k_max, "k", "k_max")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: given dtype {mask.dtype}; needed torch.bool")
        check_device("mask", mask, "x", x)
        check_shape("mask", mask, tuple(x.shape[:-1]), "[...] as x without its last dimension")
        mask = mask.reshape(-1)
    if guess is not None:
        check_tensor("guess", guess)
        if guess.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"guess: given dtype {guess.dtype}; needed torch.float32, as threshold has")
        check_device("guess", guess, "x", x)
        check_shape("guess", guess, (), "a scalar")
        guess = guess.detach().to(wide(x))
    return mask, guess
