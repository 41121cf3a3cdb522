"""topk_encode: the k largest pre-activations of each token, exactly, in a bounded workspace.

Tokens are taken in chunks, and the features of a chunk in ranges, so that many rows share what is read of W_enc.
Each range has a workspace [rows, width], reused by the next, and two kernels:

1. A product (`_pre_acts`, or `_pre_acts_tma` on Hopper and later) with its bias, and the largest of each group of
   GROUP columns, from the same registers. The row's `bound` is the k-th largest of the ranges before. A group whose
   largest is not above it holds nothing of the top k and is not written, so what passes through memory is one range
   in full, then about k groups in all for each further doubling of the ranges done.
2. `_merge`: from the maxima, the groups with something above the bound; if they are more than k, the k with the
   largest maxima. They hold every one of the k largest: an element of another group has k elements before it, the
   maxima of those k groups. Ties go to lower groups, so this also holds for "equal ones by lower index first".
   Of the k found so far and those groups, the k largest; the k-th is the new bound.

Last `_finish` sorts k entries a row. The bound is proved, not guessed: there is no overflow and nothing to fall back
to, whatever the numbers are. Launches and allocations depend on shapes alone.

The other scheme is in topk_threshold.py: a threshold guessed from a sample, one product that appends what exceeds it,
a count as the proof, and a fallback. At the shapes below, of which both do the same operations:

|                                          | a bound from ranges (here)  | a sampled threshold                   |
|------------------------------------------|-----------------------------|---------------------------------------|
| bytes written by the product, A, B, C    | 0.32, 0.49, 0.61 GB         | 0.14, 0.23, 0.36 GB                   |
| all pre-activations would be             | 1.07, 2.15, 4.29 GB         |                                       |
| launches, A, B, C                        | 12, 20, 38                  | 24, 32, 56, half of them for fallback |
| sm_90, 128 x 256, bf16: registers, spill | 244, 0                      | 252, 0 (on sm_100 64 bytes)           |
| shared memory, instructions in all       | 176 KB, 1712                | 160 KB, 2544                          |
| in the epilogue                          | 32 shuffles a thread        | 256, and an atomic addition a hit     |
| redone                                   | nothing                     | rows of which the sample misleads     |

This one is kept: it can't fail, needs no luck with the order of features, and its epilogue is half as long, which at
A counts for more than 0.18 GB (0.06 ms, most of it under the product). A GPU has to confirm it; it may not at C,
where the product is 95% of either and there are 18 ranges.

Times written beside the kernels are predicted, none is measured: the larger of operations and bytes at the rates that
an H100 was measured to reach, 798 TFLOP/s in bf16 and 3.0 TB/s. The shapes are those of the benchmark:
A n=8192, d_in=768, d_sae=32768, k=32; B 8192, 2304, 65536, 64; C 8192, 4096, 131072, 64.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .variant import (
    FLOATS,
    Variant,
    aligned,
    dot_precision,
    dtypes_and_precisions,
    jit,
    max_or_nan,
    unit_of,
    vector_units,
)

WORKSPACE_BYTES = 256 * 2**20
GROUP = 32  # columns in a group: the maxima cost 1/GROUP of the pre-activations, the candidates up to k*GROUP
LEAST_WIDTH = 4096  # columns in a range: in fewer, a range's product would be short next to its selection
RANGE_UNIT = 256  # what a range's width is a multiple of: the widest tile, so that no tile is in two ranges
NAN_KEY = 2**31 - 1  # above the key of +inf
_NO_KEY = tl.constexpr(-(2**31))  # below the key of -inf


@triton.jit
def _to_key(b_acts):
    """float32 -> int32 of the same order; -0.0 as +0.0; every NaN as NAN_KEY."""
    b_bits = tl.where(b_acts == 0.0, 0.0, b_acts).to(tl.int32, bitcast=True)
    b_keys = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_acts == b_acts, b_keys, 0x7FFFFFFF)


@triton.jit
def _tile(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tiles go down GROUP_M row blocks before the next column block: those in flight share x and W_enc in L2."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    band = tile // (GROUP_M * blocks_n)
    band_m = min(blocks_m - band * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * blocks_n)
    return band * GROUP_M + within % band_m, within // band_m


@triton.jit
def _write_hits(
    b_acts,
    o_m,
    m_m,
    block_n,
    bound_ptr,
    acts_ptr,
    maxima_ptr,
    columns,
    stride,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    SUBTRACT: tl.constexpr,
):
    """The maxima of a tile's groups, and the groups whose maximum is above the bound of their row, to memory.

    Everything stays in the registers where the product left it, groups as a third axis: layouts are not converted.
    """
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    o_g = block_n * GROUPS + tl.arange(0, GROUPS)
    o_n = (o_g * GROUP)[None, :, None] + tl.arange(0, GROUP)[None, None, :]
    m_tile = m_m[:, None] & (o_g * GROUP < columns)[None, :]
    o_row = o_m.to(tl.int64)
    p_acts = acts_ptr + o_row[:, None, None] * stride + o_n
    b_grouped = tl.reshape(b_acts, [BLOCK_M, GROUPS, GROUP])
    if SUBTRACT:
        # [BLOCK_M, GROUPS, GROUP]
        b_grouped = tl.load(p_acts, mask=m_tile[:, :, None] & (o_n < columns), other=0.0) - b_grouped
    if not WHOLE:
        b_grouped = tl.where(o_n < columns, b_grouped, float("-inf"))
    b_maxima = tl.reduce(b_grouped, 2, max_or_nan)
    tl.store(maxima_ptr + o_row[:, None] * groups + o_g[None, :], b_maxima, mask=m_tile)
    # [BLOCK_M]
    b_bound = tl.load(bound_ptr + o_m, mask=m_m, other=float("inf"))
    # Not "above": a NaN is above any bound, and everything is above a bound of NaN.
    m_hit = (m_tile & ~(b_maxima <= b_bound[:, None]))[:, :, None]
    if not WHOLE:
        m_hit = m_hit & (o_n < columns)
    tl.store(p_acts, b_grouped, mask=m_hit)


@triton.jit
def _multiply_tile(
    x_ptr,
    W_ptr,
    o_m,
    o_n,
    m_m,
    m_n,
    d_in,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[o_m, :depth] W_enc[o_n, :depth]^T, in float32."""
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + o_m.to(tl.int64)[:, None] * d_in + o_k[None, :]
    p_W = W_ptr + o_n.to(tl.int64)[:, None] * d_in + o_k[None, :]
    b_acts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        m_k = o_k < depth - start
        # [BLOCK_M, BLOCK_K]
        b_x = tl.load(p_x + start, mask=m_m[:, None] & m_k[None, :], other=0.0)
        # [BLOCK_N, BLOCK_K]
        b_W = tl.load(p_W + start, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_acts = tl.dot(b_x, b_W.T, b_acts, input_precision=PRECISION)
    return b_acts


# acts[r, f] = <x_{first+r}, W_enc_f> + b_enc_f where its group of columns has a maximum above bound[r], and
# maxima[r, g] = the largest of columns g*GROUP : (g+1)*GROUP, NaN if one is NaN. With SUBTRACT, in place:
# acts[r, f] - <x_{first+r}, W_enc_f>. With GATED, only rows of `only`; a tile without one costs a load.
#
# A program makes a tile [BLOCK_M, BLOCK_N], for any width and stride: where they are multiples of UNIT > 1, and the
# columns of GROUP, it loads and stores 16 bytes at a time.
# Operations: 2 rows d_in columns. Bytes: x once; W_enc once for every GROUP_M row blocks, from L2 where a range of it
# fits (A 10, B 34, C 61 MB); written 4 bytes for each column of a group above the bound and 4 a group.
# Floor: the operations, at the rate of the tensor cores. Predicted for all ranges, A 0.52, B 3.10, C 11.0 ms; the
# bytes would take A 0.14, B 0.7, C 2.1 ms with GROUP_M = 16. Written are A 0.32, B 0.49, C 0.61 GB of
# 1.1, 2.1, 4.3 GB of pre-activations: one range, k/q groups a row in the range after q others, and the maxima.
# With SUBTRACT and d_in = 512, bytes and operations come close: 4 bytes read a column, and about a quarter of them
# written; A 0.45, B 0.89, C 1.79 ms by bytes, 0.34, 0.69, 1.38 ms by operations.
@jit
def _pre_acts(
    x_ptr,
    W_ptr,
    bias_ptr,
    bound_ptr,
    acts_ptr,
    maxima_ptr,
    only_ptr,
    first: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    units: tl.int32,
    stride: tl.int32,
    groups: tl.int32,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    SUBTRACT: tl.constexpr,
    GATED: tl.constexpr,
):
    WHOLE: tl.constexpr = UNIT > 1
    d_in = units * UNIT
    if WHOLE:
        stride = stride * GROUP
    block_m, block_n = _tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    m_n = o_n < columns
    depth = d_in
    if GATED:
        # [BLOCK_M]
        m_m = m_m & (tl.load(only_ptr + first + o_m, mask=m_m, other=0) != 0)
        depth = tl.where(tl.max(m_m.to(tl.int32), 0) > 0, d_in, 0)
    b_acts = _multiply_tile(x_ptr, W_ptr, first + o_m, o_n, m_m, m_n, d_in, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if not SUBTRACT:
        # [BLOCK_N]
        b_acts += tl.load(bias_ptr + o_n, mask=m_n, other=0.0)[None, :]
    _write_hits(
        b_acts, o_m, m_m, block_n, bound_ptr, acts_ptr, maxima_ptr, columns, stride, groups,
        BLOCK_M, BLOCK_N, GROUP, WHOLE, SUBTRACT,
    )  # fmt: skip


# The same for widths that are multiples of 16 bytes and whole groups of columns, on Hopper and later.
#
# GROUP_M = 16 makes the 132 tiles that an H100 has in flight a square: 16 blocks of 128 rows, 8 of 256 columns.
# RESIDENT programs a multiprocessor walk over the tiles, and a TMA descriptor fetches the blocks of x and W_enc. With
# FLATTEN the loops are one: the first blocks of the next tile arrive while the last one is written. A tile of
# 128 x 256 is what shared memory can feed: per step of 64 it takes 1024 cycles to multiply in 16 bits, and 48 KB in
# and 80 KB out of shared memory at 128 bytes a cycle take 1024 as well; 128 x 128 takes 512 and 640. The epilogue is
# about 900 instructions a warp, 2000 cycles a tile: against 12,288 of products at A, 36,864 at B, 65,536 at C. The
# forms with two small programs a multiprocessor hide it behind the other's products; a GPU has to say which wins.
@jit
def _pre_acts_tma(
    x_desc,
    W_desc,
    bias_ptr,
    bound_ptr,
    acts_ptr,
    maxima_ptr,
    rows: tl.int32,
    columns: tl.int32,
    steps: tl.int32,
    stride: tl.int32,
    groups: tl.int32,
    programs: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    tl.assume(steps > 0)
    stride = stride * GROUP
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        block_m, block_n = _tile(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        b_acts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], zeros outside the tensors
            b_x = x_desc.load([block_m * BLOCK_M, step * BLOCK_K])
            b_W = W_desc.load([block_n * BLOCK_N, step * BLOCK_K])
            b_acts = tl.dot(b_x, b_W.T, b_acts, input_precision=PRECISION)
        o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # [BLOCK_N]
        b_acts += tl.load(bias_ptr + o_n, mask=o_n < columns, other=0.0)[None, :]
        _write_hits(
            b_acts, o_m, o_m < rows, block_n, bound_ptr, acts_ptr, maxima_ptr, columns, stride, groups,
            BLOCK_M, BLOCK_N, GROUP, True, False,
        )  # fmt: skip


@triton.jit
def _keys_at(start, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Entries start .. start + BLOCK of a row's candidates: their columns in acts, and keys (_NO_KEY past the end).

    With GROUP > 1 the first `old` candidates are those found before; then come the columns of the listed groups.
    """
    o_e = start + tl.arange(0, BLOCK)
    m_e = o_e < count
    if GROUP == 1:
        # [BLOCK]
        b_keys = _to_key(tl.load(acts_ptr + o_e, mask=m_e, other=0.0))
        return o_e, tl.where(m_e, b_keys, _NO_KEY)
    else:
        m_old = o_e < old
        o_new = tl.where(m_old, 0, o_e - old)
        # [BLOCK]: GROUP neighbours read the same word
        b_groups = tl.load(list_ptr + o_new // GROUP, mask=m_e & ~m_old, other=0)
        o_c = b_groups * GROUP + o_new % GROUP
        m_new = m_e & ~m_old & (o_c < columns)
        # [BLOCK]
        b_keys = _to_key(tl.load(acts_ptr + o_c, mask=m_new, other=0.0))
        # [BLOCK]
        b_old = tl.load(old_keys_ptr + o_e, mask=m_old, other=_NO_KEY)
        return o_c, tl.where(m_new, b_keys, b_old)


@triton.jit
def _choose(
    acts_ptr,
    list_ptr,
    old_keys_ptr,
    old_columns_ptr,
    chosen_ptr,
    chosen_keys_ptr,
    count,
    old,
    columns,
    offset,
    k,
    below,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of `count` candidates the k largest that are above `below`, in their order, to chosen_ptr.

    Bisects the keys until exactly k are reached, or until the k-th is found among equal ones, of which the first are
    taken. The first BLOCK candidates, and mostly there are no more, stay in registers.
    Returns how many there were above `below`, how many were taken, and a key that the last of k reaches.
    """
    _, b_first = _keys_at(0, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK, GROUP)
    hits = tl.sum((b_first > below).to(tl.int32), 0)
    top = tl.max(b_first, 0)
    for start in range(BLOCK, count, BLOCK):
        _, b_keys = _keys_at(start, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK, GROUP)
        hits += tl.sum((b_keys > below).to(tl.int32), 0)
        top = tl.maximum(top, tl.max(b_keys, 0))

    # At least k reach `low`, if there are k; fewer than k, `above` of them, are over `high`.
    low = below.to(tl.int64) + 1
    high = tl.where(hits > k, top.to(tl.int64), low)
    above = tl.zeros([], tl.int32)
    while low < high:
        middle = low + (high - low + 1) // 2
        trial = middle.to(tl.int32)
        reached = tl.sum((b_first >= trial).to(tl.int32), 0)
        for start in range(BLOCK, count, BLOCK):
            _, b_keys = _keys_at(start, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK, GROUP)
            reached += tl.sum((b_keys >= trial).to(tl.int32), 0)
        low = tl.where(reached >= k, middle, low)
        high = tl.where(reached > k, high, tl.where(reached == k, middle, middle - 1))
        above = tl.where(reached > k, above, tl.where(reached == k, 0, reached))

    many = hits > k
    edge = tl.where(many, low.to(tl.int32), below)
    missing = tl.where(many, k - above, 0)
    taken = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        o_c, b_keys = _keys_at(start, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK, GROUP)
        m_equal = b_keys == edge
        b_equal = m_equal.to(tl.int32)
        m_take = (b_keys > edge) | (m_equal & (tl.cumsum(b_equal, 0) <= missing))
        b_take = m_take.to(tl.int32)
        o_place = taken + tl.cumsum(b_take, 0) - 1
        b_chosen = o_c + offset
        if GROUP > 1:
            o_e = start + tl.arange(0, BLOCK)
            # [BLOCK]
            b_old = tl.load(old_columns_ptr + o_e, mask=o_e < old, other=0)
            b_chosen = tl.where(o_e < old, b_old, b_chosen)
            tl.store(chosen_keys_ptr + o_place, b_keys, mask=m_take)
        tl.store(chosen_ptr + o_place, b_chosen, mask=m_take)
        missing -= tl.sum(b_equal, 0)
        taken += tl.sum(b_take, 0)
    return hits, taken, low


# Of the k entries found before (`old` of them) and the columns of this range, the k largest: keys[first+r] and
# columns[first+r], lowest column first, equal keys at the edge by lower column. bound[r] = a number that k of them
# reach: the k-th largest, or, where the bisection ended early, one between it and the next.
#
# A program takes one row, in one warp. First it lists the groups with a maximum above the bound, or the k best of
# them, then it chooses among the columns of those and the old entries.
# Bytes for each row: 4 a group, and GROUP * 4 for each group listed, k in the first range and about k/q after q
# others. About 10 passes over candidates in registers, 100 instructions each. Floor: the bytes, A 0.05, B 0.13,
# C 0.19 ms for all ranges; predicted by instructions, 12 to 20 us a range: A 0.07, B 0.15, C 0.3 ms.
@jit
def _merge(
    acts_ptr,
    maxima_ptr,
    bound_ptr,
    list_ptr,
    old_keys_ptr,
    old_columns_ptr,
    keys_ptr,
    columns_ptr,
    only_ptr,
    first: tl.int32,
    offset: tl.int32,
    columns: tl.int32,
    stride: tl.int32,
    groups: tl.int32,
    listed: tl.int32,
    k: tl.int32,
    old: tl.int32,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(columns, GROUP)
    if GATED:
        # Of no groups there is nothing to choose, and of `old` candidates nothing is taken with k = 0.
        wanted = tl.load(only_ptr + row) != 0  # it begins with this chunk's rows, wherever the result goes
        count = tl.where(wanted, count, 0)
        old = tl.where(wanted, old, 0)
    acts_ptr += row * stride
    list_ptr += row * listed
    old_keys_ptr += row * k
    old_columns_ptr += row * k
    columns_ptr += (first + row) * k
    keys_ptr += (first + row) * k
    bound = _to_key(tl.load(bound_ptr + row))
    bound = tl.where(old > 0, bound, _NO_KEY)

    hits, taken, low = _choose(
        maxima_ptr + row * groups, list_ptr, old_keys_ptr, old_columns_ptr, list_ptr, keys_ptr,
        count, 0, count, 0, k, bound, BLOCK_G, 1,
    )  # fmt: skip
    # What was listed is read by other threads.
    tl.debug_barrier()
    # k elements reach the bound, and k reach `low` if k groups do.
    below = tl.where((hits > k) | (old == 0), low - 1, bound.to(tl.int64) - 1).to(tl.int32)
    _, _, low = _choose(
        acts_ptr, list_ptr, old_keys_ptr, old_columns_ptr, columns_ptr, keys_ptr,
        old + taken * GROUP, old, columns, offset, k, below, BLOCK, GROUP,
    )  # fmt: skip
    last = low.to(tl.int32)
    last = tl.where(last < 0, last ^ 0x7FFFFFFF, last)
    tl.store(bound_ptr + row, last.to(tl.float32, bitcast=True))


# values and indices, largest first, of keys and columns in any order. A program sorts BLOCK_M rows of up to BLOCK.
# Bytes: 8 n k read, and 10 or 12 n k written. Floor: the launch; predicted 3 to 5 us at A, B and C.
@jit
def _finish(
    keys_ptr,
    columns_ptr,
    values_ptr,
    indices_ptr,
    rows: tl.int32,
    k: tl.int32,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK)
    m_k = (o_m < rows)[:, None] & (o_k < k)[None, :]
    o_e = o_m.to(tl.int64)[:, None] * k + o_k[None, :]
    # [BLOCK_M, BLOCK] twice
    b_keys = tl.load(keys_ptr + o_e, mask=m_k, other=_NO_KEY)
    b_columns = tl.load(columns_ptr + o_e, mask=m_k, other=0)
    # One integer a pair, larger for a larger key and then for a lower column: all different, so any sort will do.
    b_pairs = (b_keys.to(tl.int64) << 32) | (0x7FFFFFFF - b_columns).to(tl.int64)
    b_pairs = tl.sort(b_pairs, 1, descending=True)
    b_keys = (b_pairs >> 32).to(tl.int32)
    b_columns = 0x7FFFFFFF - (b_pairs & 0x7FFFFFFF)
    m_broken = (tl.max(b_keys, 1) == 0x7FFFFFFF)[:, None]
    # A key of zero or above is the bit pattern of its float, so clamping the key is the relu.
    b_values = tl.where(b_keys > 0, b_keys, 0).to(tl.float32, bitcast=True)
    b_values = tl.where(m_broken, float("nan"), b_values)
    tl.store(values_ptr + o_e, b_values.to(values_ptr.dtype.element_ty), mask=m_k)
    tl.store(indices_ptr + o_e, tl.where(m_broken, o_k[None, :].to(tl.int64), b_columns), mask=m_k)


def _product_variant(
    dtype: torch.dtype, precision: str, unit: int, subtract: bool = False, gated: bool = False
) -> Variant:
    if precision == "ieee":
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
    else:
        # Loads of single elements are not copied straight to shared memory: fewer of them fit the registers.
        bytes_k = 128 if unit > 1 or dtype == torch.float32 else 64
        block_n = 64 if subtract and unit == 1 else 128
        blocks = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": bytes_k // dtype.itemsize}
    floats = {name: torch.float32 for name in ("bias_ptr", "bound_ptr", "acts_ptr", "maxima_ptr")}
    return Variant(
        _pre_acts,
        {"x_ptr": dtype, "W_ptr": dtype, **floats, "only_ptr": torch.int32},
        {
            "UNIT": unit, **blocks, "GROUP_M": 8, "GROUP": GROUP, "PRECISION": precision,
            "SUBTRACT": subtract, "GATED": gated,
        },
        num_warps=8,
        num_stages=3,
    )  # fmt: skip


def _tma_variant(dtype: torch.dtype) -> Variant:
    block_n = 256 if dtype.itemsize == 2 else 128
    blocks = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 128 // dtype.itemsize}
    floats = {name: torch.float32 for name in ("bias_ptr", "bound_ptr", "acts_ptr", "maxima_ptr")}
    return Variant(
        _pre_acts_tma,
        {"x_desc": dtype, "W_desc": dtype, **floats},
        {**blocks, "GROUP_M": 16, "GROUP": GROUP, "PRECISION": "tf32", "FLATTEN": True, "RESIDENT": 1},
        num_warps=8,
        num_stages=3,
        descriptors={"x_desc": ("BLOCK_M", "BLOCK_K"), "W_desc": ("BLOCK_N", "BLOCK_K")},
    )


def _merge_variant(gated: bool = False) -> Variant:
    ints = ("list_ptr", "old_keys_ptr", "old_columns_ptr", "keys_ptr", "columns_ptr", "only_ptr")
    floats = {name: torch.float32 for name in ("acts_ptr", "maxima_ptr", "bound_ptr")}
    return Variant(
        _merge,
        {**floats, **{name: torch.int32 for name in ints}},
        {"BLOCK_G": 256, "BLOCK": 1024, "GROUP": GROUP, "GATED": gated},
        num_warps=1,
        num_stages=1,
    )


def _finish_variant(dtype: torch.dtype, block: int) -> Variant:
    return Variant(
        _finish,
        {"keys_ptr": torch.int32, "columns_ptr": torch.int32, "values_ptr": dtype, "indices_ptr": torch.int64},
        {"BLOCK": block, "BLOCK_M": 1024 // block},
        num_warps=4,
        num_stages=1,
    )


_FINISH_BLOCKS = (32, 128)  # for a larger k, torch sorts


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel, unless another was tuned for a device."""
    products = [
        _product_variant(dtype, precision, unit, subtract=subtract)
        for subtract in (False, True)
        for dtype, precision in dtypes_and_precisions()
        for unit in vector_units(dtype)
    ]
    finishes = [_finish_variant(dtype, block) for dtype in FLOATS for block in _FINISH_BLOCKS]
    return [*products, *(_tma_variant(dtype) for dtype in FLOATS), _merge_variant(), *finishes]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms of a product that its launcher may take: for `make gpu` to try and `tuned.json` to name."""
    changes: list[dict[str, int]] = []
    if variant.kernel is _pre_acts_tma:
        changes = [{"num_stages": 4}, {"FLATTEN": False, "num_stages": 4}, {"GROUP_M": 8}]
        if variant.tensors["x_desc"].itemsize == 2:
            # Two programs a multiprocessor: one multiplies while the other writes.
            twice = {"BLOCK_N": 128, "num_warps": 4, "RESIDENT": 2}
            changes += [twice, {**twice, "FLATTEN": False}]
    elif variant.kernel is _pre_acts and variant.constants["UNIT"] > 1 and variant.constants["PRECISION"] != "ieee":
        changes = [{"num_stages": 4}, {"GROUP_M": 16}]
    elif variant.kernel is _merge:
        changes = [{"num_warps": 2}, {"BLOCK": 2048, "num_warps": 4}]
    return [tuning.changed(variant, change) for change in changes]


def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _best_product(x: Tensor, d_sae: int) -> Variant:
    """The form in which x [n, d_in] is multiplied by W_enc [d_sae, d_in] on x's device."""
    unit = unit_of(x.dtype, x.shape[1]) if d_sae % GROUP == 0 and x.shape[1] else 1
    precision = dot_precision(x.dtype)
    if unit > 1 and precision != "ieee" and _has_tma(x.device):
        return tuning.best(_tma_variant(x.dtype), x.device)
    return tuning.best(_product_variant(x.dtype, precision, unit), x.device)


def _workspace(n: int, d_sae: int, k: int) -> tuple[int, int]:
    """Rows of a chunk, and columns of a range, that fit WORKSPACE_BYTES: all rows if the ranges stay wide enough."""
    whole = triton.cdiv(d_sae, GROUP) * GROUP
    # Of fewer groups than 2 k the k best would hold most of the columns.
    least = triton.cdiv(max(LEAST_WIDTH, 2 * k * GROUP), RANGE_UNIT) * RANGE_UNIT
    fitting = (WORKSPACE_BYTES // n - _bytes_a_row(0, k)) * 8 // 34 // RANGE_UNIT * RANGE_UNIT
    ranges = triton.cdiv(d_sae, max(least, fitting))
    width = min(triton.cdiv(triton.cdiv(d_sae, ranges), RANGE_UNIT) * RANGE_UNIT, whole)
    rows = WORKSPACE_BYTES // _bytes_a_row(width, k)
    # A chunk starts at a 16-byte boundary and ends with a block of rows, if it can.
    return min(n, rows - rows % 128 if rows >= 128 else max(rows, 1)), width


def _bytes_a_row(width: int, k: int) -> int:
    """The pre-activations, their maxima, the listed groups, and two times k keys and columns, and the bound."""
    groups = triton.cdiv(width, GROUP)
    return 4 * width + 8 * groups + 16 * k + 4


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, product: Variant | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of relu(x W_enc^T + b_enc) of each row, largest first, equal ones by lower index first.

    x [n, d_in], W_enc [d_sae, d_in] in the dtype of x (float32, bfloat16 or float16), b_enc [d_sae], 1 <= k <= d_sae
    -> values [n, k] in the dtype of x, indices [n, k] int64.

    Selection is on the float32 accumulator. float32 products are exact to float32 where
    torch.get_float32_matmul_precision() is "highest", and TF32 otherwise. A row with a NaN among its
    pre-activations gives k NaN at indices 0..k-1. Besides the result and 8 n k bytes, at most WORKSPACE_BYTES of
    memory, or what one row needs.

    product: the form of the product, of `variants` or `candidates`, where it is not to be the device's best.
    """
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    n, d_sae = x.shape[0], W_enc.shape[0]
    keys = torch.empty(n, k, dtype=torch.int32, device=x.device)
    columns = torch.empty_like(keys)
    if n == 0:
        return x.new_empty(0, k), columns.long()
    search(x, W_enc, bias, keys, columns, product or _best_product(x, d_sae))
    return ordered(keys, columns, x.dtype)


def Encoder(W_enc: Tensor, b_enc: Tensor, k: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """topk_encode by the same weights again and again, as the portable one has it; here there is nothing to prepare."""
    return partial(topk_encode, W_enc=W_enc, b_enc=b_enc, k=k)


def search(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    keys: Tensor,
    columns: Tensor,
    product: Variant,
    only: Tensor | None = None,
) -> None:
    """The keys and columns of the k largest pre-activations of each row, lowest column first.

    keys, columns [n, k] int32, written. only [n] int32: rows where it is zero are left as they are; then `product`
    is a gated one.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    rows, width = _workspace(n, d_sae, keys.shape[1])
    acts = torch.empty(rows, width, dtype=torch.float32, device=x.device)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        W_here, bias_here = W_enc[start : start + here], bias[start:]
        _multiply(product, x, W_here, bias_here, bound, acts, width, maxima, first, chunk, only)
        return acts, width

    _merge_ranges(multiply, rows, width, d_sae, keys, columns, only)


def _multiply(
    product: Variant,
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    bound: Tensor,
    acts: Tensor,
    stride: int,
    maxima: Tensor,
    first: int,
    chunk: int,
    only: Tensor | None = None,
) -> None:
    """Launch `product` for rows first .. first + chunk of x and all of W_enc; acts starts where they are to go."""
    grid, (x_given, W_given, *sizes) = product_grid(product, x, W_enc, first, chunk)
    tensors = (x_given, W_given, bias, bound, acts, maxima)
    groups = maxima.shape[1]
    if product.kernel is _pre_acts_tma:
        *sizes, programs = sizes
        product.launch(grid, *tensors, *sizes, stride // GROUP, groups, programs)
    else:
        gate = maxima.view(torch.int32) if only is None else only
        stride = stride // GROUP if product.constants["UNIT"] > 1 else stride
        product.launch(grid, *tensors, gate, *sizes, stride, groups)


def product_grid(product: Variant, x: Tensor, W_enc: Tensor, first: int, chunk: int) -> tuple[tuple[int], list[Any]]:
    """The grid of a product of rows first .. first + chunk of x and all of W_enc, and what it is given of them."""
    (here, d_in), constants = W_enc.shape, product.constants
    tiles = triton.cdiv(chunk, constants["BLOCK_M"]) * triton.cdiv(here, constants["BLOCK_N"])
    if not product.descriptors:
        return (tiles,), [x, W_enc, first, chunk, here, d_in // constants["UNIT"]]
    programs = min(tiles, _programs(x.device) * constants["RESIDENT"])
    # The strides are named: that of a single row can be any number.
    x_desc = TensorDescriptor(x[first : first + chunk], [chunk, d_in], [d_in, 1], product.block("x_desc"))
    W_desc = TensorDescriptor(W_enc, [here, d_in], [d_in, 1], product.block("W_desc"))
    return (programs,), [x_desc, W_desc, chunk, here, triton.cdiv(d_in, constants["BLOCK_K"]), programs]


Multiply = Callable[[int, int, int, int, Tensor, Tensor], tuple[Tensor, int]]


def _merge_ranges(
    multiply: Multiply,
    rows: int,
    width: int,
    d_sae: int,
    keys: Tensor,
    columns: Tensor,
    only: Tensor | None = None,
) -> None:
    """Multiply and merge, range by range, chunk by chunk; the last range's result goes to keys and columns [n, k].

    multiply(first, chunk, start, here, bound, maxima): a product for `chunk` rows from `first` and `here` columns
    from `start`, written where `bound` [rows] is exceeded, its maxima to `maxima` [rows, groups]; returns where
    its pre-activations begin, and their stride.
    """
    n, k = keys.shape
    groups = triton.cdiv(width, GROUP)
    maxima = keys.new_empty(rows, groups, dtype=torch.float32)
    bound = keys.new_empty(rows, dtype=torch.float32)
    listed = keys.new_empty(rows, min(k, groups))
    several = width < d_sae
    old, new = ((keys.new_empty(rows if several else 0, k), keys.new_empty(rows if several else 0, k)) for _ in "ab")
    merge = tuning.best(_merge_variant(gated=only is not None), keys.device)
    for first in range(0, n, rows):
        chunk = min(rows, n - first)
        bound.fill_(math.nan)
        for start in range(0, d_sae, width):
            here = min(width, d_sae - start)
            acts, stride = multiply(first, chunk, start, here, bound, maxima)
            last = start + here == d_sae
            found = (keys, columns) if last else new
            sizes = (first if last else 0, start, here, stride, groups, listed.shape[1], k, k if start else 0)
            gate = listed if only is None else aligned(only[first:])
            merge.launch((chunk,), acts, maxima, bound, listed, *old, *found, gate, *sizes)
            old, new = new, old


def ordered(keys: Tensor, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From the chosen keys and columns [n, k] int32, lowest column first, to values and indices, largest first."""
    n, k = keys.shape
    block = next((block for block in _FINISH_BLOCKS if k <= block), None)
    if block is not None:
        finish = _finish_variant(dtype, block)
        values, indices = keys.new_empty(n, k, dtype=dtype), keys.new_empty(n, k, dtype=torch.int64)
        finish.launch((triton.cdiv(n, finish.constants["BLOCK_M"]),), keys, columns, values, indices, n, k)
        return values, indices
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    indices = columns.gather(1, order).long()
    values = keys.clamp(min=0).view(torch.float32)
    broken = keys[:, :1] == NAN_KEY
    values = torch.where(broken, torch.nan, values).to(dtype)
    return values, torch.where(broken, torch.arange(k, device=keys.device), indices)


# --- a second encode of the same tokens ------------------------------------------------------------------


def encode_and_keep(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_encode, and the pre-activations that it chose from, for `encode_again`.

    -> values [n, k], indices [n, k] int64, kept [n, d_sae] float32. The caller bounds n * d_sae.
    """
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    n, d_sae = x.shape[0], W_enc.shape[0]
    kept = torch.empty(n, d_sae, dtype=torch.float32, device=x.device)
    keys = torch.empty(n, k, dtype=torch.int32, device=x.device)
    columns = torch.empty_like(keys)
    if n == 0:
        return x.new_empty(0, k), columns.long(), kept
    product = _best_product(x, d_sae)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        _multiply(product, x, W_enc, bias, bound, kept[first:], d_sae, maxima, first, chunk)
        return kept[first:], d_sae

    # One range, so that nothing is left out: the bound is NaN.
    _merge_ranges(multiply, _rows_of_kept(n, d_sae, k), triton.cdiv(d_sae, GROUP) * GROUP, d_sae, keys, columns)
    return *ordered(keys, columns, x.dtype), kept


def encode_again(kept: Tensor, a: Tensor, W_a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """relu(topk(kept - a W_a^T, k)): the encoder of x - c, from that of x, where W_enc c = W_a a.

    kept [n, d_sae] float32, as encode_and_keep gives it, overwritten; a [n, r], W_a [d_sae, r] in a's dtype
    -> values [n, k] in a's dtype, indices [n, k] int64, with topk_encode's order, ties and NaN.

    Costs 2 n r d_sae operations and 4 to 8 n d_sae bytes, against 2 n d_in d_sae operations of encoding again.
    Measured in the float32 interpreter, d_in = 768, r = 256, pre-activations of rms 1.4: the largest error of a
    pre-activation against float64 is 1.1e-6 this way and 1.4e-6 by encoding x - c. In float16, where a and W_a are
    rounded here and x - c there, 2.5e-3 and 2.4e-3. What is subtracted is as large as W_enc c, so where c cancels
    most of x the errors of both stay, and the relative error of the small rest grows, as it does in x - c.
    """
    a, W_a, kept = aligned(a), aligned(W_a), aligned(kept)
    n, d_sae = kept.shape
    keys = torch.empty(n, k, dtype=torch.int32, device=a.device)
    columns = torch.empty_like(keys)
    if n == 0:
        return a.new_empty(0, k), columns.long()
    unit = unit_of(a.dtype, a.shape[1]) if d_sae % GROUP == 0 and a.shape[1] else 1
    product = tuning.best(_product_variant(a.dtype, dot_precision(a.dtype), unit, subtract=True), a.device)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        acts = kept[first:, start:]
        _multiply(product, a, W_a[start : start + here], bound, bound, acts, d_sae, maxima, first, chunk)
        return acts, d_sae

    _merge_ranges(multiply, _rows_of_kept(n, d_sae, k), _width_of_kept(d_sae, k), d_sae, keys, columns)
    return ordered(keys, columns, a.dtype)


def _rows_of_kept(n: int, d_sae: int, k: int) -> int:
    """Rows whose maxima fit the workspace, in blocks of which each starts at a 16-byte boundary of `kept`."""
    rows = WORKSPACE_BYTES // (_bytes_a_row(d_sae, k) - 4 * d_sae)
    return min(n, rows - rows % 128 if rows >= 128 else max(rows - rows % 4, 4))


def _width_of_kept(d_sae: int, k: int) -> int:
    """A narrow first range bounds what is written of the others: 4 ranges, if they are wide enough."""
    least = max(LEAST_WIDTH, 2 * k * GROUP, triton.cdiv(d_sae, 4))
    return min(triton.cdiv(least, RANGE_UNIT) * RANGE_UNIT, triton.cdiv(d_sae, GROUP) * GROUP)
