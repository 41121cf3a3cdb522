"""lookback_attention: strictly causal attention with a log-distance bias and a null score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backend import fake, gradient, kernels, no_gradient, operator
from .checks import INTEGERS, autocast_to, check_device, check_floats, check_shape, check_tensor, refuse_tangents


def lookback_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    null: Tensor,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention of each position to strictly earlier ones, or to nothing.

    score(t, j) = <q_t, k_j> / sqrt(d_head) - slope * log(t - j), for j < t. The softmax runs over these and
    one null score a head, whose value is zero: so position 0 sees nothing, and a head can look at nothing.
    [T, T] never exists whole, forward or backward.

    Args:
        q: [B, T, H, d_head], float32, bfloat16 or float16 (float64 on a CPU).
        k: [B, T, H, d_head], as v in q's dtype and on its device.
        v: [B, T, H, d_value].
        slope: [H], of the log-distance bias; in q's dtype, or float32 with a narrower q. Autocast leaves float32.
        null: [H], the score of looking at nothing; as slope.
        mask: [B, T] bool, True where a position takes part. One that doesn't is not looked at, and its own
            output is zero.
        documents: [B, T] integer ids. A document is a run of equal ids; nothing looks across its boundary.

    Returns:
        [B, T, H, d_value] in v's dtype, accumulated in float32. A NaN in the input gives NaN in the output,
        at least where it is looked at.

    The gradient flows to q, k, v, slope and null.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device.
    """
    floats = {"q": q, "k": k, "v": v, "slope": slope, "null": null}
    for name, tensor in floats.items():
        check_tensor(name, tensor)
    q, k, v = autocast_to(q, k, v)
    slope, null = (of if of.dtype == torch.float32 else autocast_to(of)[0] for of in (slope, null))
    check_floats(q=q, k=k, v=v, **{name: of for name, of in (("slope", slope), ("null", null)) if not _wider(of, q)})
    for name, of in (("slope", slope), ("null", null)):
        check_device(name, of, "q", q)
    check_shape("q", q, (None, None, None, None), "[B, T, H, d_head]")
    B, T, H, d_head = q.shape
    check_shape("k", k, (B, T, H, d_head), "[B, T, H, d_head]")
    check_shape("v", v, (B, T, H, None), "[B, T, H, d_value]")
    check_shape("slope", slope, (H,), "[H]")
    check_shape("null", null, (H,), "[H]")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: given dtype {mask.dtype}; needed torch.bool, True where a position takes part")
        check_shape("mask", mask, (B, T), "[B, T]")
        check_device("mask", mask, "q", q)
    starts = None
    if documents is not None:
        check_tensor("documents", documents)
        if documents.dtype not in INTEGERS:
            raise TypeError(f"documents: given dtype {documents.dtype}; needed integer ids, such as torch.int64")
        check_shape("documents", documents, (B, T), "[B, T]")
        check_device("documents", documents, "q", q)
        starts = document_starts(documents)
    refuse_tangents(q, k, v, slope, null)
    return _lookback_attention(q, k, v, slope, null, mask, starts)[0]


def _wider(of: Tensor, q: Tensor) -> bool:
    return of.dtype == torch.float32 and q.dtype in (torch.bfloat16, torch.float16)


def document_starts(documents: Tensor) -> Tensor:
    """documents [B, T] -> [B, T] int32: where the run of equal ids of each position begins."""
    position = torch.arange(1, max(documents.shape[1], 1), dtype=torch.int32, device=documents.device)
    begins = (documents[:, 1:] != documents[:, :-1]) * position
    return nn.functional.pad(begins, (min(documents.shape[1], 1), 0)).cummax(dim=1).values


@operator("lookback_attention")
def _lookback_attention(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    return kernels("lookback_attention", q.device, q.dtype).forward(q, k, v, slope, null, mask, starts)


@fake("lookback_attention")
def _(q, k, v, slope, null, mask, starts):
    B, T, H, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(v.shape), q.new_empty(B, H, T, dtype=wide)


@operator("lookback_attention_backward")
def _lookback_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    null: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels("lookback_attention", q.device, q.dtype).backward(grad, q, k, v, slope, null, mask, starts, out, lse)


@fake("lookback_attention_backward")
def _(grad, q, k, v, slope, null, mask, starts, out, lse):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v, slope, null))


no_gradient("lookback_attention_backward")


def _setup_context(ctx, inputs, output):
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # of lse, which has none
    ctx.save_for_backward(*inputs, out, lse)


def _backward(ctx, grad, _grad_lse):
    """For each head, grad_t = d loss / d out_t, and A(t, .) is the softmax over the scores of j < t and the null score:

    d score(t, j) = A(t, j) * (<grad_t, v_j> - <grad_t, out_t>)
    d q_t         = sum_j d score(t, j) * k_j / sqrt(d_head)
    d k_j         = sum_t d score(t, j) * q_t / sqrt(d_head)
    d v_j         = sum_t A(t, j) * grad_t
    d slope       = -sum over t, j of d score(t, j) * log(t - j)
    d null        = -sum_t A(t, null) * <grad_t, out_t>
    """
    if grad is None:
        return (None,) * 7
    return *_lookback_attention_backward(grad, *ctx.saved_tensors), None, None


gradient("lookback_attention", _setup_context, _backward)
