"""The fraction of variance unexplained of a batch, and its gradient.

    residual = x - (decoded + c + bias)
    fvu      = sum_t weight_t |residual_t|^2 / sum_t weight_t |x_t - mean|^2        mean: of x, by weight

Three launches forward and one backward, where PyTorch takes some twenty, each a pass over [n, d] or a wait of its own.
The spread of x is merged from blocks of rows by the formula of Chan, Golub and LeVeque 1983, so x is read once, and
nothing is lost where the mean is large. Sums are in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feature_sums import widen
from .variant import Variant, aligned, jit, unit_of, vector_units

ROWS, STEPS, COLUMNS = 16, 8, 128  # a program handles ROWS * STEPS rows of COLUMNS columns
MERGED = 64  # blocks of rows whose means are merged together


@triton.jit
def _merged(b_mean, b_spread, weight, b_x, b_weights):
    """Mean, spread [COLUMNS] and weight of rows, with those of b_x [ROWS, COLUMNS] by b_weights [ROWS] among them."""
    here = tl.sum(b_weights, axis=0)
    b_here = tl.sum(b_x * b_weights[:, None], axis=0) / tl.maximum(here, 1e-30)
    b_off, b_delta = b_x - b_here[None, :], b_here - b_mean
    share = tl.where(here > 0, here / tl.maximum(weight + here, 1e-30), 0.0)
    b_spread += tl.sum(b_off * b_off * b_weights[:, None], axis=0) + b_delta * b_delta * (weight * share)
    return b_mean + b_delta * share, b_spread, weight + here


# residual, and of this program's rows and columns: the sum of weight residual^2, the sum of weight (x - their mean)^2,
# and their mean; of its rows the sum of weights.
#
# A program: ROWS * STEPS rows of COLUMNS columns. Bytes: x and residual 8 n d, e n d for `decoded` and for c.
# Operations: 12 n d. Floor: the bytes; bf16 with c: A 0.02, B 0.05, C 0.09 ms.
@jit
def _missed(
    x_ptr,
    decoded_ptr,
    c_ptr,
    bias_ptr,
    weight_ptr,
    residual_ptr,
    missed_ptr,
    spread_ptr,
    means_ptr,
    weights_ptr,
    n: tl.int32,
    units: tl.int32,
    has_c: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    block, slab = tl.program_id(0), tl.program_id(1)
    o_c = slab * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    # [COLUMNS]
    b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0)
    b_mean = tl.zeros([COLUMNS], tl.float32)
    b_spread, b_missed = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    weight = 0.0
    for step in range(STEPS):
        o_t = (block * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_e = (o_t < n)[:, None] & m_c[None, :]
        o_e = o_t.to(tl.int64)[:, None] * d + o_c[None, :]
        # [ROWS]
        b_weight = tl.load(weight_ptr + o_t, mask=o_t < n, other=0.0)
        # [ROWS, COLUMNS]
        b_x = tl.load(x_ptr + o_e, mask=m_e, other=0.0)
        b_x_hat = widen(tl.load(decoded_ptr + o_e, mask=m_e, other=0.0))
        if has_c != 0:
            b_x_hat += widen(tl.load(c_ptr + o_e, mask=m_e, other=0.0))
        b_residual = b_x - (b_x_hat + b_bias[None, :])
        tl.store(residual_ptr + o_e, b_residual, mask=m_e)
        b_missed += tl.sum(tl.where(m_e, b_residual * b_residual * b_weight[:, None], 0.0), axis=0)
        b_mean, b_spread, weight = _merged(b_mean, b_spread, weight, b_x, b_weight)
    place = block * tl.num_programs(1) + slab
    tl.store(missed_ptr + place, tl.sum(b_missed, axis=0))
    tl.store(spread_ptr + place, tl.sum(tl.where(m_c, b_spread, 0.0), axis=0))
    tl.store(means_ptr + block.to(tl.int64) * d + o_c, b_mean, mask=m_c)
    tl.store(weights_ptr + block, weight)


# Of this program's columns: the sum over blocks of rows of their weight times (their mean - the mean of all)^2.
#
# A program: COLUMNS columns of all blocks, MERGED at a time. Bytes: 4 n d / (ROWS STEPS). Floor: the launch.
@jit
def _between(
    means_ptr,
    weights_ptr,
    spread_ptr,
    blocks: tl.int32,
    d: tl.int32,
    MERGED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_mean, b_spread = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    weight = 0.0
    for first in range(0, blocks, MERGED):
        o_b = first + tl.arange(0, MERGED)
        m_e = (o_b < blocks)[:, None] & (o_c < d)[None, :]
        # [MERGED]
        b_weights = tl.load(weights_ptr + o_b, mask=o_b < blocks, other=0.0)
        # [MERGED, COLUMNS]
        b_means = tl.load(means_ptr + o_b.to(tl.int64)[:, None] * d + o_c[None, :], mask=m_e, other=0.0)
        b_mean, b_spread, weight = _merged(b_mean, b_spread, weight, b_means, b_weights)
    tl.store(spread_ptr + tl.program_id(0), tl.sum(b_spread, axis=0))


# fvu, and the spread of x, from the sums of all programs of `_missed` and `_between`.
#
# A program: all of it. Floor: the launch.
@jit
def _share(
    missed_ptr,
    spread_ptr,
    between_ptr,
    fvu_ptr,
    of_x_ptr,
    count: tl.int32,
    slabs: tl.int32,
    BLOCK: tl.constexpr,
):
    b_missed, b_spread = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        o_p = first + tl.arange(0, BLOCK)
        # [BLOCK]
        b_missed += tl.load(missed_ptr + o_p, mask=o_p < count, other=0.0)
        b_spread += tl.load(spread_ptr + o_p, mask=o_p < count, other=0.0)
        b_spread += tl.load(between_ptr + o_p, mask=o_p < slabs, other=0.0)
    spread = tl.sum(b_spread, axis=0)
    tl.store(fvu_ptr, tl.div_rn(tl.sum(b_missed, axis=0), spread))
    tl.store(of_x_ptr, spread)


# d_out = -2 weight residual d_fvu / spread, the gradient of `decoded` and of c; and its sums over this program's rows.
#
# A program: ROWS * STEPS rows of COLUMNS columns. Bytes: n d (4 + e). Operations: 2 n d. Floor: the bytes; bf16:
# A 0.01, B 0.03, C 0.05 ms.
@jit
def _missed_backward(
    d_fvu_ptr,
    of_x_ptr,
    residual_ptr,
    weight_ptr,
    d_out_ptr,
    parts_ptr,
    n: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    factor = -2.0 * tl.load(d_fvu_ptr) / tl.load(of_x_ptr)
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for step in range(STEPS):
        o_t = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_e = (o_t < n)[:, None] & m_c[None, :]
        o_e = o_t.to(tl.int64)[:, None] * d + o_c[None, :]
        # [ROWS]
        b_weight = tl.load(weight_ptr + o_t, mask=o_t < n, other=0.0) * factor
        # [ROWS, COLUMNS]
        b_out = tl.load(residual_ptr + o_e, mask=m_e, other=0.0) * b_weight[:, None]
        tl.store(d_out_ptr + o_e, b_out.to(d_out_ptr.dtype.element_ty), mask=m_e)
        b_sum += tl.sum(b_out, axis=0)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * d + o_c, b_sum, mask=m_c)


_WIDE = torch.float32
_TILE = {"ROWS": ROWS, "STEPS": STEPS, "COLUMNS": COLUMNS}
DTYPES = (torch.float32, torch.bfloat16)


def _missed_variant(dtype: torch.dtype, unit: int) -> Variant:
    tensors = {"x_ptr": _WIDE, "decoded_ptr": dtype, "c_ptr": dtype, "bias_ptr": _WIDE, "weight_ptr": _WIDE}
    written = ("residual_ptr", "missed_ptr", "spread_ptr", "means_ptr", "weights_ptr")
    return Variant(_missed, tensors | dict.fromkeys(written, _WIDE), {"UNIT": unit, **_TILE}, 4, 1)


def _backward_variant(dtype: torch.dtype, unit: int) -> Variant:
    tensors = dict.fromkeys(("d_fvu_ptr", "of_x_ptr", "residual_ptr", "weight_ptr"), _WIDE)
    tensors |= {"d_out_ptr": dtype, "parts_ptr": _WIDE}
    return Variant(_missed_backward, tensors, {"UNIT": unit, **_TILE}, 4, 1)


_BETWEEN = Variant(
    _between,
    dict.fromkeys(("means_ptr", "weights_ptr", "spread_ptr"), _WIDE),
    {"MERGED": MERGED, "COLUMNS": COLUMNS},
    num_warps=8,
    num_stages=1,
)
_SHARE = Variant(
    _share,
    dict.fromkeys(("missed_ptr", "spread_ptr", "between_ptr", "fvu_ptr", "of_x_ptr"), _WIDE),
    {"BLOCK": 1024},
    num_warps=8,
    num_stages=1,
)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    forms = [(dtype, unit) for dtype in DTYPES for unit in vector_units(dtype)]
    return [*(make(*form) for make in (_missed_variant, _backward_variant) for form in forms), _BETWEEN, _SHARE]


def fvu(x: Tensor, decoded: Tensor, c: Tensor | None, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, d] float32, decoded and c [n, d] in one dtype, bias [d] and weight [n] float32, n and d above zero.

    Returns the fvu, the spread of x, and the residual [n, d], float32.
    """
    n, d = x.shape
    x, decoded, bias, weight = aligned(x), aligned(decoded), aligned(bias), aligned(weight)
    blocks, slabs = triton.cdiv(n, ROWS * STEPS), triton.cdiv(d, COLUMNS)
    residual, share, of_x = torch.empty_like(x), x.new_empty(()), x.new_empty(())
    missed, spread = x.new_empty(blocks * slabs), x.new_empty(blocks * slabs)
    between, means, weights = x.new_empty(slabs), x.new_empty(blocks, d), x.new_empty(blocks)
    unit = unit_of(decoded.dtype, d)
    given = x, decoded, decoded if c is None else aligned(c), bias, weight
    numbers = n, d // unit, int(c is not None)
    variant = _missed_variant(decoded.dtype, unit)
    variant.launch((blocks, slabs), *given, residual, missed, spread, means, weights, *numbers)
    _BETWEEN.launch((slabs,), means, weights, between, blocks, d)
    _SHARE.launch((1,), missed, spread, between, share, of_x, blocks * slabs, slabs)
    return share, of_x, residual


def fvu_backward(
    d_fvu: Tensor, of_x: Tensor, residual: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """From the gradient of fvu, a scalar, and what `fvu` gave: that of decoded and c [n, d] in `dtype`, of bias [d]."""
    n, d = residual.shape
    blocks, unit = triton.cdiv(n, ROWS * STEPS), unit_of(dtype, d)
    d_out, parts = torch.empty_like(residual, dtype=dtype), residual.new_empty(blocks, d)
    given = aligned(d_fvu), aligned(of_x), aligned(residual), aligned(weight), d_out, parts
    _backward_variant(dtype, unit).launch((blocks, triton.cdiv(d, COLUMNS)), *given, n, d // unit)
    return d_out, parts.sum(dim=0)
