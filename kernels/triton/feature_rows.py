"""Gradients of tables of rows, in factors, and Adam on them: the transposed side of a sparse code, a run a feature.

sort_pairs     (feature, token) pairs by feature: a run of pairs for each feature
feature_sums   gradient[f] = sum over the pairs p of feature f of weights[p] * rows[tokens[p]], written out
adam_rows      Adam on tables with such gradients, in place: a gradient is consumed where it is summed

Sums are in float32 and in a fixed order: the same input gives the same bits, without atomics. Some features fire on
nearly every token, so runs have any length: all pairs, sorted, are cut into blocks of `piece` pairs, and the parts of
a run that is longer than that are summed by `_pieces` first, and then added by the run's own program.

No launch depends on what is in a tensor, and nothing is read from the device: all of it can be in a CUDA graph.

Predicted times, here and in `sparse_decode`, are for an H100 with 3.0 TB/s from memory, as measured on one, and
5.5 TB/s from L2, as assumed. Shapes: A n=8192 d=768 d_sae=32768 k=32, B 8192 2304 65536 64, C 8192 4096 131072 64.
Nothing here has been timed on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pairs import Pairs, Table
from . import tuning
from .variant import FLOATS, Variant, aligned, jit, unit_of, vector_units

# A piece is no shorter than this, for rows of 128 columns and for narrower ones, where a block of pairs costs less; and
# no shorter than keeps a table's sums of pieces within PARTIAL_BYTES.
MIN_PIECE = 256
MIN_NARROW_PIECE = 64
PARTIAL_BYTES = 32 * 2**20
LEAST_NORM = tl.constexpr(1e-12)  # a row is divided by no less: one of zeros stays as it is


@triton.jit
def _widen(b_narrow):
    """To float32; bfloat16 by its bits, since Triton's interpreter takes them for an integer."""
    if b_narrow.dtype == tl.bfloat16:
        b_wide = (b_narrow.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        b_wide = b_narrow.to(tl.float32)
    return b_wide


@triton.jit
def _sum_pairs(
    order_ptr,
    tokens_ptr,
    weights_ptr,
    rows_ptr,
    b_starts,
    b_ends,
    d,
    o_c,
    m_c,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sum over p in b_starts .. b_ends of weights[order[p]] * rows[tokens[p]], at columns o_c: [FEATURES, COLUMNS]."""
    b_sum = tl.zeros([FEATURES, COLUMNS], tl.float32)
    longest = tl.max(b_ends - b_starts, axis=0)
    for first in range(0, longest, ROWS):
        o_p = b_starts[:, None] + first + tl.arange(0, ROWS)[None, :]
        m_p = o_p < b_ends[:, None]
        # [FEATURES, ROWS]
        b_order = tl.load(order_ptr + o_p, mask=m_p, other=0)
        # [FEATURES, ROWS]
        b_tokens = tl.load(tokens_ptr + o_p, mask=m_p, other=0)
        # [FEATURES, ROWS]
        b_weights = tl.load(weights_ptr + b_order, mask=m_p, other=0.0)
        p_rows = rows_ptr + b_tokens[:, :, None] * d + o_c[None, None, :]
        # [FEATURES, ROWS, COLUMNS]
        b_rows = _widen(tl.load(p_rows, mask=m_p[:, :, None] & m_c[None, None, :], other=0.0))
        b_sum += tl.sum(b_weights[:, :, None] * b_rows, axis=1)
    return b_sum


@triton.jit
def _sum_runs(
    order_ptr,
    tokens_ptr,
    weights_ptr,
    rows_ptr,
    partial_ptr,
    b_starts,
    b_ends,
    piece,
    d,
    o_c,
    m_c,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of each feature's run: of its pairs, or of what `_pieces` left for a run longer than a piece."""
    b_long = b_ends - b_starts > piece
    b_short_ends = tl.where(b_long, b_starts, b_ends)
    b_sum = _sum_pairs(
        order_ptr, tokens_ptr, weights_ptr, rows_ptr, b_starts, b_short_ends, d, o_c, m_c, FEATURES, ROWS, COLUMNS
    )
    b_first = b_starts // piece
    b_count = tl.where(b_long, (b_ends - 1) // piece - b_first + 1, 0)
    for first in range(0, tl.max(b_count, axis=0), ROWS):
        o_j = first + tl.arange(0, ROWS)[None, :]
        b_blocks = b_first[:, None] + o_j
        b_slots = 2 * b_blocks + (b_starts[:, None] > b_blocks * piece).to(tl.int64)
        m_j = o_j < b_count[:, None]
        p_partial = partial_ptr + b_slots[:, :, None] * d + o_c[None, None, :]
        # [FEATURES, ROWS, COLUMNS]
        b_partial = tl.load(p_partial, mask=m_j[:, :, None] & m_c[None, None, :], other=0.0)
        b_sum += tl.sum(b_partial, axis=1)
    return b_sum


# partial[2 j] and partial[2 j + 1]: of the pairs in block j, at places j * piece to (j + 1) * piece, the sum of those
# whose long run holds the block's first place, and of those whose long run begins after it. A long run has more than
# `piece` pairs, so a block meets no third. Other slots stay as they are.
#
# A program makes COLUMNS columns of one slot, of one table or of two. It finds its run by a search in `ends`, at 64
# places at once: 3 loads, one after the other, for 262,144 features. Without a long run it ends there.
# Bytes: (20 + d e) for each pair in a long run, mostly from L2, since rows is n d e; 8 d / piece a pair written, at
# most. Operations: 2 d a pair. Floor: the gathered bytes at the speed of L2.
# Predicted without long runs: A 4,096 programs of 2 us, about 1,000 at a time, 0.01 ms; B and C 18,000, 0.04 ms. With
# some, a piece of 256 (A) to 512 pairs (C) takes 0.03 to 0.06 ms, alongside others.
@jit
def _pieces(
    order_ptr,
    tokens_ptr,
    ends_ptr,
    weights_ptr,
    rows_ptr,
    partial_ptr,
    weights2_ptr,
    rows2_ptr,
    partial2_ptr,
    d_sae: tl.int32,
    units: tl.int32,
    piece: tl.int32,
    UNIT: tl.constexpr,
    TABLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    slot = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    low = slot // 2 * piece
    high = min(low + piece, tl.load(ends_ptr + d_sae))
    if low < high:
        place = tl.where(slot % 2 == 0, low, high - 1)
        # The last feature with ends[feature] <= place is one of feature .. feature + count - 1.
        feature, count = d_sae * 0, d_sae
        while count > 1:
            step = tl.cdiv(count, 64)
            o_f = feature + step * tl.arange(0, 64)
            # [64]
            b_ends = tl.load(ends_ptr + o_f, mask=o_f < d_sae, other=place + 1)
            feature += step * (tl.sum((b_ends <= place).to(tl.int32), axis=0) - 1)
            count = step
        start, end = tl.load(ends_ptr + feature), tl.load(ends_ptr + feature + 1)
        begins_inside = (start > low).to(tl.int64)
        if (end - start > piece) & (begins_inside == slot % 2):
            b_start = tl.full([1], max(start, low), tl.int64)
            b_end = tl.full([1], min(end, high), tl.int64)
            p_out = slot * d + o_c[None, :]
            b_sum = _sum_pairs(
                order_ptr, tokens_ptr, weights_ptr, rows_ptr, b_start, b_end, d, o_c, m_c, 1, ROWS, COLUMNS
            )
            tl.store(partial_ptr + p_out, b_sum, mask=m_c[None, :])
            if TABLES == 2:
                b_sum = _sum_pairs(
                    order_ptr, tokens_ptr, weights2_ptr, rows2_ptr, b_start, b_end, d, o_c, m_c, 1, ROWS, COLUMNS
                )
                tl.store(partial2_ptr + p_out, b_sum, mask=m_c[None, :])


@triton.jit
def _runs(ends_ptr, d_sae, FEATURES: tl.constexpr):
    """This program's features, and where the run of each starts and ends; empty ones beyond the last feature."""
    o_f = tl.program_id(0).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    m_f = o_f < d_sae
    # [FEATURES]
    b_starts = tl.load(ends_ptr + o_f, mask=m_f, other=0)
    # [FEATURES]
    b_ends = tl.load(ends_ptr + o_f + 1, mask=m_f, other=0)
    return o_f, m_f, b_starts, b_ends


# out[f] = the sum over the pairs of feature f, of one table or of two: zeros for an empty run.
#
# A program makes COLUMNS columns of one feature, or, of narrow rows, of FEATURES that lie side by side. Two tables
# share the run. Features come before columns, so programs in flight share a slab of rows, n COLUMNS e, that L2 holds.
# Bytes: P d e gathered from L2 for each table; rows once from memory, n d e; d_sae d e written; 20 a pair for the run
# in each slab. Operations: 2 P d. Floor: (d_sae + n) d e for each table.
# Predicted for two tables in bf16: A 0.15 ms, floor 0.04; B 0.9, floor 0.23; C 1.6, floor 0.76: the gathers decide.
# For totals, one column: 0.02 ms.
@jit
def _feature_sum(
    order_ptr,
    tokens_ptr,
    ends_ptr,
    weights_ptr,
    rows_ptr,
    partial_ptr,
    out_ptr,
    weights2_ptr,
    rows2_ptr,
    partial2_ptr,
    out2_ptr,
    d_sae: tl.int32,
    units: tl.int32,
    piece: tl.int32,
    UNIT: tl.constexpr,
    TABLES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    o_f, m_f, b_starts, b_ends = _runs(ends_ptr, d_sae, FEATURES)
    p_out = o_f[:, None] * d + o_c[None, :]
    m_out = m_f[:, None] & m_c[None, :]
    b_sum = _sum_runs(
        order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
        FEATURES, ROWS, COLUMNS,
    )  # fmt: skip
    tl.store(out_ptr + p_out, b_sum.to(out_ptr.dtype.element_ty), mask=m_out)
    if TABLES == 2:
        b_sum = _sum_runs(
            order_ptr, tokens_ptr, weights2_ptr, rows2_ptr, partial2_ptr, b_starts, b_ends, piece, d, o_c, m_c,
            FEATURES, ROWS, COLUMNS,
        )  # fmt: skip
        tl.store(out2_ptr + p_out, b_sum.to(out2_ptr.dtype.element_ty), mask=m_out)


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
    """Store as float32, or as bfloat16 rounded stochastically, by 16 bits of chance a hash of the element's place."""
    if p_moment.dtype.element_ty == tl.bfloat16:
        b_chance = _hash32(b_elements ^ _hash32(seed)) >> 16
        b_bits = b_moment.to(tl.uint32, bitcast=True)
        # 16 bits are added below those that stay. An infinity stays one; a NaN must not be carried past itself.
        b_bits = tl.where(b_moment == b_moment, b_bits + b_chance, 0x7FC00000)
        tl.store(p_moment, (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(p_moment, b_moment, mask=mask)


@triton.jit
def _adam(p_avg, p_avg_sq, b_param, b_grad, hyper_ptr, seed_ptr, o_e, m_e):
    """Update the moments of elements o_e in memory by their gradient; returns what becomes of the parameter."""
    step_size, correction, eps = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    one_minus_beta1, beta2, one_minus_beta2 = tl.load(hyper_ptr + 3), tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5)
    # [FEATURES, COLUMNS]
    b_avg = _widen(tl.load(p_avg, mask=m_e, other=0.0, eviction_policy="evict_first"))
    # [FEATURES, COLUMNS]
    b_avg_sq = _widen(tl.load(p_avg_sq, mask=m_e, other=0.0, eviction_policy="evict_first"))
    b_avg += (b_grad - b_avg) * one_minus_beta1
    b_avg_sq = b_avg_sq * beta2 + b_grad * b_grad * one_minus_beta2
    b_elements, seed = o_e.to(tl.uint32), tl.load(seed_ptr).to(tl.uint32)
    _store_moment(p_avg, b_avg, b_elements, seed, m_e)
    _store_moment(p_avg_sq, b_avg_sq, b_elements, seed + 0x9E3779B9, m_e)
    return b_param - step_size * b_avg / (tl.sqrt_rn(b_avg_sq) * correction + eps)


# One step of Adam on the rows of one table, whose gradient is summed here from the run of each row.
#
# A program updates COLUMNS columns of one feature, or, of narrow rows, of FEATURES that lie side by side. Rows that are
# normalised are whole in one program, COLUMNS >= d, for their two sums over d; others come in slabs of columns, with
# features before columns, so that L2 holds the slab of rows. One table at a time, because L2 then holds more of its
# rows; two in one program would save 20 bytes a pair, the reading of the run, of the thousands that a pair comes to.
# Bytes: param, exp_avg and exp_avg_sq are each read once and written once, 24 a parameter, or 16 with bfloat16 moments,
# and marked to leave L2 first; the gradient never is in memory; rows n d e, gathered from L2, P d e. Lazy: the same for
# the rows that have a pair, and nothing for others but their two ends. Operations: 2 P d, and about 20 a parameter.
# Floor: 24 d_sae d, or 16, and n d e.
# Predicted for W_enc and W_dec, rows in bf16: A 0.42 ms, floor 0.41; B 2.8, floor 2.4; C 9.5, floor 8.6. With bfloat16
# moments: A 0.28, B 2.0, C 6.6. What B and C pay beyond the floor: rows of W_dec's gradient, 38 and 67 MB, that are
# gathered whole, of which L2 holds a half. b_enc: 0.02 ms.
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
    d_sae: tl.int32,
    units: tl.int32,
    piece: tl.int32,
    unit_rows: tl.int32,
    lazy: tl.int32,
    UNIT: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    o_f, m_f, b_starts, b_ends = _runs(ends_ptr, d_sae, FEATURES)
    m_f = m_f & ((lazy == 0) | (b_starts < b_ends))
    if tl.max(m_f.to(tl.int32), axis=0) > 0:
        b_grad = _sum_runs(
            order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
            FEATURES, ROWS, COLUMNS,
        )  # fmt: skip
        o_e = o_f[:, None] * d + o_c[None, :]
        m_e = m_f[:, None] & m_c[None, :]
        # [FEATURES, COLUMNS]
        b_param = tl.load(param_ptr + o_e, mask=m_e, other=0.0, eviction_policy="evict_first")
        if unit_rows != 0:
            b_grad -= tl.sum(b_grad * b_param, axis=1)[:, None] * b_param
        b_param = _adam(exp_avg_ptr + o_e, exp_avg_sq_ptr + o_e, b_param, b_grad, hyper_ptr, seed_ptr, o_e, m_e)
        if unit_rows != 0:
            b_param /= tl.maximum(tl.sqrt_rn(tl.sum(b_param * b_param, axis=1)), LEAST_NORM)[:, None]
        tl.store(param_ptr + o_e, b_param, mask=m_e, eviction_policy="evict_first")


# The same for normalised rows that are too wide for the registers of one program: more than 8192 columns.
#
# A program updates one feature, COLUMNS at a time, in three rounds: <gradient, row>; the update, with the norm of what
# comes out; the division by it. The gradient is summed in the first two.
# Bytes from memory: as above, since the third round finds the row in L2, where the second left it; gathered: 2 P d e.
# Floor: as above. Predicted: as above at d = 16384 but for the second gather, 0.7 ms for each GB that L2 does not hold.
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
    units: tl.int32,
    piece: tl.int32,
    lazy: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    feature = tl.program_id(0)
    o_f, _, b_starts, b_ends = _runs(ends_ptr, feature + 1, 1)
    if (lazy == 0) | (tl.max(b_ends - b_starts, axis=0) > 0):
        b_dots = tl.zeros([1, COLUMNS], tl.float32)
        for first in range(0, d, COLUMNS):
            o_c = first + tl.arange(0, COLUMNS)
            m_c = o_c < d
            b_grad = _sum_runs(
                order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
                1, ROWS, COLUMNS,
            )  # fmt: skip
            # [1, COLUMNS]
            b_dots += b_grad * tl.load(param_ptr + o_f[:, None] * d + o_c[None, :], mask=m_c[None, :], other=0.0)
        along = tl.sum(b_dots, axis=1)[:, None]
        b_squares = tl.zeros([1, COLUMNS], tl.float32)
        for first in range(0, d, COLUMNS):
            o_c = first + tl.arange(0, COLUMNS)
            m_c = o_c < d
            b_grad = _sum_runs(
                order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
                1, ROWS, COLUMNS,
            )  # fmt: skip
            o_e = o_f[:, None] * d + o_c[None, :]
            # [1, COLUMNS]
            b_param = tl.load(param_ptr + o_e, mask=m_c[None, :], other=0.0)
            b_grad -= along * b_param
            b_param = _adam(
                exp_avg_ptr + o_e, exp_avg_sq_ptr + o_e, b_param, b_grad, hyper_ptr, seed_ptr, o_e, m_c[None, :]
            )
            b_squares += b_param * b_param
            tl.store(param_ptr + o_e, b_param, mask=m_c[None, :])
        norm = tl.maximum(tl.sqrt_rn(tl.sum(b_squares, axis=1)), LEAST_NORM)[:, None]
        tl.debug_barrier()  # a thread may read what another wrote
        for first in range(0, d, COLUMNS):
            o_c = first + tl.arange(0, COLUMNS)
            p_param = param_ptr + o_f[:, None] * d + o_c[None, :]
            # [1, COLUMNS]
            b_param = tl.load(p_param, mask=(o_c < d)[None, :], other=0.0)
            tl.store(p_param, b_param / norm, mask=(o_c < d)[None, :])


class _Tile(NamedTuple):
    """What a program takes at a time."""

    features: int
    rows: int
    columns: int
    warps: int


# A row's width chooses the first tile with as many columns; the last, if none has.
_SUM_TILES = [_Tile(1, 8, 128, 1), _Tile(1, 4, 512, 2)]
_PIECE_TILES = [_Tile(1, 32, 128, 4), _Tile(1, 8, 512, 4)]
# A row that is normalised is whole in the registers of a program: at most 16 columns a thread.
_UNIT_ROW_TILES = [
    *_SUM_TILES,
    _Tile(1, 4, 1024, 4),
    _Tile(1, 2, 2048, 4),
    _Tile(1, 2, 4096, 8),
    _Tile(1, 1, 8192, 16),
]
_LONG_ROW_TILE = _Tile(1, 4, 2048, 8)
# The same for widths that are no multiple of 16 bytes: b_enc, whose rows have one column, and widths seen in tests.
_SCALAR_SUM_TILES = [_Tile(128, 8, 1, 4), _Tile(16, 4, 16, 4), _Tile(1, 4, 128, 1)]
_SCALAR_PIECE_TILES = [_Tile(1, 64, 1, 2), _Tile(1, 64, 16, 4), _Tile(1, 32, 128, 8)]
_SCALAR_LONG_ROW_TILE = _Tile(1, 2, 512, 8)


def _fitting(tiles: list[_Tile], columns: int) -> _Tile:
    return next((tile for tile in tiles if tile.columns >= columns), tiles[-1])


_PAIRS = {"order_ptr": torch.int64, "tokens_ptr": torch.int64, "ends_ptr": torch.int64}


def _gradient(rows: torch.dtype, number: str = "") -> dict[str, torch.dtype]:
    names = {"weights": torch.float32, "rows": rows, "partial": torch.float32}
    return {f"{name}{number}_ptr": dtype for name, dtype in names.items()}


def _pieces_variant(rows: torch.dtype, unit: int, tables: int, tile: _Tile) -> Variant:
    tensors = {**_PAIRS, **_gradient(rows), **_gradient(rows, "2")}
    constants = {"UNIT": unit, "TABLES": tables, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return Variant(_pieces, tensors, constants, num_warps=tile.warps, num_stages=1)


def _feature_sum_variant(rows: torch.dtype, unit: int, tables: int, tile: _Tile) -> Variant:
    tensors = {**_PAIRS, **_gradient(rows), "out_ptr": rows, **_gradient(rows, "2"), "out2_ptr": rows}
    constants = {"UNIT": unit, "TABLES": tables, "FEATURES": tile.features, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return Variant(_feature_sum, tensors, constants, num_warps=tile.warps, num_stages=1)


def _adam_variant(rows: torch.dtype, moments: torch.dtype, unit: int, tile: _Tile, long: bool = False) -> Variant:
    state = {"param_ptr": torch.float32, "exp_avg_ptr": moments, "exp_avg_sq_ptr": moments}
    tensors = {**_PAIRS, **_gradient(rows), **state, "hyper_ptr": torch.float32, "seed_ptr": torch.int64}
    constants = {"UNIT": unit, "ROWS": tile.rows, "COLUMNS": tile.columns}
    if long:
        return Variant(_adam_long_rows, tensors, constants, num_warps=tile.warps, num_stages=1)
    return Variant(_adam_rows, tensors, {**constants, "FEATURES": tile.features}, tile.warps, num_stages=1)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    found = []
    for rows in FLOATS:
        unit, _ = vector_units(rows)
        for tables in (1, 2):
            found += [_pieces_variant(rows, unit, tables, tile) for tile in _PIECE_TILES]
            found += [_feature_sum_variant(rows, unit, tables, tile) for tile in _SUM_TILES]
    found += [_pieces_variant(torch.float32, 1, 1, tile) for tile in _SCALAR_PIECE_TILES]
    found += [_feature_sum_variant(torch.float32, 1, 1, tile) for tile in _SCALAR_SUM_TILES]
    for moments in (torch.float32, torch.bfloat16):
        for rows in (torch.float32, torch.bfloat16):
            unit, _ = vector_units(rows)
            found += [_adam_variant(rows, moments, unit, tile) for tile in _UNIT_ROW_TILES]
            found.append(_adam_variant(rows, moments, unit, _LONG_ROW_TILE, long=True))
        found += [_adam_variant(torch.float32, moments, 1, tile) for tile in _SCALAR_SUM_TILES]
        found.append(_adam_variant(torch.float32, moments, 1, _SCALAR_LONG_ROW_TILE, long=True))
    return found


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    unit, columns = variant.constants["UNIT"], variant.constants["COLUMNS"]
    if unit == 1:
        return []
    adam = variant.kernel in (_adam_rows, _adam_long_rows)
    fewest, most = (1, 4) if adam else (8, 32) if variant.kernel is _pieces else (2, 8)
    found = []
    # Some of Adam's rows are normalised: all of their columns are one program's.
    for width in (columns,) if adam else (256, 512, 1024):
        for warps in (1, 2, 4, 8, 16):
            # As many loads in flight as a thread has registers for, and at most 16 columns of a table.
            for a_thread in (16, 32) if adam else (32,):
                rows = a_thread * 32 * warps // width
                if fewest <= rows <= most and width <= 512 * warps:
                    constants = {**variant.constants, "ROWS": rows, "COLUMNS": width}
                    found.append(variant._replace(constants=constants, num_warps=warps))
    return [other for other in found if other != variant]


def sort_pairs(features: Tensor, tokens: Tensor, d_sae: int) -> Pairs:
    """Sort pairs by feature: a run for each, in which pairs keep the order given.

    features, tokens [P] int64. A feature outside of [0, d_sae) makes a pair inactive. On a GPU: a radix sort of 32-bit
    keys, 4 passes of 24 bytes a pair, and one bisection of the sorted keys a feature.
    """
    keys = torch.where((features >= 0) & (features < d_sae), features, d_sae).to(torch.int32)
    keys, order = keys.sort(stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=keys.device)
    return Pairs(order, tokens[order], torch.searchsorted(keys, bounds))


def feature_sums(pairs: Pairs, weights: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    """For each i the sums of weights[i][p] * rows[i][token of p] over the pairs p of each feature.

    weights: [P] each, in the order in which the pairs were given. rows: [N, d] each, of any widths. Returns
    [d_sae, d] each, in the dtype of its rows; zeros for a feature without pairs. Two neighbours in the list, of one
    shape and dtype, are summed together. Memory besides the results: PARTIAL_BYTES a table, or, if that is less,
    8 d / MIN_PIECE bytes a pair.
    """
    pairs, left = Pairs(*map(aligned, pairs)), list(zip(weights, rows, strict=True))
    sums: list[Tensor] = []
    while left:
        (_, first), others = left[0], left[1:]
        alike = bool(others) and (others[0][1].shape, others[0][1].dtype) == (first.shape, first.dtype)
        together = 2 if alike and unit_of(first.dtype, first.shape[1]) > 1 else 1
        sums += _sum_together(pairs, left[:together])
        left = left[together:]
    return sums


def adam_rows(pairs: Pairs, tables: list[Table], hyper: Tensor, seed: Tensor, lazy: bool) -> None:
    """One step of Adam on each table, in place, from its gradient in factors.

    hyper [6] float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, 1 - beta1, beta2, 1 - beta2. seed [1] int64: the
    number of the step, for the rounding of bfloat16 moments. Both are read on the device. lazy: a row without a pair
    is not touched, as in torch.optim.SparseAdam (whose eps is outside of the correction: pass eps / sqrt(1 - beta2^t));
    otherwise each row is updated, as in torch.optim.Adam. Memory: as `feature_sums`; and a float32 copy of rows that
    are float16, or of a width that is no multiple of 16 bytes.
    """
    pairs, hyper, seed = Pairs(*map(aligned, pairs)), aligned(hyper), aligned(seed)
    for table in tables:
        for name in ("param", "exp_avg", "exp_avg_sq"):
            tensor = getattr(table, name)
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                given = f"an address that is {tensor.data_ptr() % 16} bytes past a multiple of 16"
                given = given if tensor.is_contiguous() else f"strides {tensor.stride()}"
                raise ValueError(
                    f"{name}: given {given}; needed a contiguous tensor at a multiple of 16 bytes: `clone` it"
                )
        if table.param.numel() > 0:
            _adam_table(pairs, table, hyper, seed, lazy)


def _adam_table(pairs: Pairs, table: Table, hyper: Tensor, seed: Tensor, lazy: bool) -> None:
    d_sae, d = table.param.shape
    rows = table.rows.float() if table.rows.dtype == torch.float16 else table.rows
    gradient, piece, unit = _gradients(pairs, [(table.weights, rows)])
    state = (table.param, table.exp_avg, table.exp_avg_sq, hyper, seed)
    types = (gradient[1].dtype, table.exp_avg.dtype)
    tiles = _SCALAR_SUM_TILES if unit == 1 else _UNIT_ROW_TILES if table.unit_rows else _SUM_TILES
    if table.unit_rows and d > tiles[-1].columns:
        variant = _adam_variant(*types, unit, _SCALAR_LONG_ROW_TILE if unit == 1 else _LONG_ROW_TILE, long=True)
        variant = tuning.best(variant, rows.device)
        variant.launch((d_sae,), *pairs, *gradient, *state, d // unit, piece, int(lazy))
    else:
        variant = tuning.best(_adam_variant(*types, unit, _fitting(tiles, d)), rows.device)
        grid = (triton.cdiv(d_sae, variant.constants["FEATURES"]), triton.cdiv(d, variant.constants["COLUMNS"]))
        variant.launch(grid, *pairs, *gradient, *state, d_sae, d // unit, piece, int(table.unit_rows), int(lazy))


def _sum_together(pairs: Pairs, given: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The sums of one table, or of two whose rows are of one shape and dtype."""
    d_sae, d = pairs.ends.shape[0] - 1, given[0][1].shape[1]
    dtype = given[0][1].dtype
    if d_sae == 0 or d == 0:
        return [rows.new_zeros(d_sae, d) for _, rows in given]
    gradients, piece, unit = _gradients(pairs, given)
    outs = [gradients[1].new_empty(d_sae, d) for _ in given]
    tiles = _SUM_TILES if unit > 1 else _SCALAR_SUM_TILES
    variant = _feature_sum_variant(outs[0].dtype, unit, len(given), _fitting(tiles, d))
    variant = tuning.best(variant, outs[0].device)
    grid = (triton.cdiv(d_sae, variant.constants["FEATURES"]), triton.cdiv(d, variant.constants["COLUMNS"]))
    first, second = (*gradients[:3], outs[0]), (*gradients[-3:], outs[-1])
    variant.launch(grid, *pairs, *first, *second, d_sae, d // unit, piece)
    return [out.to(dtype) for out in outs]


def _gradients(pairs: Pairs, given: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], int, int]:
    """What the kernels read of one table, or of two alike, given their weights and rows.

    Returns weights, rows and the sums of the pieces of long runs, of the one and then of the other; the length of a
    piece; and the unit of the rows, whose width is a multiple of it. Rows of a width that is none of 16 bytes, which
    models don't have, are widened to float32.
    """
    total, d = pairs.tokens.numel(), given[0][1].shape[1]
    unit = unit_of(given[0][1].dtype, d)
    shortest = MIN_PIECE if d >= 128 else MIN_NARROW_PIECE
    piece = max(shortest, triton.cdiv(8 * total * d, PARTIAL_BYTES))
    slots = 2 * triton.cdiv(total, piece) if total > piece else 0
    gradients = []
    for weights, rows in given:
        partial = torch.empty(slots, d, dtype=torch.float32, device=rows.device)
        gradients += [aligned(weights.float()), aligned(rows if unit > 1 else rows.float()), partial]
    if slots > 0:
        tiles = _PIECE_TILES if unit > 1 else _SCALAR_PIECE_TILES
        variant = _pieces_variant(gradients[1].dtype, unit, len(given), _fitting(tiles, d))
        variant = tuning.best(variant, partial.device)
        grid = (slots, triton.cdiv(d, variant.constants["COLUMNS"]))
        d_sae = pairs.ends.shape[0] - 1
        variant.launch(grid, *pairs, *gradients[:3], *gradients[-3:], d_sae, d // unit, piece)
    return gradients, piece, unit
