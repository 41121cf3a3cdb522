"""The gradient of JumpReLU's thresholds, by the straight-through estimator of Rajamanoharan et al. 2024.

H(v - threshold) has no useful derivative. Its estimate is -1 / bandwidth for the pre-activations that are within
bandwidth / 2 of their threshold, above or below (arXiv 2407.14435, equations 11 and 12, with a rectangle as kernel).
Those below have no part in the code, so they come beside it, from `near_threshold`:

    near = near_threshold(x, W_enc, b_enc, threshold, bandwidth, room)
    steps = threshold_steps(*near, threshold, bandwidth)      # zeros: only their gradient counts
    l0 = (values > 0).sum(-1) + steps.sum(-1)
    x_hat = sparse_decode(values, indices, W_dec) + decode_steps(steps, *near, threshold, W_dec)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import fake, gradient, operator
from .checks import autocast_to
from .sparse_decode import decode_backward


def threshold_steps(values: Tensor, indices: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Zeros with the gradient of H(v - threshold): -1 / bandwidth each, to the threshold of its feature.

    values, indices [..., k_max] from `near_threshold`, threshold [d_sae] or [] -> [..., k_max] in threshold's dtype.
    """
    own = threshold.expand(()) if threshold.dim() == 0 else threshold[indices]
    return torch.where(values != 0, (own.detach() - own) / bandwidth, 0)


def decode_steps(steps: Tensor, values: Tensor, indices: Tensor, threshold: Tensor, W_dec: Tensor) -> Tensor:
    """Zeros [..., d_out], through which steps get the gradient threshold_f <d out, W_dec[f]>.

    steps: of `threshold_steps`. values, indices: those of `near_threshold` that it was made of. W_dec [d_sae, d_out]:
    the table that the code is decoded with; it gets no gradient here, and neither does threshold but through steps.
    """
    steps, active, W_dec = autocast_to(sized(steps, indices, threshold), values.detach(), W_dec.detach())
    return _decode_steps(steps.to(W_dec.dtype), active.to(W_dec.dtype), indices, W_dec)


def sized(steps: Tensor, indices: Tensor, threshold: Tensor) -> Tensor:
    """steps [..., k_max] times the threshold of their features: by so much the code jumps there."""
    threshold = threshold.detach()
    return steps * (threshold.expand(indices.shape) if threshold.dim() == 0 else threshold[indices])


@operator("decode_steps")
def _decode_steps(steps: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return W_dec.new_zeros(*steps.shape[:-1], W_dec.shape[1])


@fake("decode_steps")
def _(steps: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return W_dec.new_empty(*steps.shape[:-1], W_dec.shape[1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad):
    """d steps_ti = <grad_t, W_dec[indices_ti]>, where there is a candidate."""
    values, indices, W_dec = ctx.saved_tensors
    return steps_backward(grad.contiguous(), values, indices, W_dec), None, None, None


def steps_backward(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """The gradient of `sized` steps [n, k_max], from that of what they were decoded to, [n, d_out]."""
    return torch.where(values != 0, decode_backward(grad, values, indices, W_dec), 0)


gradient("decode_steps", _setup_context, _backward)
