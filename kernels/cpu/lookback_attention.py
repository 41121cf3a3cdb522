"""Look-back attention and its gradients, in float32.

`csae.reference.lookback_attention` defines the op; `csae.kernels.portable.lookback_attention` has the same functions.
Tensors [B, T, H, d] are float32, bfloat16 or float16, and may have any strides; what is not float32 with a contiguous
last dimension is copied. Each sum has a fixed order, so results don't depend on the number of threads, which is
torch.get_num_threads(). TypeError and ValueError name the argument that doesn't fit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .arguments import FLOATS, check_strided, with_rows
from .library import Attention, Heads, check_status, native
from .memory import fresh


def forward(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, d_head], v [B, T, H, d_value], slope, null [H], mask [B, T] bool, starts [B, T] int32
    -> out [B, T, H, d_value] in v's dtype, lse [B, H, T] float32, the log of each softmax's denominator.

    A position attends to no key before its start, which may be any number. A position out of the mask has out 0 and
    lse = null.
    """
    B, T, H, d_value = _check_inputs(q, k, v, slope, null, mask, starts)
    out, lse = fresh((B, T, H, d_value), torch.float32), torch.empty(B, H, T)
    given, _kept = _pack(q, k, v, slope, null, mask, starts)
    status = native().csae_lookback_forward(
        ctypes.byref(given), out.data_ptr(), lse.data_ptr(), torch.get_num_threads()
    )
    check_status("lookback_forward", status)
    return out.to(v.dtype), lse


def backward(
    grad_out: Tensor,
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
    """grad_out [B, T, H, d_value], out and lse of `forward` -> the gradients of q, k, v, slope and null."""
    B, T, H, d_value = _check_inputs(q, k, v, slope, null, mask, starts)
    check_strided("grad_out", grad_out, FLOATS, (B, T, H, d_value))
    check_strided("out", out, FLOATS, (B, T, H, d_value))
    check_strided("lse", lse, torch.float32, (B, H, T))
    inputs = (q, k, v, slope, null)
    gradients = [fresh(tuple(x.shape), torch.float32) for x in inputs]
    given, _kept = _pack(q, k, v, slope, null, mask, starts)
    grad_out, out, lse = with_rows(grad_out.float()), with_rows(out.float()), _packed(lse)
    status = native().csae_lookback_backward(
        *(ctypes.byref(given), ctypes.byref(_heads(grad_out)), ctypes.byref(_heads(out)), lse.data_ptr()),
        *(gradient.data_ptr() for gradient in gradients),
        torch.get_num_threads(),
    )
    check_status("lookback_backward", status)
    return tuple(gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))  # type: ignore[return-value]


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[int, int, int, int]:
    check_strided("q", q, FLOATS, (None, None, None, None))
    B, T, H, d_head = q.shape
    if d_head == 0:
        raise ValueError(f"q: given shape {list(q.shape)}; needed d_head of 1 or more")
    check_strided("k", k, FLOATS, (B, T, H, d_head))
    check_strided("v", v, FLOATS, (B, T, H, None))
    check_strided("slope", slope, FLOATS, (H,))
    check_strided("null", null, FLOATS, (H,))
    if mask is not None:
        check_strided("mask", mask, torch.bool, (B, T))
    if starts is not None:
        check_strided("starts", starts, torch.int32, (B, T))
    return B, T, H, v.shape[3]


def _pack(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Attention, tuple[Tensor | None, ...]]:
    """The native form of the input, and the tensors that it points into: keep them alive as long as it is used."""
    q, k, v = with_rows(q.float()), with_rows(k.float()), with_rows(v.float())
    slope, null = _packed(slope.float()), _packed(null.float())
    mask = None if mask is None else _packed(mask)
    starts = None if starts is None else _packed(starts)
    given = Attention(
        *(_heads(q), _heads(k), _heads(v), slope.data_ptr(), null.data_ptr()),
        *(None if tensor is None else tensor.data_ptr() for tensor in (mask, starts)),
        *(*q.shape, v.shape[3]),
    )
    return given, (q, k, v, slope, null, mask, starts)


def _heads(tensor: Tensor) -> Heads:
    return Heads(tensor.data_ptr(), *tensor.stride()[:3])


def _packed(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
