"""lookback_attention: attention to strictly earlier positions, a price on log-distance, and the choice of nothing.

score(t, j) = <q_t, k_j> / sqrt(d_head) - slope * log(t - j), for j < t in the same document, and one null score a
head, whose value is zero. Computed in tiles with a running softmax; no [T, T] is ever in memory.

The null slot is where the running softmax starts (maximum = null, sum = 1, output = 0), so that position 0 and
masked-out queries need no special case: they see nothing else, and their output is 0.

Scores are kept in units of log 2, since the hardware has 2^x: <q, k> * scale * log2(e) - slope * log2(t - j) and
null * log2(e). That is the same number to float32 rounding: log(t - j) * log2(e) is log2(t - j).

Three kernels: `_forward`; `_backward_queries` (dq, and the parts of dslope and dnull); `_backward_keys` (dk, dv).
Each product of tiles is 2 d operations a visible pair: two of them forward, three and four backward. Beside the
products a pair costs one 2^x (16 a clock and multiprocessor) and about 20 other float operations (128 a clock),
half of them for log2 of the distance, which is the accurate one, not the hardware's approximation. Floor: the
products at the rate of the tensor cores, or those 20 operations, whichever takes longer: on an H100 (about 4,000
operations in products a clock and multiprocessor) the latter, for d_head + d_value below about 300.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..portable import lookback_attention as portable
from .variant import Variant, aligned, dot_precision, dtypes_and_precisions, jit

SIZES = (16, 32, 64, 128, 256)  # tiles are this wide: the first that holds both d_head and d_value
# Wider heads than that take the plain PyTorch path: a tile of them does not fit the registers.
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _rows(ptr, window, head, o_t, o_d, stride_b, stride_t, stride_h, UNIT: tl.constexpr):
    """Pointers to [o_t, o_d] of one window and head of a [B, T, H, d] tensor with these strides, in units."""
    return ptr + (window * stride_b + head * stride_h) * UNIT + o_t[:, None] * (stride_t * UNIT) + o_d[None, :]


@triton.jit
def _packed(ptr, window, head, o_t, o_d, T, H, d):
    """The same for a contiguous tensor."""
    return ptr + (window * T * H + head) * d + o_t.to(tl.int64)[:, None] * (H * d) + o_d[None, :]


@triton.jit
def _scores(b_qk, o_t, o_j, b_starts, b_mask, scale, slope):
    """Scores in units of log 2, -inf where t does not see j, and the log2 of the distance."""
    b_log = tl.log2(tl.maximum(o_t - o_j, 1).to(tl.float32))
    b_scores = b_qk * (scale * _LOG2E) - slope * b_log
    m_visible = (o_j < o_t) & (o_j >= b_starts) & b_mask
    return tl.where(m_visible, b_scores, float("-inf")), b_log


# out_t = sum_j softmax(scores_t, null)_j v_j, and lse_t = log(exp(null) + sum_j exp(score(t, j))).
#
# A program takes BLOCK_T queries of one window and head, the last blocks, which see most, first. It goes over
# the keys from the start of the first query's document to its own last query.
# Operations: 2 (d_head + d_value) a visible pair. Bytes: q, k, v read and out, lse written once from memory if
# L2 holds a window's keys and values; from L2, BLOCK_T times fewer than pairs. Floor: see the top.
@jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    null_ptr,
    mask_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    T: tl.int32,
    H: tl.int32,
    head_units: tl.int32,
    value_units: tl.int32,
    scale: tl.float32,
    q_b: tl.int64,
    q_t: tl.int64,
    q_h: tl.int64,
    k_b: tl.int64,
    k_t: tl.int64,
    k_h: tl.int64,
    v_b: tl.int64,
    v_t: tl.int64,
    v_h: tl.int64,
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    window = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    slope = tl.load(slope_ptr + head)
    null = tl.load(null_ptr + head) * _LOG2E
    o_d = tl.arange(0, SIZE)
    m_head = o_d < head_units * UNIT
    m_value = o_d < value_units * UNIT
    o_t = first + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    # [BLOCK_T]: 0 for a position that does not take part, which then sees nothing, as if it began after T
    b_mask_t = tl.load(mask_ptr + window * T + o_t, mask=m_t, other=0)
    b_starts = tl.load(starts_ptr + window * T + o_t, mask=m_t, other=0)
    b_starts = tl.where(b_mask_t != 0, b_starts, T)
    # [BLOCK_T, SIZE]
    b_q = tl.load(_rows(q_ptr, window, head, o_t, o_d, q_b, q_t, q_h, UNIT), mask=m_t[:, None] & m_head, other=0.0)

    b_max = tl.zeros([BLOCK_T], tl.float32) + null  # nothing is what comes first
    b_sum = tl.full([BLOCK_T], 1.0, tl.float32)
    b_out = tl.zeros([BLOCK_T, SIZE], tl.float32)
    begin = tl.maximum(tl.load(starts_ptr + window * T + first), 0) // BLOCK_J * BLOCK_J
    for start in range(begin, min(first + BLOCK_T, T) - 1, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        m_j = o_j < T
        # [BLOCK_J]
        b_mask = tl.load(mask_ptr + window * T + o_j, mask=m_j, other=0) != 0
        # [BLOCK_J, SIZE]
        p_k = _rows(k_ptr, window, head, o_j, o_d, k_b, k_t, k_h, UNIT)
        b_k = tl.load(p_k, mask=m_j[:, None] & m_head, other=0.0)
        b_qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        b_scores, _ = _scores(b_qk, o_t[:, None], o_j[None, :], b_starts[:, None], b_mask[None, :], scale, slope)
        b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_weights = tl.exp2(b_scores - b_new_max[:, None])
        b_shrink = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_shrink + tl.sum(b_weights, axis=1)
        # [BLOCK_J, SIZE]
        p_v = _rows(v_ptr, window, head, o_j, o_d, v_b, v_t, v_h, UNIT)
        b_v = tl.load(p_v, mask=m_j[:, None] & m_value, other=0.0)
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision=PRECISION)
        b_max = b_new_max

    p_out = _packed(out_ptr, window, head, o_t, o_d, T, H, value_units * UNIT)
    tl.store(p_out, (b_out / b_sum[:, None]).to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_value)
    b_lse = (b_max + tl.log2(b_sum)) * _LN2
    tl.store(lse_ptr + (window * H + head) * T + o_t, b_lse, mask=m_t)


# With w(t, j) the softmax weights, w(t, null) that of nothing, delta_t = <out_t, grad_t> and
# ds(t, j) = w(t, j) (<grad_t, v_j> - delta_t):
#     dq_t = scale sum_j ds(t, j) k_j;  dslope = -sum ds(t, j) log(t - j);  dnull = -sum_t w(t, null) delta_t
#
# A program takes BLOCK_T queries of one window and head, over the same keys as `_forward`. It writes its delta for
# `_backward_keys`, and its own part of dslope and dnull, which are then added in a fixed order.
# Operations: 2 (2 d_head + d_value) a visible pair. Bytes: as `_forward`, and out, grad, delta, dq.
@jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    null_ptr,
    mask_ptr,
    starts_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dslope_ptr,
    dnull_ptr,
    T: tl.int32,
    H: tl.int32,
    head_units: tl.int32,
    value_units: tl.int32,
    scale: tl.float32,
    q_b: tl.int64,
    q_t: tl.int64,
    q_h: tl.int64,
    k_b: tl.int64,
    k_t: tl.int64,
    k_h: tl.int64,
    v_b: tl.int64,
    v_t: tl.int64,
    v_h: tl.int64,
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    window = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first = block * BLOCK_T
    slope = tl.load(slope_ptr + head)
    null = tl.load(null_ptr + head) * _LOG2E
    o_d = tl.arange(0, SIZE)
    m_head = o_d < head_units * UNIT
    m_value = o_d < value_units * UNIT
    o_t = first + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    # [BLOCK_T]
    b_mask_t = tl.load(mask_ptr + window * T + o_t, mask=m_t, other=0)
    b_starts = tl.load(starts_ptr + window * T + o_t, mask=m_t, other=0)
    b_starts = tl.where(b_mask_t != 0, b_starts, T)
    b_lse = tl.load(lse_ptr + (window * H + head) * T + o_t, mask=m_t, other=0.0) * _LOG2E
    # [BLOCK_T, SIZE]: the gradient of a position that does not take part is not looked at
    m_grad = (b_mask_t != 0)[:, None] & m_value
    b_grad = tl.load(_packed(grad_ptr, window, head, o_t, o_d, T, H, value_units * UNIT), mask=m_grad, other=0.0)
    b_out = tl.load(_packed(out_ptr, window, head, o_t, o_d, T, H, value_units * UNIT), mask=m_grad, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), axis=1)
    tl.store(delta_ptr + (window * H + head) * T + o_t, b_delta, mask=m_t)
    # [BLOCK_T, SIZE]
    b_q = tl.load(_rows(q_ptr, window, head, o_t, o_d, q_b, q_t, q_h, UNIT), mask=m_t[:, None] & m_head, other=0.0)

    b_dslope = tl.zeros([BLOCK_T], tl.float32)
    b_dq = tl.zeros([BLOCK_T, SIZE], tl.float32)
    begin = tl.maximum(tl.load(starts_ptr + window * T + first), 0) // BLOCK_J * BLOCK_J
    for start in range(begin, min(first + BLOCK_T, T) - 1, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        m_j = o_j < T
        # [BLOCK_J]
        b_mask = tl.load(mask_ptr + window * T + o_j, mask=m_j, other=0) != 0
        # [BLOCK_J, SIZE]
        p_k = _rows(k_ptr, window, head, o_j, o_d, k_b, k_t, k_h, UNIT)
        b_k = tl.load(p_k, mask=m_j[:, None] & m_head, other=0.0)
        # [BLOCK_J, SIZE]
        p_v = _rows(v_ptr, window, head, o_j, o_d, v_b, v_t, v_h, UNIT)
        b_v = tl.load(p_v, mask=m_j[:, None] & m_value, other=0.0)
        b_qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        b_scores, b_log = _scores(b_qk, o_t[:, None], o_j[None, :], b_starts[:, None], b_mask[None, :], scale, slope)
        b_weights = tl.exp2(b_scores - b_lse[:, None])
        b_dweights = tl.dot(b_grad, b_v.T, input_precision=PRECISION)
        b_dscores = b_weights * (b_dweights - b_delta[:, None])
        b_dslope -= tl.sum(b_dscores * b_log, axis=1)
        b_dq = tl.dot(b_dscores.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)

    p_dq = _packed(dq_ptr, window, head, o_t, o_d, T, H, head_units * UNIT)
    tl.store(p_dq, (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=m_t[:, None] & m_head)
    part = (window * H + head) * tl.num_programs(1) + block
    b_dnull = tl.where(m_t, -tl.exp2(null - b_lse) * b_delta, 0.0)
    tl.store(dslope_ptr + part, tl.sum(b_dslope, axis=0) * _LN2)
    tl.store(dnull_ptr + part, tl.sum(b_dnull, axis=0))


# dv_j = sum_t w(t, j) grad_t and dk_j = scale sum_t ds(t, j) q_t, with w and ds as above.
#
# A program takes BLOCK_J keys of one window and head, and goes over the queries from its first key to the end of
# its last key's document (`ends`). Tiles are [BLOCK_J, BLOCK_T], so that sums over t are products of tiles.
# Operations: 4 (d_head + d_value) a visible pair. Bytes: q, k, v, grad, lse, delta read, dk, dv written.
@jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    mask_ptr,
    starts_ptr,
    ends_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    T: tl.int32,
    H: tl.int32,
    head_units: tl.int32,
    value_units: tl.int32,
    scale: tl.float32,
    q_b: tl.int64,
    q_t: tl.int64,
    q_h: tl.int64,
    k_b: tl.int64,
    k_t: tl.int64,
    k_h: tl.int64,
    v_b: tl.int64,
    v_t: tl.int64,
    v_h: tl.int64,
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    window = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    first = tl.program_id(1) * BLOCK_J
    slope = tl.load(slope_ptr + head)
    o_d = tl.arange(0, SIZE)
    m_head = o_d < head_units * UNIT
    m_value = o_d < value_units * UNIT
    o_j = first + tl.arange(0, BLOCK_J)
    m_j = o_j < T
    # [BLOCK_J]
    b_mask = tl.load(mask_ptr + window * T + o_j, mask=m_j, other=0) != 0
    # [BLOCK_J, SIZE]
    b_k = tl.load(_rows(k_ptr, window, head, o_j, o_d, k_b, k_t, k_h, UNIT), mask=m_j[:, None] & m_head, other=0.0)
    # [BLOCK_J, SIZE]
    b_v = tl.load(_rows(v_ptr, window, head, o_j, o_d, v_b, v_t, v_h, UNIT), mask=m_j[:, None] & m_value, other=0.0)

    b_dk = tl.zeros([BLOCK_J, SIZE], tl.float32)
    b_dv = tl.zeros([BLOCK_J, SIZE], tl.float32)
    end = tl.load(ends_ptr + window * T + min(first + BLOCK_J, T) - 1)
    for start in range((first + 1) // BLOCK_T * BLOCK_T, min(end, T), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        # [BLOCK_T]
        b_mask_t = tl.load(mask_ptr + window * T + o_t, mask=m_t, other=0)
        b_starts = tl.load(starts_ptr + window * T + o_t, mask=m_t, other=0)
        b_starts = tl.where(b_mask_t != 0, b_starts, T)
        b_lse = tl.load(lse_ptr + (window * H + head) * T + o_t, mask=m_t, other=0.0) * _LOG2E
        b_delta = tl.load(delta_ptr + (window * H + head) * T + o_t, mask=m_t, other=0.0)
        # [BLOCK_T, SIZE]
        p_q = _rows(q_ptr, window, head, o_t, o_d, q_b, q_t, q_h, UNIT)
        b_q = tl.load(p_q, mask=m_t[:, None] & m_head, other=0.0)
        # [BLOCK_T, SIZE]
        p_grad = _packed(grad_ptr, window, head, o_t, o_d, T, H, value_units * UNIT)
        b_grad = tl.load(p_grad, mask=m_t[:, None] & m_value, other=0.0)
        b_kq = tl.dot(b_k, b_q.T, input_precision=PRECISION)
        b_scores, _ = _scores(b_kq, o_t[None, :], o_j[:, None], b_starts[None, :], b_mask[:, None], scale, slope)
        b_weights = tl.exp2(b_scores - b_lse[None, :])
        b_dv = tl.dot(b_weights.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_dweights = tl.dot(b_v, b_grad.T, input_precision=PRECISION)
        b_dscores = b_weights * (b_dweights - b_delta[None, :])
        b_dk = tl.dot(b_dscores.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    p_dk = _packed(dk_ptr, window, head, o_j, o_d, T, H, head_units * UNIT)
    tl.store(p_dk, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_j[:, None] & m_head)
    p_dv = _packed(dv_ptr, window, head, o_j, o_d, T, H, value_units * UNIT)
    tl.store(p_dv, b_dv.to(dv_ptr.dtype.element_ty), mask=m_j[:, None] & m_value)


_DTYPES = {
    **dict.fromkeys(["slope_ptr", "null_ptr", "lse_ptr", "delta_ptr", "dslope_ptr", "dnull_ptr"], torch.float32),
    **dict.fromkeys(["starts_ptr", "ends_ptr"], torch.int32),
    "mask_ptr": torch.uint8,
}


# Queries in a block, keys in a block, warps, by the bytes of a row of a tile: what fits the registers and
# 99 KiB of shared memory. "ieee" products, by the 32-bit units, take their operands through registers.
_BLOCKS = {
    "_forward": {256: (128, 64, 8), 512: (64, 32, 8), 1024: (32, 16, 4)},
    "_backward_queries": {128: (64, 64, 8), 256: (64, 32, 8), 512: (32, 32, 8), 1024: (16, 16, 4)},
    "_backward_keys": {128: (32, 64, 4), 512: (32, 32, 8), 1024: (16, 16, 8)},
    "ieee": {64: (32, 32, 4), 1024: (16, 16, 4)},
}


def _variant(kernel: Any, dtype: torch.dtype, precision: str, size: int) -> Variant:
    """All other tensors are in the dtype of q, k and v."""
    tensors = {name: _DTYPES.get(name, dtype) for name in kernel.arg_names if name.endswith("_ptr")}
    by_bytes = _BLOCKS["ieee" if precision == "ieee" else kernel.__name__]
    row_bytes = next(limit for limit in by_bytes if dtype.itemsize * size <= limit)
    block_t, block_j, num_warps = by_bytes[row_bytes]
    blocks = {"BLOCK_T": block_t, "BLOCK_J": block_j, "SIZE": size}
    constants = {"UNIT": 16 // dtype.itemsize, **blocks, "PRECISION": precision}
    return Variant(kernel, tensors, constants, num_warps, num_stages=2)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    return [
        _variant(kernel, dtype, precision, size)
        for kernel in (_forward, _backward_queries, _backward_keys)
        for dtype, precision in dtypes_and_precisions()
        for size in SIZES
    ]


def forward(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What each position takes from those before it.

    q, k [B, T, H, d_head], v [B, T, H, d_value] of one dtype (float32, bfloat16 or float16), with any strides,
    slope [H], null [H], mask [B, T] bool: True where a position looks and is looked at,
    starts [B, T] integer: where the document of each position begins (non-decreasing along T)
    -> out [B, T, H, d_value] in the dtype of v, lse [B, H, T] float32: the log of the sum of the exponentials of
    the scores, the null score among them. A masked-out position gives 0, and its null score.
    """
    B, T, H, d_head = q.shape
    d_value = v.shape[3]
    if max(d_head, d_value) > SIZES[-1]:
        return portable.forward(q, k, v, slope, null, mask, starts)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    q, k, v = _in_units(q), _in_units(k), _in_units(v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out, lse.copy_(null[None, :, None].expand(B, H, T))
    variant = _variant(_forward, q.dtype, dot_precision(q.dtype), _size(d_head, d_value))
    of_heads = aligned(slope.float()), aligned(null.float())
    variant.launch(
        (B * H, triton.cdiv(T, variant.constants["BLOCK_T"])),
        *(q, k, v, *of_heads, *_positions(q, mask, starts), out, lse),
        *_numbers(q, k, v, d_head),
    )
    return out[..., :d_value].contiguous(), lse


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
    """The gradients of `forward`'s out: grad_out and out as out, lse as it returned it, the rest as it took them.

    -> dq, dk, dv, dslope, dnull, in the shapes and dtypes of their inputs. Deterministic.
    """
    B, T, H, d_head = q.shape
    d_value = v.shape[3]
    if max(d_head, d_value) > SIZES[-1]:
        return portable.backward(grad_out, q, k, v, slope, null, mask, starts, out, lse)
    if B * T * H * d_head * d_value == 0:
        dq, dk, dv, dslope, dnull = (torch.zeros_like(tensor) for tensor in (q, k, v, slope, null))
        return dq, dk, dv, dslope, dnull
    q, k, v = _in_units(q), _in_units(k), _in_units(v)
    grad, out = _in_units(grad_out.to(v.dtype)).contiguous(), _in_units(out).contiguous()
    mask, starts = _positions(q, mask, starts)
    positions = torch.arange(T, dtype=torch.int32, device=q.device).expand(B, T).contiguous()
    ends = torch.searchsorted(starts, positions, right=True).to(torch.int32)  # one past each one's document
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=q.device) for tensor in (q, k, v))
    delta = torch.empty_like(lse)
    of_heads = aligned(slope.float()), aligned(null.float())
    numbers = _numbers(q, k, v, d_head)
    precision, size = dot_precision(q.dtype), _size(d_head, d_value)

    by_queries = _variant(_backward_queries, q.dtype, precision, size)
    blocks = triton.cdiv(T, by_queries.constants["BLOCK_T"])
    dslope, dnull = (torch.empty(B, H, blocks, dtype=torch.float32, device=q.device) for _ in range(2))
    by_queries.launch(
        (B * H, blocks),
        *(q, k, v, *of_heads, mask, starts, out, grad, lse, delta, dq, dslope, dnull),
        *numbers,
    )
    by_keys = _variant(_backward_keys, q.dtype, precision, size)
    by_keys.launch(
        (B * H, triton.cdiv(T, by_keys.constants["BLOCK_J"])),
        *(q, k, v, of_heads[0], mask, starts, ends, grad, lse, delta, dk, dv),
        *numbers,
    )
    return (
        dq[..., :d_head].contiguous(),
        dk[..., :d_head].contiguous(),
        dv[..., :d_value].contiguous(),
        dslope.sum(dim=(0, 2)).to(slope.dtype),
        dnull.sum(dim=(0, 2)).to(null.dtype),
    )


def _size(d_head: int, d_value: int) -> int:
    return next(size for size in SIZES if max(d_head, d_value) <= size)


def _in_units(tensor: Tensor) -> Tensor:
    """[B, T, H, d] with d, the strides and the address multiples of 16 bytes: zeros at the end of d, or a copy."""
    unit = 16 // tensor.dtype.itemsize
    d = tensor.shape[3]
    if d % unit:
        return torch.nn.functional.pad(tensor, (0, unit - d % unit))
    in_place = tensor.stride(3) == 1 and not any(stride % unit for stride in tensor.stride()[:3])
    return tensor if in_place and tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


def _positions(q: Tensor, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """mask [B, T] uint8 and starts [B, T] int32, made up where not given: one form of each kernel serves all."""
    B, T = q.shape[:2]
    if mask is None:
        mask = torch.ones(B, T, dtype=torch.bool, device=q.device)
    if starts is None:
        starts = torch.zeros(B, T, dtype=torch.int32, device=q.device)
    return aligned(mask.contiguous().view(torch.uint8)), aligned(starts.to(torch.int32))


def _numbers(q: Tensor, k: Tensor, v: Tensor, d_head: int) -> tuple[int | float, ...]:
    """The arguments after the tensors, which all three kernels share."""
    unit = 16 // q.dtype.itemsize
    T, H = q.shape[1:3]
    strides = (stride // unit for tensor in (q, k, v) for stride in tensor.stride()[:3])
    return T, H, q.shape[3] // unit, v.shape[3] // unit, 1 / math.sqrt(d_head), *strides
