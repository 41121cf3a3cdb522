"""lookback_attention: strictly causal attention with a log-distance bias and a null score.

score(t, j) = <q_t, k_j> / sqrt(d_head) - slope * log(t - j), for j < t in the same document. The bias is like ALiBi's,
with log-distance in place of distance. Each head has one null score, an attention sink whose value is zero.

The kernels are FlashAttention's (Dao et al. 2022): tiles with an online softmax, so no [T, T] is ever in memory. The
online softmax starts from the null score (maximum = null, sum = 1, output = 0). So position 0 and masked-out queries
need no special case: they see only the null slot, and their output is 0.

Scores are in base 2, because the hardware computes 2^x: <q, k> * scale * log2(e) - slope * log2(t - j), and
null * log2(e). Since log(t - j) * log2(e) = log2(t - j), the weights are the same up to float32 rounding.

Three kernels: `_forward`; `_backward_queries` (dq, and partial sums of dslope and dnull); `_backward_keys` (dk, dv).
A product of tiles costs 2 d operations a pair: two products forward, three in `_backward_queries`, four in
`_backward_keys`. Only tiles on the diagonal or across a document's start compare positions. The mask of keys is a
number, 0 or -inf, added by the multiply-add that scales <q, k>. Counted from the code for sm_90 and 16-bit inputs, a
pair costs 20 instructions in `_forward`, 21 and 24 in the others, one 2^x and one log2 of the hardware (16 a clock and
multiprocessor) among them. Strict float32 takes the accurate log2, of about 18 operations.

Predicted for an H200 (kernels/PREDICTED.md), bfloat16, B=8, T=1024, H=8, d_head = d_value = 64. 34 million pairs are
visible; the tiles that hold them have 38 million:

                        products    2^x and log2    instructions    from L2    predicted
    _forward            13 us       21 us           26 us           16 us      31 us, with waits
    _backward_queries   18 us       18 us           28 us           30 us      30 us
    _backward_keys      22 us       18 us           32 us           30 us      32 us

The keys and values of one window and head are 256 KB, and L2 serves them to all programs of that head.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..portable import lookback_attention as portable
from . import tuning
from .variant import Variant, aligned, dot_precision, dtypes_and_precisions, jit

SIZES = (16, 32, 64, 128, 256)  # widths of a tile: the first that holds both d_head and d_value is taken
# Widest tile whose tensor-core products fit the registers, by bytes an element. Wider float32 heads use the 32-bit
# units ("ieee"). Wider 16-bit heads, and heads wider than all tiles, take the PyTorch path.
WIDEST = {2: 256, 4: 64}
WIDEST_ON_AMD = {2: 128, 4: 64}
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_PAD = tl.constexpr(128)  # every BLOCK_T and BLOCK_J divides this
_ON_AMD = torch.version.hip is not None


@triton.jit
def _rows(ptr, window, head, o_t, o_d, stride_b, stride_t, stride_h, UNIT: tl.constexpr):
    """Pointers to [o_t, o_d] of one window and head of a [B, T, H, d] tensor. Strides are in units of UNIT elements."""
    return ptr + (window * stride_b + head * stride_h) * UNIT + o_t[:, None] * (stride_t * UNIT) + o_d[None, :]


@triton.jit
def _packed(ptr, window, head, o_t, o_d, T, H, d):
    """`_rows` of a contiguous tensor."""
    return ptr + (window * T * H + head) * d + o_t.to(tl.int64)[:, None] * (H * d) + o_d[None, :]


@triton.jit
def _log2_distance(o_t, o_j, FAST_LOG: tl.constexpr):
    """log2(t - j), or 0 if j >= t. Exact for positions up to 2^24, as far as float32 holds every integer."""
    b_distance = tl.maximum(o_t.to(tl.float32) - o_j.to(tl.float32), 1.0)
    return libdevice.fast_log2f(b_distance) if FAST_LOG else tl.log2(b_distance)


# out_t = sum_{j < t} softmax(scores_t, null)_j v_j and lse_t = log(exp(null) + sum_j exp(score(t, j)))
#
# A program: BLOCK_T queries of one window and head, over the keys from the start of the first query's document to its
# own last query. The last blocks of queries see most keys, so they are launched first.
# Operations: 2 (d_head + d_value) a visible pair. Bytes: from memory q, k, v, out and lse once, if L2 holds a window's
# keys and values; from L2 each program reads the keys and values that it sees, once for BLOCK_T queries.
# Floor and prediction: at the top of this file.
@jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    null_ptr,
    hidden_ptr,
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
    FAST_LOG: tl.constexpr,
):
    window = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    padded = tl.cdiv(T, _PAD) * _PAD
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    slope = tl.load(slope_ptr + head)
    null = tl.load(null_ptr + head) * _LOG2E
    o_d = tl.arange(0, SIZE)
    m_head = o_d < head_units * UNIT
    m_value = o_d < value_units * UNIT
    o_t = first + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    # [BLOCK_T]
    b_starts = tl.load(starts_ptr + window * T + o_t, mask=m_t, other=0)
    last_start = tl.load(starts_ptr + window * T + min(first + BLOCK_T, T) - 1)
    # [BLOCK_T, SIZE]
    b_q = tl.load(_rows(q_ptr, window, head, o_t, o_d, q_b, q_t, q_h, UNIT), mask=m_t[:, None] & m_head, other=0.0)

    b_max = tl.zeros([BLOCK_T], tl.float32) + null  # the online softmax starts from the null score
    b_sum = tl.full([BLOCK_T], 1.0, tl.float32)
    b_out = tl.zeros([BLOCK_T, SIZE], tl.float32)
    begin = tl.maximum(tl.load(starts_ptr + window * T + first), 0) // BLOCK_J * BLOCK_J
    for start in range(begin, min(first + BLOCK_T, T) - 1, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        m_j = o_j < T
        # [BLOCK_J]
        b_hidden = tl.load(hidden_ptr + window * padded + o_j)
        # [BLOCK_J, SIZE]
        p_k = _rows(k_ptr, window, head, o_j, o_d, k_b, k_t, k_h, UNIT)
        b_k = tl.load(p_k, mask=m_j[:, None] & m_head, other=0.0)
        b_qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        b_log = _log2_distance(o_t[:, None], o_j[None, :], FAST_LOG)
        b_scores = b_qk * (scale * _LOG2E) + b_hidden[None, :] - slope * b_log
        if (start + BLOCK_J > first) | (start < last_start):  # in other tiles all pairs are visible
            m_visible = (o_j[None, :] < o_t[:, None]) & (o_j[None, :] >= b_starts[:, None])
            b_scores = tl.where(m_visible, b_scores, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_weights = tl.exp2(b_scores - b_new_max[:, None])
        b_rescale = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.sum(b_weights, axis=1)
        # [BLOCK_J, SIZE]
        p_v = _rows(v_ptr, window, head, o_j, o_d, v_b, v_t, v_h, UNIT)
        b_v = tl.load(p_v, mask=m_j[:, None] & m_value, other=0.0)
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision=PRECISION)
        b_max = b_new_max

    # Masked queries were computed like the others; their output is zeroed.
    m_part = tl.load(hidden_ptr + window * padded + o_t) == 0.0
    b_out = tl.where(m_part[:, None], b_out / b_sum[:, None], 0.0)
    p_out = _packed(out_ptr, window, head, o_t, o_d, T, H, value_units * UNIT)
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_value)
    b_lse = tl.where(m_part, b_max + tl.log2(b_sum), null) * _LN2
    tl.store(lse_ptr + (window * H + head) * T + o_t, b_lse, mask=m_t)


# With the softmax weights w(t, j) = exp(score(t, j) - lse_t), w(t, null) = exp(null - lse_t), delta_t = <out_t, grad_t>
# and ds(t, j) = w(t, j) (<grad_t, v_j> - delta_t):
#     dq_t = scale sum_j ds(t, j) k_j;  dslope = -sum ds(t, j) log(t - j);  dnull = -sum_t w(t, null) delta_t
#
# A program: BLOCK_T queries of one window and head, over the same keys as `_forward`. It writes delta for
# `_backward_keys`, and partial sums of dslope and dnull; the launcher adds those in a fixed order.
# Operations: 2 (2 d_head + d_value) a visible pair. Bytes: as `_forward`, and out, grad, delta, dq. Floor and
# prediction: at the top of this file.
@jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    null_ptr,
    hidden_ptr,
    starts_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    lse2_ptr,
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
    FAST_LOG: tl.constexpr,
):
    window = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    padded = tl.cdiv(T, _PAD) * _PAD
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
    b_starts = tl.load(starts_ptr + window * T + o_t, mask=m_t, other=0)
    last_start = tl.load(starts_ptr + window * T + min(first + BLOCK_T, T) - 1)
    m_part = tl.load(hidden_ptr + window * padded + o_t) == 0.0
    # [BLOCK_T]: inf for masked queries, which makes all their weights 0
    b_lse = tl.load(lse_ptr + (window * H + head) * T + o_t, mask=m_part, other=float("inf")) * _LOG2E
    # [BLOCK_T, SIZE] each: zeros for masked queries
    m_grad = m_part[:, None] & m_value
    b_grad = tl.load(_packed(grad_ptr, window, head, o_t, o_d, T, H, value_units * UNIT), mask=m_grad, other=0.0)
    b_out = tl.load(_packed(out_ptr, window, head, o_t, o_d, T, H, value_units * UNIT), mask=m_grad, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), axis=1)
    tl.store(delta_ptr + (window * H + head) * padded + o_t, b_delta)
    tl.store(lse2_ptr + (window * H + head) * padded + o_t, b_lse)
    # [BLOCK_T, SIZE]
    b_q = tl.load(_rows(q_ptr, window, head, o_t, o_d, q_b, q_t, q_h, UNIT), mask=m_t[:, None] & m_head, other=0.0)

    b_dslope = tl.zeros([BLOCK_T], tl.float32)
    b_dq = tl.zeros([BLOCK_T, SIZE], tl.float32)
    begin = tl.maximum(tl.load(starts_ptr + window * T + first), 0) // BLOCK_J * BLOCK_J
    for start in range(begin, min(first + BLOCK_T, T) - 1, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        m_j = o_j < T
        # [BLOCK_J]
        b_hidden = tl.load(hidden_ptr + window * padded + o_j)
        # [BLOCK_J, SIZE]
        p_k = _rows(k_ptr, window, head, o_j, o_d, k_b, k_t, k_h, UNIT)
        b_k = tl.load(p_k, mask=m_j[:, None] & m_head, other=0.0)
        # [BLOCK_J, SIZE]
        p_v = _rows(v_ptr, window, head, o_j, o_d, v_b, v_t, v_h, UNIT)
        b_v = tl.load(p_v, mask=m_j[:, None] & m_value, other=0.0)
        b_qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        b_log = _log2_distance(o_t[:, None], o_j[None, :], FAST_LOG)
        b_scores = b_qk * (scale * _LOG2E) + b_hidden[None, :] - slope * b_log - b_lse[:, None]
        if (start + BLOCK_J > first) | (start < last_start):
            m_visible = (o_j[None, :] < o_t[:, None]) & (o_j[None, :] >= b_starts[:, None])
            b_scores = tl.where(m_visible, b_scores, float("-inf"))
        b_weights = tl.exp2(b_scores)
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


# dv_j = sum_t w(t, j) grad_t and dk_j = scale sum_t ds(t, j) q_t, with w and ds as in `_backward_queries`
#
# A program: BLOCK_J keys of one window and head, over the queries from its first key to the end of its last key's
# document (`ends`). Tiles are [BLOCK_J, BLOCK_T], so that sums over t are matrix products.
# Operations: 4 (d_head + d_value) a visible pair. Bytes: q, k, v, grad, lse, delta read, dk, dv written. Floor and
# prediction: at the top of this file.
@jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    slope_ptr,
    hidden_ptr,
    starts_ptr,
    ends_ptr,
    grad_ptr,
    lse2_ptr,
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
    FAST_LOG: tl.constexpr,
):
    window = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    padded = tl.cdiv(T, _PAD) * _PAD
    first = tl.program_id(1) * BLOCK_J
    slope = tl.load(slope_ptr + head)
    o_d = tl.arange(0, SIZE)
    m_head = o_d < head_units * UNIT
    m_value = o_d < value_units * UNIT
    o_j = first + tl.arange(0, BLOCK_J)
    m_j = o_j < T
    # [BLOCK_J, SIZE]
    b_k = tl.load(_rows(k_ptr, window, head, o_j, o_d, k_b, k_t, k_h, UNIT), mask=m_j[:, None] & m_head, other=0.0)
    # [BLOCK_J, SIZE]
    b_v = tl.load(_rows(v_ptr, window, head, o_j, o_d, v_b, v_t, v_h, UNIT), mask=m_j[:, None] & m_value, other=0.0)

    b_dk = tl.zeros([BLOCK_J, SIZE], tl.float32)
    b_dv = tl.zeros([BLOCK_J, SIZE], tl.float32)
    first_end = tl.load(ends_ptr + window * T + first)
    end = tl.load(ends_ptr + window * T + min(first + BLOCK_J, T) - 1)
    for start in range((first + 1) // BLOCK_T * BLOCK_T, min(end, T), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        # [BLOCK_T]
        b_lse = tl.load(lse2_ptr + (window * H + head) * padded + o_t, mask=m_t, other=float("inf"))
        b_delta = tl.load(delta_ptr + (window * H + head) * padded + o_t, mask=m_t, other=0.0)
        # [BLOCK_T, SIZE]
        p_q = _rows(q_ptr, window, head, o_t, o_d, q_b, q_t, q_h, UNIT)
        b_q = tl.load(p_q, mask=m_t[:, None] & m_head, other=0.0)
        # [BLOCK_T, SIZE]
        p_grad = _packed(grad_ptr, window, head, o_t, o_d, T, H, value_units * UNIT)
        b_grad = tl.load(p_grad, mask=m_t[:, None] & m_value, other=0.0)
        b_kq = tl.dot(b_k, b_q.T, input_precision=PRECISION)
        b_log = _log2_distance(o_t[None, :], o_j[:, None], FAST_LOG)
        b_scores = b_kq * (scale * _LOG2E) - b_lse[None, :] - slope * b_log
        if (start < first + BLOCK_J) | (start + BLOCK_T > first_end):
            # [BLOCK_T]
            b_starts = tl.load(starts_ptr + window * T + o_t, mask=m_t, other=0)
            m_visible = (o_j[:, None] < o_t[None, :]) & (o_j[:, None] >= b_starts[None, :])
            b_scores = tl.where(m_visible, b_scores, float("-inf"))
        b_weights = tl.exp2(b_scores)
        b_dv = tl.dot(b_weights.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_dweights = tl.dot(b_v, b_grad.T, input_precision=PRECISION)
        b_dscores = b_weights * (b_dweights - b_delta[None, :])
        b_dk = tl.dot(b_dscores.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    # Masked keys were computed like the others; their gradients are zeroed.
    m_part_j = tl.load(hidden_ptr + window * padded + o_j) == 0.0
    b_dk = tl.where(m_part_j[:, None], b_dk * scale, 0.0)
    b_dv = tl.where(m_part_j[:, None], b_dv, 0.0)
    p_dk = _packed(dk_ptr, window, head, o_j, o_d, T, H, head_units * UNIT)
    tl.store(p_dk, b_dk.to(dk_ptr.dtype.element_ty), mask=m_j[:, None] & m_head)
    p_dv = _packed(dv_ptr, window, head, o_j, o_d, T, H, value_units * UNIT)
    tl.store(p_dv, b_dv.to(dv_ptr.dtype.element_ty), mask=m_j[:, None] & m_value)


_DTYPES = {
    **dict.fromkeys(["slope_ptr", "null_ptr", "dslope_ptr", "dnull_ptr"], torch.float32),
    **dict.fromkeys(["hidden_ptr", "lse_ptr", "lse2_ptr", "delta_ptr"], torch.float32),
    **dict.fromkeys(["starts_ptr", "ends_ptr"], torch.int32),
}


# {widest SIZE: (BLOCK_T, BLOCK_J, warps)} for each kernel and bytes an element. They fit the registers of every GPU and
# 99 KiB of shared memory. "ieee" has its own, because its products take their operands through registers.
_BLOCKS = {
    ("_forward", 2): {128: (128, 64, 8), 256: (64, 16, 8)},
    ("_forward", 4): {16: (128, 64, 8), 32: (128, 32, 8), 64: (64, 64, 4)},
    ("_backward_queries", 2): {128: (64, 32, 4), 256: (64, 16, 8)},
    ("_backward_queries", 4): {64: (64, 32, 4)},
    ("_backward_keys", 2): {64: (32, 64, 4), 256: (16, 64, 8)},
    ("_backward_keys", 4): {32: (32, 64, 4), 64: (16, 64, 4)},
    ("_forward", "ieee"): {16: (32, 32, 4), 256: (16, 16, 4)},
    ("_backward_queries", "ieee"): {256: (16, 16, 4)},
    ("_backward_keys", "ieee"): {16: (32, 32, 4), 64: (16, 16, 4), 128: (32, 16, 4), 256: (16, 16, 4)},
}


def _variant(kernel: Any, dtype: torch.dtype, precision: str, size: int) -> Variant:
    """The default form. Tensors that _DTYPES does not list have the dtype of q, k and v."""
    tensors = {name: _DTYPES.get(name, dtype) for name in kernel.arg_names if name.endswith("_ptr")}
    by_width = _BLOCKS[kernel.__name__, "ieee" if precision == "ieee" else dtype.itemsize]
    block_t, block_j, num_warps = next(blocks for widest, blocks in by_width.items() if size <= widest)
    blocks = {"BLOCK_T": block_t, "BLOCK_J": block_j, "SIZE": size}
    # The fast logarithm, lg2.approx, has a relative error of 2^-22 at most, and TF32 products one of 2^-11. Triton's
    # interpreter lacks it.
    fast_log = precision != "ieee" and not triton.knobs.runtime.interpret
    constants = {"UNIT": 16 // dtype.itemsize, **blocks, "PRECISION": precision, "FAST_LOG": fast_log}
    variant = Variant(kernel, tensors, constants, num_warps, num_stages=2)
    return on_amd(variant) or variant if _ON_AMD else variant


def on_amd(variant: Variant) -> Variant | None:
    """The form that an AMD GPU launches in place of `variant`; None if it launches none."""
    itemsize = 16 // variant.constants["UNIT"]
    if variant.constants["PRECISION"] != "ieee" and variant.constants["SIZE"] > WIDEST_ON_AMD[itemsize]:
        return None
    return variant._replace(constants={**variant.constants, "FAST_LOG": False})  # lg2.approx is NVIDIA's


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    return [
        _variant(kernel, dtype, precision, size)
        for kernel in (_forward, _backward_queries, _backward_keys)
        for dtype, precision in dtypes_and_precisions()
        for size in SIZES
        if precision == "ieee" or size <= WIDEST[dtype.itemsize]
    ]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    if variant.constants["PRECISION"] == "ieee":
        return []
    # wgmma needs 64 rows of the accumulator for each 4 warps.
    rows, columns = ("BLOCK_J", "BLOCK_T") if variant.kernel is _backward_keys else ("BLOCK_T", "BLOCK_J")
    found = []
    for row_block, num_warps in ((64, 4), (128, 8)):
        for column_block in (16, 32, 64, 128):
            for num_stages in (2, 3):
                blocks = {rows: row_block, columns: column_block}
                constants = {**variant.constants, **blocks}
                found.append(variant._replace(constants=constants, num_warps=num_warps, num_stages=num_stages))
    return [other for other in found if other != variant]


def forward(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each position's attention output over the positions before it.

    Args:
        q, k: [B, T, H, d_head], with any strides. float32, bfloat16 or float16.
        v: [B, T, H, d_value], with any strides, in the dtype of q and k.
        slope, null: [H].
        mask: [B, T] bool; a position where it is False attends to nothing and is not attended to.
        starts: [B, T] integer, non-decreasing along T: where the document of each position begins.

    Returns out [B, T, H, d_value] in the dtype of v; lse [B, H, T] float32, the log of the softmax's denominator, null
    score included. A masked-out position has out 0 and lse = null.
    """
    B, T, H, d_head = q.shape
    d_value = v.shape[3]
    size, precision = _size_and_precision(q.dtype, max(d_head, d_value))
    if size is None:
        return portable.forward(q, k, v, slope, null, mask, starts)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    q, k, v = _in_units(q), _in_units(k), _in_units(v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out, lse.copy_(null[None, :, None].expand(B, H, T))
    variant = tuning.best(_variant(_forward, q.dtype, precision, size), q.device)
    slope_and_null = aligned(slope.float()), aligned(null.float())
    variant.launch(
        (B * H, triton.cdiv(T, variant.constants["BLOCK_T"])),
        *(q, k, v, *slope_and_null, *_positions(q, mask, starts), out, lse),
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
    """The gradients of `forward`, from that of its output; deterministic.

    grad_out, out: [B, T, H, d_value]. out and lse as `forward` returned them; other arguments as it took them.
    Returns dq, dk, dv, dslope, dnull, in the shapes and dtypes of their inputs.
    """
    B, T, H, d_head = q.shape
    d_value = v.shape[3]
    size, precision = _size_and_precision(q.dtype, max(d_head, d_value))
    if size is None:
        return portable.backward(grad_out, q, k, v, slope, null, mask, starts, out, lse)
    if B * T * H * d_head * d_value == 0:
        dq, dk, dv, dslope, dnull = (torch.zeros_like(tensor) for tensor in (q, k, v, slope, null))
        return dq, dk, dv, dslope, dnull
    q, k, v = _in_units(q), _in_units(k), _in_units(v)
    grad, out = _in_units(grad_out.to(v.dtype)).contiguous(), _in_units(out).contiguous()
    hidden, starts = _positions(q, mask, starts)
    positions = torch.arange(T, dtype=torch.int32, device=q.device).expand(B, T).contiguous()
    ends = torch.searchsorted(starts, positions, right=True).to(torch.int32)  # [B, T], one past the document's end
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=q.device) for tensor in (q, k, v))
    lse2, delta = torch.empty(2, B, H, hidden.shape[1], dtype=torch.float32, device=q.device)
    slope_and_null = aligned(slope.float()), aligned(null.float())
    numbers = _numbers(q, k, v, d_head)

    by_queries = tuning.best(_variant(_backward_queries, q.dtype, precision, size), q.device)
    blocks = triton.cdiv(T, by_queries.constants["BLOCK_T"])
    dslope, dnull = (torch.empty(B, H, blocks, dtype=torch.float32, device=q.device) for _ in range(2))
    by_queries.launch(
        (B * H, blocks),
        *(q, k, v, *slope_and_null, hidden, starts, out, grad, lse, lse2, delta, dq, dslope, dnull),
        *numbers,
    )
    by_keys = tuning.best(_variant(_backward_keys, q.dtype, precision, size), q.device)
    by_keys.launch(
        (B * H, triton.cdiv(T, by_keys.constants["BLOCK_J"])),
        *(q, k, v, slope_and_null[0], hidden, starts, ends, grad, lse2, delta, dk, dv),
        *numbers,
    )
    return (
        dq[..., :d_head].contiguous(),
        dk[..., :d_head].contiguous(),
        dv[..., :d_value].contiguous(),
        dslope.sum(dim=(0, 2)).to(slope.dtype),
        dnull.sum(dim=(0, 2)).to(null.dtype),
    )


def _size_and_precision(dtype: torch.dtype, width: int) -> tuple[int | None, str]:
    """The width of tiles, or None if the kernels have none so wide; and the precision of products."""
    size = next((size for size in SIZES if width <= size), None)
    precision = dot_precision(dtype)
    fits = size is not None and size <= (WIDEST_ON_AMD if _ON_AMD else WIDEST)[dtype.itemsize]
    if precision == "ieee" or fits:
        return size, precision
    return size if dtype == torch.float32 else None, "ieee"


def _in_units(tensor: Tensor) -> Tensor:
    """[B, T, H, d] with d, strides and address multiples of 16 bytes: itself, padded with zeros along d, or a copy."""
    unit = 16 // tensor.dtype.itemsize
    d = tensor.shape[3]
    if d % unit:
        return torch.nn.functional.pad(tensor, (0, unit - d % unit))
    in_place = tensor.stride(3) == 1 and not any(stride % unit for stride in tensor.stride()[:3])
    return tensor if in_place and tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


def _positions(q: Tensor, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """mask and starts in the form that the kernels take. Defaults replace None, so that one form of a kernel does.

    Returns hidden [B, T rounded up to a multiple of _PAD] float32, to be added to scores: 0 for positions in the mask,
    -inf for others and beyond T; starts [B, T] int32. A NaN in a key or value out of the mask is seen all the same:
    loads that leave it out would wait for `hidden`, and `_forward` take 44 us instead of 31 (by bench/predict).
    """
    B, T = q.shape[:2]
    hidden = torch.full((B, triton.cdiv(T, _PAD) * _PAD), -math.inf, dtype=torch.float32, device=q.device)
    hidden[:, :T] = 0.0 if mask is None else hidden[:, :T].masked_fill(mask, 0.0)
    if starts is None:
        starts = torch.zeros(B, T, dtype=torch.int32, device=q.device)
    return hidden, aligned(starts.to(torch.int32))


def _numbers(q: Tensor, k: Tensor, v: Tensor, d_head: int) -> tuple[int | float, ...]:
    """The arguments after the tensors, the same for all three kernels."""
    unit = 16 // q.dtype.itemsize
    T, H = q.shape[1:3]
    strides = (stride // unit for tensor in (q, k, v) for stride in tensor.stride()[:3])
    return T, H, q.shape[3] // unit, v.shape[3] // unit, 1 / math.sqrt(d_head), *strides
