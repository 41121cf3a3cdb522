"""The decoder and its gradients. A code is values [n, k] and indices [n, k] into a table [d_sae, d].

Each row of a code ends at its length L (`kernels/codes.py`). A program finds that of its row by itself: its values are
one or two cache lines, which it needs anyway. So nothing is read back from the device, and the loads of a row of the
table, which are what a gather costs, follow L and not k.

gather_sum    the decoder, a weighted embedding bag: out[t] = sum_i values[t, i] * table[indices[t, i]]
gather_dot    its gradient to values, an SDDMM: out[t, i] = <grad[t], table[indices[t, i]]>
feature_sum   its gradient to the table, an SpMM (code^T rows): out[f] = sum over the pairs (t, i) with
              indices[t, i] == f of values[t, i] * rows[t]

Sums are in float32 and in a fixed order: the same input gives the same bits. An index outside the table is never
followed. In gather_sum and gather_dot it gives NaN where it is used; feature_sum leaves its pair out.

A gather reads n L d e bytes (e: bytes an element), several times the table, so the table should be in L2. Columns are
therefore split into slabs, narrow enough that a slab of all d_sae rows fits L2, and all tokens finish a slab before the
next begins. Then each byte of the table comes from memory once, and the gather runs at the rate of L2.

gather_dot could instead go through the pairs sorted by feature, and read each row of the table once without slabs. It
would then gather the rows of grad: just as many bytes, with runs of unequal length and scattered results. And it would
have to wait for the sort, which only the table's gradient needs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import before_length
from . import tuning
from .feature_sums import feature_sums, sort_pairs
from .variant import FLOATS, Variant, aligned, jit, unit_of, vector_units

SLAB_BYTES = 24 * 2**20  # half of an H100's L2: each of its two halves caches for its own SMs
FEW_PROGRAMS = 2048  # fewer programs of one warp leave most of a GPU idle, so each gets more warps


PLACES = tl.constexpr(128)  # values looked at together for the length of a row


@triton.jit
def _length(values_ptr, row, k):
    """The place after the last non-zero value of this row of values [n, k]; NaN is non-zero."""
    length = k * 0
    for start in range(0, k, PLACES):
        o_i = start + tl.arange(0, PLACES)
        # [PLACES]
        b_values = tl.load(values_ptr + row * k + o_i, mask=o_i < k, other=0.0)
        length = tl.maximum(length, tl.max(tl.where(b_values != 0, o_i + 1, 0), axis=0))
    return length


# out[t, c] = sum_i values[t, i] * table[indices[t, i], c], over i < L_t
#
# A program: COLUMNS columns of one token, ROWS rows of the table at a time, in one warp; in several warps, which split
# the rows, where tokens are few. A thread loads 16 bytes of a row, and has 8 such loads in flight: 4 KB a warp, 128 KB
# a multiprocessor with 32 programs. Little's law asks for 16 KB (3 TB/s * 700 ns / 132 multiprocessors).
# The next indices are loaded while these rows are on their way, and the first before the length is known: so finding
# the length adds no wait.
# All tokens of a slab of columns come before the next slab, so programs in flight share a slab.
# Bytes: n L d e gathered, from L2 where a slab fits; the table once from memory; n d e written; the code once for each
# slab, n (8 L + e k) d / COLUMNS, from L2. Operations: 2 n L d, and for each slab 2 n k for the length. Floor: n L d e
# at the rate of memory. L: the mean length, k for codes of topk_encode.
# Predicted for bf16 (kernels/PREDICTED.md; shapes: feature_rows.py): A 0.08 ms (floor 0.09), B 0.46 (0.56), C 0.87
# (1.0); less than the floor where L2 holds the slabs.
@jit
def _gather_sum(
    values_ptr,
    indices_ptr,
    table_ptr,
    out_ptr,
    k: tl.int32,
    d_sae: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    token = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    o_i = tl.arange(0, ROWS)
    # [ROWS]
    b_indices = tl.load(indices_ptr + token * k + o_i, mask=o_i < k, other=0)
    length = _length(values_ptr, token, k)
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, length, ROWS):
        m_i = start + o_i < length
        # [ROWS]
        b_values = tl.load(values_ptr + token * k + start + o_i, mask=m_i, other=0.0).to(tl.float32)
        m_inside = (b_indices >= 0) & (b_indices < d_sae)
        b_values = tl.where(m_inside | (m_i == 0), b_values, float("nan"))
        p_rows = table_ptr + b_indices[:, None] * d + o_c[None, :]
        # [ROWS, COLUMNS]
        b_rows = tl.load(p_rows, mask=(m_i & m_inside)[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        # [ROWS]
        b_indices = tl.load(indices_ptr + token * k + start + ROWS + o_i, mask=start + ROWS + o_i < length, other=0)
        b_sum += tl.sum(b_values[:, None] * b_rows, axis=0)
    tl.store(out_ptr + token * d + o_c, b_sum.to(out_ptr.dtype.element_ty), mask=m_c)


# partial[s, t, i] = <grad[t], table[indices[t, i]]> over the columns of slab s, and 0 for i >= L_t. `_sum_slabs` sums
# over s.
#
# A program: one token and one slab of columns, ROWS rows of the table at a time; grad stays in registers. The next
# indices are loaded ahead, as in `_gather_sum`.
# Bytes: n L d e gathered, from L2 where a slab fits; the table once from memory; n d e of grad; the code once for each
# slab, n (8 L + e k) d / COLUMNS, from L2; 4 n k d / COLUMNS written and read again, so slabs are wider than in
# `_gather_sum`. Operations: 2 n L d, 5 shuffles for each row and slab, and for each slab 2 n k for the length. Floor:
# n L d e at the rate of memory.
# Predicted for bf16, with the sum over slabs: A 0.10 ms (floor 0.09), B 0.52 (0.56).
@jit
def _gather_dot(
    grad_ptr,
    values_ptr,
    indices_ptr,
    table_ptr,
    partial_ptr,
    k: tl.int32,
    d_sae: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    token = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    p_partial = partial_ptr + (tl.program_id(1) * tl.num_programs(0).to(tl.int64) + token) * k
    o_i = tl.arange(0, ROWS)
    # [ROWS]
    b_indices = tl.load(indices_ptr + token * k + o_i, mask=o_i < k, other=0)
    # [COLUMNS]
    b_grad = tl.load(grad_ptr + token * d + o_c, mask=m_c, other=0.0).to(tl.float32)
    length = _length(values_ptr, token, k)
    for start in range(0, length, ROWS):
        m_i = start + o_i < length
        m_inside = (b_indices >= 0) & (b_indices < d_sae)
        p_rows = table_ptr + b_indices[:, None] * d + o_c[None, :]
        # [ROWS, COLUMNS]
        b_rows = tl.load(p_rows, mask=(m_i & m_inside)[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_next = tl.load(indices_ptr + token * k + start + ROWS + o_i, mask=start + ROWS + o_i < length, other=0)
        b_dots = tl.where(m_inside, tl.sum(b_grad[None, :] * b_rows, axis=1), float("nan"))
        tl.store(p_partial + start + o_i, b_dots, mask=m_i)
        b_indices = b_next
    for start in range(length, k, PLACES):
        o_rest = start + tl.arange(0, PLACES)
        tl.store(p_partial + o_rest, tl.zeros([PLACES], tl.float32), mask=o_rest < k)


# out[p] = sum over slabs of partial[s, p], in the order of the slabs
#
# A program: BLOCK pairs. Bytes: 4 a slab and pair, e a pair. Floor: the bytes, from L2; A 1, B 7, C 12 us.
@jit
def _sum_slabs(
    partial_ptr,
    out_ptr,
    slabs: tl.int32,
    pairs: tl.int64,
    BLOCK: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for slab in range(slabs):
        # [BLOCK]
        b_sum += tl.load(partial_ptr + slab * pairs + o_p, mask=o_p < pairs, other=0.0)
    tl.store(out_ptr + o_p, b_sum.to(out_ptr.dtype.element_ty), mask=o_p < pairs)


class _Tile(NamedTuple):
    """What a program of a gather handles at a time: `rows` rows of `bytes` bytes."""

    rows: int
    bytes: int
    warps: int


# 8 loads of 16 bytes in flight a thread. Widest first.
_SLABS = [_Tile(8, 512, 1), _Tile(16, 256, 1), _Tile(32, 128, 1)]
_FEW = _Tile(64, 512, 8)
_OTHERS = [_Tile(4, 512, 1), _Tile(16, 512, 1), _Tile(16, 512, 2), _Tile(32, 256, 2), _Tile(16, 1024, 4)]


def _constants(unit: int, tile: _Tile, itemsize: int) -> dict[str, int]:
    return {"UNIT": unit, "ROWS": tile.rows, "COLUMNS": tile.bytes // itemsize}


def _gather_sum_variant(values: torch.dtype, table: torch.dtype, unit: int, tile: _Tile) -> Variant:
    tensors = {"values_ptr": values, "indices_ptr": torch.int64, "table_ptr": table, "out_ptr": table}
    return Variant(_gather_sum, tensors, _constants(unit, tile, table.itemsize), tile.warps, num_stages=1)


def _gather_dot_variant(grad: torch.dtype, table: torch.dtype, unit: int, tile: _Tile) -> Variant:
    tensors = {
        "grad_ptr": grad,
        "values_ptr": grad,
        "indices_ptr": torch.int64,
        "table_ptr": table,
        "partial_ptr": torch.float32,
    }
    return Variant(_gather_dot, tensors, _constants(unit, tile, table.itemsize), tile.warps, num_stages=1)


def _sum_slabs_variant(dtype: torch.dtype) -> Variant:
    tensors = {"partial_ptr": torch.float32, "out_ptr": dtype}
    return Variant(_sum_slabs, tensors, {"BLOCK": 512}, num_warps=4, num_stages=1)


def _tiles(dtype: torch.dtype, unit: int) -> list[_Tile]:
    """The tiles that `_tile` chooses from. With UNIT 1 a load is one element: 4 loads a thread for 128 columns."""
    return [*_SLABS, _FEW] if unit > 1 else [_Tile(4, 128 * dtype.itemsize, 1)]


def _tile(n: int, table: Tensor, unit: int, narrowest: int) -> _Tile:
    """The widest slab that fits L2 and is not below `narrowest` bytes; where tokens are few, a tile of many warps."""
    d_sae, d = table.shape
    if unit == 1:
        return _tiles(table.dtype, unit)[0]
    if n * triton.cdiv(d * table.itemsize, _SLABS[0].bytes) < FEW_PROGRAMS:
        return _FEW
    allowed = [tile for tile in _SLABS if tile.bytes >= narrowest]
    return next((tile for tile in allowed if d_sae * tile.bytes <= SLAB_BYTES), allowed[-1])


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel, before tuning."""
    found = []
    for dtype in FLOATS:
        for unit in vector_units(dtype):
            for tile in _tiles(dtype, unit):
                for other in dict.fromkeys((dtype, torch.float32)):
                    found.append(_gather_sum_variant(other, dtype, unit, tile))
                    found.append(_gather_dot_variant(other, dtype, unit, tile))
    return [*found, *map(_sum_slabs_variant, FLOATS)]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    if variant.kernel is _sum_slabs:
        return []
    itemsize = 16 // variant.constants["UNIT"]
    if itemsize == 16:
        return []
    settings = [(_constants(variant.constants["UNIT"], tile, itemsize), tile.warps) for tile in [*_SLABS, *_OTHERS]]
    others = [variant._replace(constants=constants, num_warps=warps) for constants, warps in settings]
    return [other for other in others if other != variant]


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """out[t] = sum_i values[t, i] * table[indices[t, i]], over the entries before the length of the row.

    values [n, k], indices [n, k] int64, table [d_sae, d] -> [n, d] in the dtype of table, summed in float32.
    A token with an index outside the table gives NaN.
    """
    n, k = indices.shape
    d_sae, d = table.shape
    if values.dtype != table.dtype:
        values = values.float()
    out = table.new_empty(n, d)
    if out.numel() == 0:
        return out
    unit = unit_of(table.dtype, d)
    variant = _gather_sum_variant(values.dtype, table.dtype, unit, _tile(n, table, unit, narrowest=128))
    variant = tuning.best(variant, table.device)
    grid = (n, triton.cdiv(d, variant.constants["COLUMNS"]))
    variant.launch(grid, aligned(values), aligned(indices), aligned(table), out, k, d_sae, d // unit)
    return out


def gather_dot(grad: Tensor, values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """out[t, i] = <grad[t], table[indices[t, i]]>, and 0 at and behind the length of a row.

    grad [n, d], values, indices [n, k] int64, table [d_sae, d] -> [n, k] in the dtype of grad, summed in float32.
    An index outside the table gives NaN. Memory: 4 bytes a pair for each slab; a slab is 256 or 512 bytes of a row.
    """
    n, k = indices.shape
    d_sae, d = table.shape
    dtype = grad.dtype
    if not grad.dtype == values.dtype == table.dtype:
        grad, values = grad.float(), values.float()
    if n * k == 0 or d == 0:
        inside = (indices >= 0) & (indices < d_sae)
        return torch.where(inside | ~before_length(values), 0.0, torch.nan).to(dtype)
    unit = unit_of(table.dtype, d)
    variant = _gather_dot_variant(grad.dtype, table.dtype, unit, _tile(n, table, unit, narrowest=256))
    variant = tuning.best(variant, table.device)
    slabs = triton.cdiv(d, variant.constants["COLUMNS"])
    partial = torch.empty(slabs, n, k, dtype=torch.float32, device=table.device)
    given = aligned(grad), aligned(values), aligned(indices), aligned(table)
    variant.launch((n, slabs), *given, partial, k, d_sae, d // unit)
    if slabs == 1 and dtype == torch.float32:
        return partial[0]
    out = torch.empty(n, k, dtype=dtype, device=table.device)
    summing = _sum_slabs_variant(dtype)
    summing.launch((triton.cdiv(n * k, summing.constants["BLOCK"]),), partial, out, slabs, n * k)
    return out


def feature_sum(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """out[f] = sum over the pairs (t, i) before the length of t with indices[t, i] == f of values[t, i] * rows[t].

    values [n, k], indices [n, k] int64, rows [n, d] -> [d_sae, d] in the dtype of rows; zeros for a feature without
    pairs. Summed in float32, in the order of the tokens.
    """
    n, k = indices.shape
    places = torch.arange(n * k, device=indices.device)
    features = torch.where(before_length(values), indices, d_sae)
    pairs = sort_pairs(features.flatten(), places // max(k, 1), d_sae)
    return feature_sums(pairs, [values.flatten()], [rows])[0]
