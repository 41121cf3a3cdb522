"""Adam fused with the sum that makes the gradient: the gradient of a row stays in registers and is never stored.

feature_sums.py has the sum. feature_rows.py says what holds for all sums, and defines A, B and C and the rates behind
the predicted times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pairs import Pairs, Table
from . import tuning
from .feature_sums import (
    PAIRS,
    SCALAR_SUM_TILES,
    SUM_TILES,
    Tile,
    fitting,
    gradient_tensors,
    gradient_types,
    other_forms,
    runs,
    sum_runs,
    widen,
)
from .variant import Variant, aligned, jit, vector_units

LEAST_NORM = tl.constexpr(1e-12)  # the least divisor of a row, so that a row of zeros stays zero


@triton.jit
def _hash32(x):
    """uint32 -> uint32: lowbias32 of C. Wellons' hash-prospector."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _store_moment(p_moment, b_moment, b_elements, seed, mask):
    """Store as float32, or as bfloat16 with stochastic rounding. The random bits are a hash of element and step."""
    if p_moment.dtype.element_ty == tl.bfloat16:
        b_chance = _hash32(b_elements ^ _hash32(seed)) >> 16
        b_bits = b_moment.to(tl.uint32, bitcast=True)
        # Random bits are added to the 16 that are cut off, and may carry into the rest. Infinity survives that; a NaN
        # could wrap around to zero.
        b_bits = tl.where(b_moment == b_moment, b_bits + b_chance, 0x7FC00000)
        tl.store(p_moment, (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(p_moment, b_moment, mask=mask)


@triton.jit
def _store_rounded(p_rounded, b_param, one, mask):
    """Store as bfloat16, to the nearest, ties to even. By the bits, because Triton's interpreter cuts them off.

    one: 1, which the compiler doesn't know. So it takes the addresses for multiples of 8 bytes, and stores 4 numbers at
    a time, as it has float32. For 8 it would convert the layout, at 25 registers a thread.
    """
    p_rounded += 4 * (one - 1)
    b_bits = b_param.to(tl.uint32, bitcast=True)
    b_bits = tl.where(b_param == b_param, b_bits + 0x7FFF + ((b_bits >> 16) & 1), 0x7FC00000)
    tl.store(p_rounded, (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)


@triton.jit
def _adam(p_avg, p_avg_sq, b_param, b_grad, hyper_ptr, seed_ptr, o_e, m_e):
    """Store the new moments of elements o_e of the whole table; return their new parameters."""
    step_size, correction, eps = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    one_minus_beta1, beta2, one_minus_beta2 = tl.load(hyper_ptr + 3), tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5)
    # [FEATURES, COLUMNS]
    b_avg = widen(tl.load(p_avg, mask=m_e, other=0.0, eviction_policy="evict_first"))
    # [FEATURES, COLUMNS]
    b_avg_sq = widen(tl.load(p_avg_sq, mask=m_e, other=0.0, eviction_policy="evict_first"))
    b_avg += (b_grad - b_avg) * one_minus_beta1
    b_avg_sq = b_avg_sq * beta2 + b_grad * b_grad * one_minus_beta2
    b_elements, seed = o_e.to(tl.uint32), tl.load(seed_ptr).to(tl.uint32)
    _store_moment(p_avg, b_avg, b_elements, seed, m_e)
    _store_moment(p_avg_sq, b_avg_sq, b_elements, seed + 0x9E3779B9, m_e)
    return b_param - step_size * b_avg / (tl.sqrt_rn(b_avg_sq) * correction + eps)


# One step of Adam (lazy: SparseAdam) on the rows of one table. For each feature f:
#
#     g = sum over the pairs p of f of weights[p] rows[tokens[p]];   unit rows: g -= <g, param> param
#     exp_avg += (g - exp_avg) (1 - beta1);   exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
#     param -= step_size exp_avg / (sqrt(exp_avg_sq) correction + eps);   unit rows: param /= |param|
#     rounded = bfloat16(param)
#
# A program: COLUMNS columns of FEATURES neighbouring features; FEATURES > 1 for narrow rows only. Unit rows need two
# sums over all d columns, so one program holds the whole row: COLUMNS >= d. Other rows are split into slabs of columns.
# All features of a slab come before the next slab, so that L2 holds the slab of `rows`.
# A launch updates one table, so that L2 holds more of its rows. A launch for two tables would read each run once
# instead of twice, and save 20 bytes of the thousands that a pair costs.
# Bytes (P pairs, n tokens, e bytes an element of `rows`): param, exp_avg and exp_avg_sq each read and written once, 24
# a parameter, or 16 with bfloat16 moments, all marked to leave L2 first; 2 more for a rounded copy, where a cast would
# take 6; `rows` n d e from memory, and P d e gathered from L2. Lazy: a row without pairs costs only its two ends.
# Operations: 2 P d, and about 20 a parameter. Floor: the bytes from memory, (24 or 16) d_sae d + n d e.
# Predicted for W_enc and W_dec together, rows in bf16, float32 moments: A 0.36 ms (floor 0.29), B 2.2 (1.7). What
# passes through L2 decides, and the instructions are close behind.
@jit
def _adam_rows(
    order_ptr,
    tokens_ptr,
    ends_ptr,
    weights_ptr,
    rows_ptr,
    partial_ptr,
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    hyper_ptr,
    seed_ptr,
    rounded_ptr,
    d_sae: tl.int32,
    units: tl.int32,
    piece: tl.int32,
    unit_rows: tl.int32,
    lazy: tl.int32,
    first_row: tl.int32,
    copy: tl.int32,
    UNIT: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    o_f, m_f, b_starts, b_ends = runs(ends_ptr, d_sae, FEATURES)
    m_f = tl.where(lazy == 0, m_f, m_f & (b_starts < b_ends))
    if tl.max(m_f.to(tl.int32), axis=0) > 0:
        b_grad = sum_runs(
            order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
            FEATURES, ROWS, COLUMNS,
        )  # fmt: skip
        o_e = o_f[:, None] * d + o_c[None, :]
        m_e = m_f[:, None] & m_c[None, :]
        # [FEATURES, COLUMNS]
        b_param = tl.load(param_ptr + o_e, mask=m_e, other=0.0, eviction_policy="evict_first")
        if unit_rows != 0:
            b_grad -= tl.sum(b_grad * b_param, axis=1)[:, None] * b_param
        o_whole = o_e + first_row.to(tl.int64) * d
        b_param = _adam(exp_avg_ptr + o_e, exp_avg_sq_ptr + o_e, b_param, b_grad, hyper_ptr, seed_ptr, o_whole, m_e)
        if unit_rows != 0:
            b_param /= tl.maximum(tl.sqrt_rn(tl.sum(b_param * b_param, axis=1)), LEAST_NORM)[:, None]
        tl.store(param_ptr + o_e, b_param, mask=m_e, eviction_policy="evict_first")
        if copy != 0:
            _store_rounded(rounded_ptr + o_e, b_param, copy, m_e)


# The same for unit rows of more than 8192 columns, which do not fit the registers of one program.
#
# A program: one feature, COLUMNS at a time, in three passes: <gradient, row>; the update and the new norm; the division
# by that norm. The first two passes each sum the gradient. Operations: 4 P d, and about 20 a parameter.
# Bytes: from memory as `_adam_rows`, because the third pass finds the row in L2; gathered from L2 2 P d e. Floor: as
# `_adam_rows`. Predicted: as `_adam_rows`, and 0.7 ms for each GB of the second gather that L2 does not hold.
@jit
def _adam_long_rows(
    order_ptr,
    tokens_ptr,
    ends_ptr,
    weights_ptr,
    rows_ptr,
    partial_ptr,
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    hyper_ptr,
    seed_ptr,
    rounded_ptr,
    units: tl.int32,
    piece: tl.int32,
    lazy: tl.int32,
    first_row: tl.int32,
    copy: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    feature = tl.program_id(0)
    o_f, _, b_starts, b_ends = runs(ends_ptr, feature + 1, 1)
    if (lazy == 0) | (tl.max(b_ends - b_starts, axis=0) > 0):
        b_dots = tl.zeros([1, COLUMNS], tl.float32)
        for first in range(0, d, COLUMNS):
            o_c = first + tl.arange(0, COLUMNS)
            m_c = o_c < d
            b_grad = sum_runs(
                order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
                1, ROWS, COLUMNS,
            )  # fmt: skip
            # [1, COLUMNS]
            b_dots += b_grad * tl.load(param_ptr + o_f[:, None] * d + o_c[None, :], mask=m_c[None, :], other=0.0)
        dot = tl.sum(b_dots, axis=1)[:, None]
        b_squares = tl.zeros([1, COLUMNS], tl.float32)
        for first in range(0, d, COLUMNS):
            o_c = first + tl.arange(0, COLUMNS)
            m_c = o_c < d
            b_grad = sum_runs(
                order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
                1, ROWS, COLUMNS,
            )  # fmt: skip
            o_e = o_f[:, None] * d + o_c[None, :]
            # [1, COLUMNS]
            b_param = tl.load(param_ptr + o_e, mask=m_c[None, :], other=0.0)
            b_grad -= dot * b_param
            o_whole = o_e + first_row.to(tl.int64) * d
            b_param = _adam(
                exp_avg_ptr + o_e, exp_avg_sq_ptr + o_e, b_param, b_grad, hyper_ptr, seed_ptr, o_whole, m_c[None, :]
            )
            b_squares += b_param * b_param
            tl.store(param_ptr + o_e, b_param, mask=m_c[None, :])
        norm = tl.maximum(tl.sqrt_rn(tl.sum(b_squares, axis=1)), LEAST_NORM)[:, None]
        tl.debug_barrier()  # other threads wrote part of what a thread reads next
        for first in range(0, d, COLUMNS):
            o_c = first + tl.arange(0, COLUMNS)
            p_param = param_ptr + o_f[:, None] * d + o_c[None, :]
            # [1, COLUMNS]
            b_param = tl.load(p_param, mask=(o_c < d)[None, :], other=0.0)
            b_param /= norm
            tl.store(p_param, b_param, mask=(o_c < d)[None, :])
            if copy != 0:
                _store_rounded(rounded_ptr + o_f[:, None] * d + o_c[None, :], b_param, copy, (o_c < d)[None, :])


# Unit rows are held whole in registers: at most 16 columns a thread.
_UNIT_ROW_TILES = [
    *SUM_TILES,
    Tile(1, 4, 1024, 4),
    Tile(1, 2, 2048, 4),
    Tile(1, 2, 4096, 8),
    Tile(1, 1, 8192, 16),
]
_LONG_ROW_TILE = Tile(1, 4, 2048, 8)
# For widths that are no multiple of 16 bytes, like SCALAR_SUM_TILES.
_SCALAR_LONG_ROW_TILE = Tile(1, 2, 512, 8)


def _adam_variant(rows: torch.dtype, moments: torch.dtype, unit: int, tile: Tile, long: bool = False) -> Variant:
    state = {"param_ptr": torch.float32, "exp_avg_ptr": moments, "exp_avg_sq_ptr": moments}
    others = {"hyper_ptr": torch.float32, "seed_ptr": torch.int64, "rounded_ptr": torch.bfloat16}
    tensors = {**PAIRS, **gradient_types(rows), **state, **others}
    constants = {"UNIT": unit, "ROWS": tile.rows, "COLUMNS": tile.columns}
    if long:
        return Variant(_adam_long_rows, tensors, constants, num_warps=tile.warps, num_stages=1)
    return Variant(_adam_rows, tensors, {**constants, "FEATURES": tile.features}, tile.warps, num_stages=1)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    found = []
    for moments in (torch.float32, torch.bfloat16):
        for rows in (torch.float32, torch.bfloat16):
            unit, _ = vector_units(rows)
            found += [_adam_variant(rows, moments, unit, tile) for tile in _UNIT_ROW_TILES]
            found.append(_adam_variant(rows, moments, unit, _LONG_ROW_TILE, long=True))
        found += [_adam_variant(torch.float32, moments, 1, tile) for tile in SCALAR_SUM_TILES]
        found.append(_adam_variant(torch.float32, moments, 1, _SCALAR_LONG_ROW_TILE, long=True))
    return found


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    # COLUMNS stays: a unit row must fit one program.
    return other_forms(variant, (variant.constants["COLUMNS"],), (16, 32), 1, 4)


def adam_rows(pairs: Pairs, tables: list[Table], hyper: Tensor, seed: Tensor, lazy: bool, first_row: int = 0) -> None:
    """One step of Adam on each table, in place, from its factored gradient.

    Args:
        hyper: [6] float32, read on the device: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, 1 - beta1, beta2,
            1 - beta2.
        seed: [1] int64, read on the device: the number of the step, for the stochastic rounding of bfloat16 moments.
        lazy: rows without a pair stay as they are, as in torch.optim.SparseAdam. SparseAdam adds eps before the bias
            correction; for the same result pass eps / sqrt(1 - beta2^t). Otherwise all rows are updated, as in
            torch.optim.Adam.
        first_row: the number of the tables' first row, where they are part of larger ones; that rounding goes by it.

    Memory: as `feature_sums`, and a float32 copy of `rows` if they are float16 or no multiple of 16 bytes wide.
    """
    pairs, hyper, seed = Pairs(*map(aligned, pairs)), aligned(hyper), aligned(seed)
    for table in tables:
        for name in ("param", "exp_avg", "exp_avg_sq", "rounded"):
            tensor = getattr(table, name)
            if tensor is None:
                continue
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                given = f"an address that is {tensor.data_ptr() % 16} bytes past a multiple of 16"
                given = given if tensor.is_contiguous() else f"strides {tensor.stride()}"
                raise ValueError(
                    f"{name}: given {given}; needed a contiguous tensor at a multiple of 16 bytes: `clone` it"
                )
        if table.param.numel() > 0:
            _adam_table(pairs, table, hyper, seed, lazy, first_row)


def _adam_table(pairs: Pairs, table: Table, hyper: Tensor, seed: Tensor, lazy: bool, first_row: int) -> None:
    d_sae, d = table.param.shape
    rows = table.rows.float() if table.rows.dtype == torch.float16 else table.rows
    gradient, piece, unit = gradient_tensors(pairs, [(table.weights, rows)])
    copy = table.rounded is not None
    rounded = table.rounded if copy else torch.empty(0, dtype=torch.bfloat16, device=rows.device)
    state = (table.param, table.exp_avg, table.exp_avg_sq, hyper, seed, rounded)
    types = (gradient[1].dtype, table.exp_avg.dtype)
    tiles = SCALAR_SUM_TILES if unit == 1 else _UNIT_ROW_TILES if table.unit_rows else SUM_TILES
    if table.unit_rows and d > tiles[-1].columns:
        variant = _adam_variant(*types, unit, _SCALAR_LONG_ROW_TILE if unit == 1 else _LONG_ROW_TILE, long=True)
        variant = tuning.best(variant, rows.device)
        variant.launch((d_sae,), *pairs, *gradient, *state, d // unit, piece, int(lazy), first_row, int(copy))
    else:
        variant = tuning.best(_adam_variant(*types, unit, fitting(tiles, d)), rows.device)
        grid = (triton.cdiv(d_sae, variant.constants["FEATURES"]), triton.cdiv(d, variant.constants["COLUMNS"]))
        numbers = (d_sae, d // unit, piece, int(table.unit_rows), int(lazy), first_row, int(copy))
        variant.launch(grid, *pairs, *gradient, *state, *numbers)
