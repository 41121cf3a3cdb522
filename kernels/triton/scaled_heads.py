"""RMSNorm of each head with an optional gain, and its gradients: `portable/scaled_heads.py` says what.

Queries, keys and values are narrow tensors, and each pass over one is a launch. So each direction is one kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..portable import scaled_heads as portable
from .variant import FLOATS, Variant, aligned, jit, unit_of, vector_units

SIZES = (64, 256)  # widths of a tile: the first that holds a head is taken; wider heads take the PyTorch path
ELEMENTS = 2048  # of a tile


@triton.jit
def _places(n, d, BLOCK_M: tl.constexpr, SIZE: tl.constexpr):
    """Of this program's rows, those of one head of BLOCK_M tokens: their numbers, their elements, and masks of both."""
    heads = tl.num_programs(1)
    o_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, SIZE)
    o_row = o_n.to(tl.int64) * heads + tl.program_id(1)
    m_n = o_n < n
    return o_row, o_row[:, None] * d + o_d[None, :], m_n, m_n[:, None] & (o_d < d)[None, :]


# out = heads * scale * gain, scale = (least + weight * mean square of the head)^(-1/2)
#
# A program: one head of BLOCK_M tokens. Bytes (n tokens, H heads of width d, e bytes an element): 2 n H d e, and 4 n H
# for the scales. Operations: 4 n H d. Floor: the bytes; A, B and C with H = 8, d = 64 in bf16: 4 us.
@jit
def _scale_heads(
    heads_ptr,
    gain_ptr,
    out_ptr,
    scale_ptr,
    n: tl.int32,
    units: tl.int32,
    has_gain: tl.int32,
    least: tl.float32,
    weight: tl.float32,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
):
    d = units * UNIT
    o_row, o_e, m_n, m_e = _places(n, d, BLOCK_M, SIZE)
    # [BLOCK_M, SIZE]
    b_heads = tl.load(heads_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_scale = 1.0 / tl.sqrt_rn(least + tl.sum(b_heads * b_heads, axis=1) * (weight / d))
    gain = tl.load(gain_ptr + tl.program_id(1), mask=has_gain != 0, other=1.0)
    b_out = b_heads * (b_scale * gain)[:, None]
    tl.store(out_ptr + o_e, b_out.to(out_ptr.dtype.element_ty), mask=m_e)
    tl.store(scale_ptr + o_row, b_scale, mask=m_n)


# d_heads = grad * scale * gain - heads * <grad, heads> * gain * scale^3 * weight / d, and the sum of
# <grad, heads> * scale over this program's tokens, a part of the gradient of the gain of its head.
#
# A program: one head of BLOCK_M tokens. Bytes: 3 n H d e, 4 n H of scales, 4 H n / BLOCK_M of sums.
# Operations: 6 n H d. Floor: the bytes; A, B and C with H = 8, d = 64 in bf16: 6 us.
@jit
def _scale_heads_backward(
    grad_ptr,
    heads_ptr,
    gain_ptr,
    scale_ptr,
    d_heads_ptr,
    d_gain_ptr,
    n: tl.int32,
    units: tl.int32,
    has_gain: tl.int32,
    weight: tl.float32,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
):
    d = units * UNIT
    o_row, o_e, m_n, m_e = _places(n, d, BLOCK_M, SIZE)
    # [BLOCK_M, SIZE]
    b_grad = tl.load(grad_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
    # [BLOCK_M, SIZE]
    b_heads = tl.load(heads_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
    # [BLOCK_M]
    b_scale = tl.load(scale_ptr + o_row, mask=m_n, other=0.0)
    gain = tl.load(gain_ptr + tl.program_id(1), mask=has_gain != 0, other=1.0)
    b_d_gain = tl.sum(b_grad * b_heads, axis=1) * b_scale
    b_factor = b_scale * gain
    b_along = b_d_gain * (b_factor * b_scale) * (-weight / d)
    b_d_heads = b_grad * b_factor[:, None] + b_heads * b_along[:, None]
    tl.store(d_heads_ptr + o_e, b_d_heads.to(d_heads_ptr.dtype.element_ty), mask=m_e)
    tl.store(d_gain_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(b_d_gain, axis=0))


def _variant(backward: bool, dtype: torch.dtype, unit: int, size: int) -> Variant:
    wide = torch.float32
    if backward:
        tensors = {"grad_ptr": dtype, "heads_ptr": dtype, "gain_ptr": wide, "scale_ptr": wide}
        tensors |= {"d_heads_ptr": dtype, "d_gain_ptr": wide}
    else:
        tensors = {"heads_ptr": dtype, "gain_ptr": wide, "out_ptr": dtype, "scale_ptr": wide}
    constants = {"UNIT": unit, "BLOCK_M": ELEMENTS // size, "SIZE": size}
    return Variant(_scale_heads_backward if backward else _scale_heads, tensors, constants, num_warps=4, num_stages=1)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    return [
        _variant(backward, dtype, unit, size)
        for backward in (False, True)
        for dtype in FLOATS
        for unit in vector_units(dtype)
        for size in SIZES
    ]


def scale_heads(heads: Tensor, gain: Tensor | None, least: float, weight: float) -> tuple[Tensor, Tensor]:
    """heads [..., H, d], gain [H] -> heads * scale * gain in heads' dtype, and scale [..., H, 1] float32."""
    size = _size(heads)
    if size is None:
        return portable.scale_heads(heads, gain, least, weight)
    heads = aligned(heads)
    out, scale = torch.empty_like(heads), heads.new_empty(*heads.shape[:-1], 1, dtype=torch.float32)
    gains = scale if gain is None else aligned(gain.float())
    _launch(False, size, heads, (heads, gains, out, scale), (int(gain is not None), least, weight))
    return out, scale


def scale_heads_backward(
    grad: Tensor, heads: Tensor, gain: Tensor | None, scale: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """grad [..., H, d] of what `scale_heads` gave -> the gradient of heads, and that of gain [H].

    Deterministic. Without a gain the second one, [H], has no meaning.
    """
    size = _size(heads)
    if size is None:
        return portable.scale_heads_backward(grad, heads, gain, scale, weight)
    grad, heads, scale = aligned(grad.to(heads.dtype)), aligned(heads), aligned(scale)
    d_heads = torch.empty_like(heads)
    n, n_heads = heads.shape[:-2].numel(), heads.shape[-2]
    parts = heads.new_empty(triton.cdiv(n, ELEMENTS // size), n_heads, dtype=torch.float32)
    gains = scale if gain is None else aligned(gain.float())
    given = grad, heads, gains, scale, d_heads, parts
    _launch(True, size, heads, given, (int(gain is not None), weight))
    return d_heads, parts[0] if gain is None else parts.sum(dim=0).to(gain.dtype)


def _launch(
    backward: bool, size: int, heads: Tensor, given: tuple[Tensor, ...], numbers: tuple[int | float, ...]
) -> None:
    n, (n_heads, d) = heads.shape[:-2].numel(), heads.shape[-2:]
    unit = unit_of(heads.dtype, d)
    variant = _variant(backward, heads.dtype, unit, size)
    grid = triton.cdiv(n, variant.constants["BLOCK_M"]), n_heads
    variant.launch(grid, *given, n, d // unit, *numbers)


def _size(heads: Tensor) -> int | None:
    """The width of tiles; None where the kernels have none."""
    if heads.numel() == 0 or heads.dtype not in FLOATS:
        return None
    return next((size for size in SIZES if heads.shape[-1] <= size), None)
