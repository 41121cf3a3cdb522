"""Sums of table rows by code, and what its gradient needs. A code: values [n, k], indices [n, k] into a table.

gather_sum   out[t] = sum_i values[t, i] * table[indices[t, i]]           the decoder; keys and values of look-back
gather_dot   out[t, i] = <grad[t], table[indices[t, i]]>                  its gradient to values
feature_sum  out[f] = sum over (t, i) with indices[t, i] == f of values[t, i] * rows[t]   its gradient to the table

Sums are in float32 and in a fixed order: the same input gives the same bits. An index outside the table is never
followed: it makes NaN of what depends on it in the first two, and is left out of the third.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import FLOATS, Variant, aligned, jit, unit_of, vector_units

ROWS = 8  # table rows that a program reads at once: 8 loads of 16 bytes in flight for every thread
PIECE = 256  # pairs of one feature that one program sums; a longer run is cut into pieces of this length


# out[t, c] = sum_i values[t, i] * table[indices[t, i], c]
#
# A program makes COLUMNS columns of one token, with one warp: each thread owns 16 bytes of every row, so the sum
# needs no exchange between threads. Tokens come before columns, so that programs in flight share a narrow
# slice of the table, which stays in L2 where d_sae * COLUMNS * e fits.
# Bytes: n k d e gathered, n d e written, and the code read once for each block of columns
# (n k (8 + e) d / COLUMNS, from L2). Operations: 2 n k d.
# Floor: the gathered bytes, at the speed of memory, or of L2 for what is hit twice.
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
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, k, ROWS):
        o_i = start + tl.arange(0, ROWS)
        m_i = o_i < k
        # [ROWS]
        b_indices = tl.load(indices_ptr + token * k + o_i, mask=m_i, other=0)
        # [ROWS]
        b_values = tl.load(values_ptr + token * k + o_i, mask=m_i, other=0.0).to(tl.float32)
        m_inside = (b_indices >= 0) & (b_indices < d_sae)
        b_values = tl.where(m_inside, b_values, float("nan"))
        p_rows = table_ptr + b_indices[:, None] * d + o_c[None, :]
        # [ROWS, COLUMNS]
        b_rows = tl.load(p_rows, mask=(m_i & m_inside)[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_values[:, None] * b_rows, axis=0)
    tl.store(out_ptr + token * d + o_c, b_sum.to(out_ptr.dtype.element_ty), mask=m_c)


# out[t, i] = <grad[t], table[indices[t, i]]>
#
# A program takes ROWS of the k rows of one token, whole, COLUMNS at a time, with one warp: each thread adds up its
# own products, and the threads' sums are added once, at the end.
# Bytes: n k d e gathered, n d e of grad read (again for each ROWS of k, from L1 or L2), n k e written.
# Operations: 2 n k d. Floor: the gathered bytes.
@jit
def _gather_dot(
    grad_ptr,
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
    blocks = tl.cdiv(k, ROWS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    m_i = o_i < k
    # [ROWS]
    b_indices = tl.load(indices_ptr + token * k + o_i, mask=m_i, other=0)
    m_inside = (b_indices >= 0) & (b_indices < d_sae)
    p_rows = table_ptr + b_indices[:, None] * d
    b_products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        o_c = start + tl.arange(0, COLUMNS)
        m_c = o_c < d
        # [COLUMNS]
        b_grad = tl.load(grad_ptr + token * d + o_c, mask=m_c, other=0.0).to(tl.float32)
        # [ROWS, COLUMNS]
        b_rows = tl.load(p_rows + o_c[None, :], mask=(m_i & m_inside)[:, None] & m_c[None, :], other=0.0)
        b_products += b_grad[None, :] * b_rows.to(tl.float32)
    b_dots = tl.where(m_inside, tl.sum(b_products, axis=1), float("nan"))
    tl.store(out_ptr + token * k + o_i, b_dots.to(out_ptr.dtype.element_ty), mask=m_i)


@triton.jit
def _sum_run(weights_ptr, tokens_ptr, rows_ptr, start, end, d, o_c, m_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sum over pairs p in start .. end of weights[p] * rows[tokens[p]], at columns o_c: [COLUMNS] float32."""
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        o_p = first + tl.arange(0, ROWS)
        m_p = o_p < end
        # [ROWS]
        b_tokens = tl.load(tokens_ptr + o_p, mask=m_p, other=0)
        # [ROWS]
        b_weights = tl.load(weights_ptr + o_p, mask=m_p, other=0.0)
        p_rows = rows_ptr + b_tokens[:, None] * d + o_c[None, :]
        # [ROWS, COLUMNS]
        b_rows = tl.load(p_rows, mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_weights[:, None] * b_rows, axis=0)
    return b_sum


# partial[p, c] = the sum over piece p of a run that is longer than PIECE pairs.
#
# A program makes COLUMNS columns of one piece. Pieces are numbered feature by feature; `piece_ends[f]` is one past
# the last piece of feature f, and features with short runs have none.
# Bytes: (pairs in long runs) d e gathered, mostly from L2: rows is n d e. Written: 4 d for each piece.
# Floor: the gathered bytes at the speed of L2.
@jit
def _feature_pieces(
    weights_ptr,
    tokens_ptr,
    rows_ptr,
    run_ends_ptr,
    piece_ends_ptr,
    features_ptr,
    partial_ptr,
    d_sae: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    piece = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    feature = tl.load(features_ptr + piece)  # d_sae for the pieces that the static grid has too many
    if feature < d_sae:
        run_start = tl.load(run_ends_ptr + feature)
        run_end = tl.load(run_ends_ptr + feature + 1)
        start = run_start + (piece - tl.load(piece_ends_ptr + feature)) * PIECE
        end = min(start + PIECE, run_end)
        b_sum = _sum_run(weights_ptr, tokens_ptr, rows_ptr, start, end, d, o_c, m_c, ROWS, COLUMNS)
        tl.store(partial_ptr + piece * d + o_c, b_sum, mask=m_c)


# out[f, c] = the sum over the pairs of feature f, in the order of their tokens: from the pairs themselves for a run
# of at most PIECE, from the partial sums of its pieces for a longer one.
#
# A program makes COLUMNS columns of one feature, with one warp, zeros where the feature has no pair.
# Bytes: (pairs in short runs) d e gathered, mostly from L2; d_sae d e written. Operations: 2 n k d.
# Floor: writing the result, d_sae d e, and reading rows once, n d e.
@jit
def _feature_sum(
    weights_ptr,
    tokens_ptr,
    rows_ptr,
    run_ends_ptr,
    piece_ends_ptr,
    partial_ptr,
    out_ptr,
    units: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    feature = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < d
    first_piece = tl.load(piece_ends_ptr + feature)
    last_piece = tl.load(piece_ends_ptr + feature + 1)
    if first_piece < last_piece:
        b_sum = tl.zeros([COLUMNS], tl.float32)
        for piece in range(first_piece, last_piece):
            # [COLUMNS]
            b_sum += tl.load(partial_ptr + piece * d + o_c, mask=m_c, other=0.0)
    else:
        start = tl.load(run_ends_ptr + feature)
        end = tl.load(run_ends_ptr + feature + 1)
        b_sum = _sum_run(weights_ptr, tokens_ptr, rows_ptr, start, end, d, o_c, m_c, ROWS, COLUMNS)
    tl.store(out_ptr + feature * d + o_c, b_sum.to(out_ptr.dtype.element_ty), mask=m_c)


def _gather_sum_variant(values: torch.dtype, table: torch.dtype, unit: int) -> Variant:
    tensors = {"values_ptr": values, "indices_ptr": torch.int64, "table_ptr": table, "out_ptr": table}
    return Variant(_gather_sum, tensors, _tile(unit), num_warps=1, num_stages=1)


def _gather_dot_variant(grad: torch.dtype, table: torch.dtype, unit: int) -> Variant:
    tensors = {"grad_ptr": grad, "indices_ptr": torch.int64, "table_ptr": table, "out_ptr": grad}
    return Variant(_gather_dot, tensors, _tile(unit), num_warps=1, num_stages=1)


_PAIRS = {"weights_ptr": torch.float32, "tokens_ptr": torch.int64}
_ENDS = {"run_ends_ptr": torch.int64, "piece_ends_ptr": torch.int64}


def _feature_pieces_variant(rows: torch.dtype, unit: int) -> Variant:
    tensors = {**_PAIRS, "rows_ptr": rows, **_ENDS, "features_ptr": torch.int64, "partial_ptr": torch.float32}
    constants = {"UNIT": unit, "PIECE": PIECE, **_tile(unit)}
    return Variant(_feature_pieces, tensors, constants, num_warps=1, num_stages=1)


def _feature_sum_variant(rows: torch.dtype, unit: int) -> Variant:
    tensors = {**_PAIRS, "rows_ptr": rows, **_ENDS, "partial_ptr": torch.float32, "out_ptr": rows}
    return Variant(_feature_sum, tensors, _tile(unit), num_warps=1, num_stages=1)


def _tile(unit: int) -> dict[str, int]:
    """One warp reads a unit a thread of ROWS rows, or four elements of half as many, one by one."""
    return {"UNIT": unit, "ROWS": ROWS if unit > 1 else ROWS // 2, "COLUMNS": 32 * max(unit, 4)}


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    found = []
    for dtype in FLOATS:
        for unit in vector_units(dtype):
            for other in dict.fromkeys((dtype, torch.float32)):
                found += [_gather_sum_variant(other, dtype, unit), _gather_dot_variant(other, dtype, unit)]
            found += [_feature_pieces_variant(dtype, unit), _feature_sum_variant(dtype, unit)]
    return found


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """sum_i values[t, i] * table[indices[t, i]].

    values [n, k], indices [n, k] int64, table [d_sae, d] -> [n, d] in the dtype of table. Sums in float32.
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
    variant = _gather_sum_variant(values.dtype, table.dtype, unit)
    grid = (n, triton.cdiv(d, variant.constants["COLUMNS"]))
    variant.launch(grid, aligned(values), aligned(indices), aligned(table), out, k, d_sae, d // unit)
    return out


def gather_dot(grad: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """<grad[t], table[indices[t, i]]>.

    grad [n, d], indices [n, k] int64, table [d_sae, d] -> [n, k] in the dtype of grad. Sums in float32.
    An index outside the table gives NaN.
    """
    n, k = indices.shape
    d_sae, d = table.shape
    grad_dtype = grad.dtype
    if grad.dtype != table.dtype:
        grad = grad.float()
    out = grad.new_empty(n, k)
    if out.numel() == 0:
        return out.to(grad_dtype)
    unit = unit_of(table.dtype, d)
    variant = _gather_dot_variant(grad.dtype, table.dtype, unit)
    grid = (n * triton.cdiv(k, variant.constants["ROWS"]),)
    variant.launch(grid, aligned(grad), aligned(indices), aligned(table), out, k, d_sae, d // unit)
    return out.to(grad_dtype)


def feature_sum(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """The sum of values[t, i] * rows[t] over the pairs (t, i) with indices[t, i] == f, for each feature f.

    values [n, k], indices [n, k] int64, rows [n, d] -> [d_sae, d] in the dtype of rows; zeros for a feature
    without pairs. Sums in float32, in the order of the tokens: deterministic, without atomics and without a word
    from the host. Memory besides the result: about 50 bytes a pair, and 8 d / PIECE bytes a pair for the
    partial sums.
    """
    n, k = indices.shape
    d = rows.shape[1]
    out = rows.new_empty(d_sae, d)
    if n * k == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    rows = aligned(rows)

    # The pairs in order of feature, those of no feature last.
    features = torch.where((indices >= 0) & (indices < d_sae), indices, d_sae).flatten()
    features, order = features.to(torch.int32).sort(stable=True)
    weights = values.flatten()[order].float()
    tokens = order // k
    # run_ends[f] .. run_ends[f + 1] are the pairs of feature f.
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=rows.device)
    run_ends = torch.searchsorted(features, bounds)
    lengths = run_ends.diff()
    # Likewise piece_ends, for the pieces of long runs: at most two pieces for each PIECE pairs.
    pieces = torch.where(lengths > PIECE, (lengths + PIECE - 1) // PIECE, 0)
    piece_ends = torch.zeros_like(run_ends)
    torch.cumsum(pieces, 0, out=piece_ends[1:])
    max_pieces = 2 * n * k // PIECE
    piece_features = torch.searchsorted(piece_ends[1:], torch.arange(max_pieces, device=rows.device), right=True)
    partial = torch.empty(max_pieces, d, dtype=torch.float32, device=rows.device)

    unit = unit_of(rows.dtype, d)
    by_piece, by_feature = _feature_pieces_variant(rows.dtype, unit), _feature_sum_variant(rows.dtype, unit)
    blocks = triton.cdiv(d, by_feature.constants["COLUMNS"])
    pairs, ends = (weights, tokens), (run_ends, piece_ends)
    if max_pieces > 0:
        by_piece.launch((max_pieces, blocks), *pairs, rows, *ends, piece_features, partial, d_sae, d // unit)
    by_feature.launch((d_sae, blocks), *pairs, rows, *ends, partial, out, d // unit)
    return out
