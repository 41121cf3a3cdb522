"""The selection of topk_encode: topk_groups.py keeps the best groups of all ranges; at the end `_select` picks the k
largest from them, and `_finish` sorts.

topk_encode.py explains the algorithm, and defines A, B and C and the rates behind the predicted times.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .topk_groups import keep_variant
from .topk_keys import LAST, LEAST_KEY, NAN_KEY, to_float, to_key, to_pairs
from .topk_product import GROUP
from .variant import FLOATS, Variant, aligned, jit, max_or_nan


@triton.jit
def _columns_at(start, groups_ptr, count, BLOCK_J: tl.constexpr, GROUP: tl.constexpr):
    """[BLOCK_J, GROUP] columns of listed groups start .. start + BLOCK_J; behind all columns past the last group."""
    o_j = start + tl.arange(0, BLOCK_J)
    # [BLOCK_J]
    b_groups = tl.load(groups_ptr + o_j, mask=o_j < count, other=LAST // GROUP)
    return (b_groups * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]


@triton.jit
def _tile_at(
    start, acts_ptr, groups_ptr, count, columns,
    BLOCK_J: tl.constexpr, GROUP: tl.constexpr, IN_SLOTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_J, GROUP] pre-activations in the columns that `_columns_at` gives; -inf behind the last column.

    IN_SLOTS: they lie in the order of the list, and otherwise at their columns. WHOLE: all of a group can be read.
    """
    o_j = start + tl.arange(0, BLOCK_J)
    m_j = (o_j < count)[:, None]
    o_c = _columns_at(start, groups_ptr, count, BLOCK_J, GROUP)
    if IN_SLOTS:
        o_n = tl.arange(0, GROUP)[None, :]
        b_acts = tl.load(acts_ptr + (o_j * GROUP)[:, None] + o_n, mask=m_j, other=float("-inf"))
    elif WHOLE:
        b_acts = tl.load(acts_ptr + o_c, mask=m_j, other=float("-inf"))
    else:
        b_acts = tl.load(acts_ptr + o_c, mask=m_j & (o_c < columns), other=float("-inf"))
    return tl.where(o_c < columns, b_acts, float("-inf"))


@triton.jit
def _take(
    b_acts, start, groups_ptr, count, pairs_ptr, taken, edge, cut, exact, BLOCK_J: tl.constexpr, GROUP: tl.constexpr
):
    """Append the pairs of what is above `edge`, or equal to it in columns up to `cut`; of all equal ones if `exact`."""
    o_c = _columns_at(start, groups_ptr, count, BLOCK_J, GROUP)
    m_take = b_acts >= edge
    if not exact:
        m_take = (b_acts > edge) | ((b_acts == edge) & (o_c <= cut))
    b_take = m_take.to(tl.int32)
    # [BLOCK_J]
    b_taken = tl.sum(b_take, 1)
    o_place = (taken - 1 + tl.cumsum(b_taken, 0) - b_taken)[:, None] + tl.cumsum(b_take, 1)
    # No value is NaN here, and -0.0 + 0.0 is 0.0.
    b_bits = (b_acts + 0.0).to(tl.int32, bitcast=True)
    b_keys = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_pairs = (b_keys.to(tl.int64) << 32) | (0x7FFFFFFF - o_c).to(tl.int64)
    tl.store(pairs_ptr + o_place, b_pairs, mask=m_take)
    return taken + tl.sum(b_taken, 0)


@triton.jit
def choose(
    acts_ptr,
    groups_ptr,
    pairs_ptr,
    count,
    columns,
    k,
    low,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    IN_SLOTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write the pairs of the k largest in `count` listed groups; of equal ones those in lower columns. In no order.

    low: a key; what does not reach it is left out. Bisection select, which ends when exactly k reach the trial, or when
    only those equal to the k-th are left. The first BLOCK_J groups stay in registers. With a NaN, k pairs of NaN.
    Returns the number written, and a value that all of them reach.
    """
    b_first = _tile_at(0, acts_ptr, groups_ptr, count, columns, BLOCK_J, GROUP, IN_SLOTS, WHOLE)
    edge = to_float(low)
    reached = tl.sum((b_first >= edge).to(tl.int32))
    top = tl.reduce(b_first, None, max_or_nan)
    for start in range(BLOCK_J, count, BLOCK_J):
        b_acts = _tile_at(start, acts_ptr, groups_ptr, count, columns, BLOCK_J, GROUP, IN_SLOTS, WHOLE)
        reached += tl.sum((b_acts >= edge).to(tl.int32))
        top = max_or_nan(top, tl.reduce(b_acts, None, max_or_nan))
    broken = top != top
    if broken:
        for start in range(0, k, 32):
            o_k = start + tl.arange(0, 32)
            tl.store(pairs_ptr + o_k, to_pairs(tl.full([32], float("nan"), tl.float32), o_k), mask=o_k < k)
        count = 0
    exact = (reached <= k) | (count == 0)
    high = tl.where(exact, low, to_key(top))
    # At least k reach `low`; `above` < k are over `high`.
    above = tl.zeros([], tl.int32)
    while low < high:
        # (low + high + 1) // 2, whose sum could overflow.
        trial = (low | high) - ((low ^ high) >> 1)
        edge = to_float(trial)
        reached = tl.sum((b_first >= edge).to(tl.int32))
        for start in range(BLOCK_J, count, BLOCK_J):
            b_acts = _tile_at(start, acts_ptr, groups_ptr, count, columns, BLOCK_J, GROUP, IN_SLOTS, WHOLE)
            reached += tl.sum((b_acts >= edge).to(tl.int32))
        exact = exact | (reached == k)
        low = tl.where(reached >= k, trial, low)
        high = tl.where(reached > k, high, tl.where(reached == k, trial, trial - 1))
        above = tl.where(reached >= k, above, reached)
    edge = to_float(low)

    # Of those equal to `edge`, k - `above` are taken: those in columns up to `cut`.
    cut = tl.zeros([], tl.int32)
    last = tl.where(exact, 0, columns)
    while cut < last:
        trial = cut + (last - cut) // 2
        equal = tl.zeros([], tl.int32)
        for start in range(0, count, BLOCK_J):
            b_acts = _tile_at(start, acts_ptr, groups_ptr, count, columns, BLOCK_J, GROUP, IN_SLOTS, WHOLE)
            o_c = _columns_at(start, groups_ptr, count, BLOCK_J, GROUP)
            equal += tl.sum(((b_acts == edge) & (o_c <= trial)).to(tl.int32))
        enough = above + equal >= k
        cut = tl.where(enough, cut, trial + 1)
        last = tl.where(enough, trial, last)

    # Few groups at a time: what a thread does for each of their columns takes many registers.
    taken = tl.where(broken, k, 0)
    for start in range(0, count, BLOCK_T):
        b_acts = _tile_at(start, acts_ptr, groups_ptr, count, columns, BLOCK_T, GROUP, IN_SLOTS, WHOLE)
        taken = _take(b_acts, start, groups_ptr, count, pairs_ptr, taken, edge, cut, exact, BLOCK_T, GROUP)
    return taken, edge


# pairs[first + r] = the k largest of the `listed` groups of row r, in no order; bound[r] = a value that they reach.
# GATED: only rows that are set in `only`; nothing else is read of others.
#
# A program: one row, in one warp. Bytes a row: 4 GROUP + 4 a listed group, 8 k written.
# Operations, counted from SASS (sm_90): for 1,024 candidates 500 instructions, 117 for each step of the bisection, of
# which there are 3 to 5, and 1,350 to write; for 2,048 it is 850, 222 and 2,700.
# Floor: the bytes, A 0.01, B and C 0.02 ms. Predicted (bench/predict): A 0.02, B 0.06, C 0.05 ms;
# where no row is set, the launch.
@jit
def _select(
    acts_ptr,
    groups_ptr,
    bound_ptr,
    pairs_ptr,
    only_ptr,
    first: tl.int32,
    columns: tl.int32,
    stride: tl.int32,
    row_slots: tl.int32,
    listed: tl.int32,
    k: tl.int32,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    IN_SLOTS: tl.constexpr,
    GATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if GATED:
        wanted = tl.load(only_ptr + row) != 0  # at this chunk's first row, unlike pairs_ptr
    if wanted:
        # The maxima of k groups reach the bound.
        low = tl.where(listed == k, to_key(tl.load(bound_ptr + row)), LEAST_KEY)
        low = tl.minimum(low, 0x7F800000)  # the key of +inf: the bound is NaN if those maxima are
        acts_ptr += row * stride * UNIT
        pairs_ptr += (first + row) * k
        groups_ptr += row * row_slots * 4
        _, edge = choose(
            acts_ptr, groups_ptr, pairs_ptr, listed, columns, k, low, BLOCK_J, BLOCK_T, GROUP, IN_SLOTS, UNIT == GROUP
        )
        tl.store(bound_ptr + row, edge)


# values, indices = pairs [rows, k] sorted, largest first; equal ones by lower column. Values are relu'd.
#
# A program: BLOCK_M rows of up to BLOCK entries. Bytes: 8 n k read, 10 or 12 n k written. Floor: the launch.
# Predicted (bench/predict): A 2, B and C 6 us.
@jit
def _finish(
    pairs_ptr,
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
    # [BLOCK_M, BLOCK]; all of a row are different, so the sort need not be stable.
    b_pairs = tl.load(pairs_ptr + o_e, mask=m_k, other=-(2**63))
    b_pairs = tl.sort(b_pairs, 1, descending=True)
    b_keys = (b_pairs >> 32).to(tl.int32)
    b_columns = 0x7FFFFFFF - (b_pairs & 0x7FFFFFFF)
    m_broken = (tl.max(b_keys, 1) == 0x7FFFFFFF)[:, None]
    # A key >= 0 is the bit pattern of its float, so clamping the key is the relu.
    b_values = tl.where(b_keys > 0, b_keys, 0).to(tl.float32, bitcast=True)
    b_values = tl.where(m_broken, float("nan"), b_values)
    tl.store(values_ptr + o_e, b_values.to(values_ptr.dtype.element_ty), mask=m_k)
    tl.store(indices_ptr + o_e, tl.where(m_broken, o_k[None, :].to(tl.int64), b_columns), mask=m_k)


def _select_variant(listed: int, unit: int, in_slots: bool, gated: bool = False) -> Variant:
    block = 64 if listed > 32 and unit > 1 else 32  # of single loads, 64 spill
    tensors = {"acts_ptr": torch.float32, "groups_ptr": torch.int32, "bound_ptr": torch.float32}
    return Variant(
        _select,
        {**tensors, "pairs_ptr": torch.int64, "only_ptr": torch.int32},
        {"BLOCK_J": block, "BLOCK_T": 16, "GROUP": GROUP, "UNIT": unit, "IN_SLOTS": in_slots, "GATED": gated},
        num_warps=1,
        num_stages=1,
    )


def _finish_variant(dtype: torch.dtype, block: int) -> Variant:
    return Variant(
        _finish,
        {"pairs_ptr": torch.int64, "values_ptr": dtype, "indices_ptr": torch.int64},
        {"BLOCK": block, "BLOCK_M": 1024 // block},
        num_warps=4,
        num_stages=1,
    )


_FINISH_BLOCKS = (32, 64, 128)  # torch sorts for a larger k


def variants(gated: bool = False) -> list[Variant]:
    """Every form in which this module launches a kernel, unless another was tuned for a device."""
    places = [(GROUP, True), (GROUP, False)] if gated else [(GROUP, True), (GROUP, False), (1, False)]
    forms = [_select_variant(listed, *place, gated) for place in places for listed in (32, 64)]
    selects = list({str(form): form for form in forms}.values())
    finishes = [_finish_variant(dtype, block) for dtype in FLOATS for block in _FINISH_BLOCKS]
    return [*selects, *([] if gated else finishes)]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    changes = [{"num_warps": 2}] if variant.kernel is _select else []
    return [tuning.changed(variant, change) for change in changes]


Multiply = Callable[[int, int, int, int, Tensor, Tensor], tuple[Tensor, int]]


def select_ranges(
    multiply: Multiply,
    rows: int,
    width: int,
    d_sae: int,
    pairs: Tensor,
    stay: bool = False,
    only: Tensor | None = None,
    bound: Tensor | None = None,
) -> None:
    """Multiply each range of each chunk, and write the pairs of its k largest to pairs [n, k] int64, in no order.

    multiply(first, chunk, start, here, bound, maxima) computes the pre-activations of rows first .. first + chunk and
    columns start .. start + here. It writes the groups that exceed `bound` [rows], and all group maxima to `maxima`
    [rows, groups]. It returns the tensor at whose start they are, and their stride, in which whole groups can be read
    if it is a multiple of GROUP. stay: a range's pre-activations stay where they are when the next one is written.
    bound: a place for the value that the k largest reach, [rows] float32.
    """
    n, k = pairs.shape
    groups = triton.cdiv(width, GROUP)
    listed = min(k, groups)
    copy = width < d_sae and not stay
    row_groups, row_slots = (triton.cdiv(size, 4) * 4 for size in (groups, listed))  # loads are of 16 bytes
    maxima = torch.empty(rows, row_groups, dtype=torch.float32, device=pairs.device)
    bound = maxima.new_empty(rows) if bound is None else bound
    slots = maxima.new_empty(rows if copy else 0, row_slots * GROUP)
    tops, numbers, moves = (
        torch.empty(rows, size, dtype=torch.int32, device=pairs.device)
        for size in (row_slots, row_slots, 2 * row_slots)
    )
    keep = tuning.best(keep_variant(copy, only is not None), pairs.device)
    for first in range(0, n, rows):
        chunk = min(rows, n - first)
        bound.fill_(math.nan)
        gate = numbers if only is None else aligned(only[first:])
        for start in range(0, d_sae, width):
            here = min(width, d_sae - start)
            acts, stride = multiply(first, chunk, start, here, bound, maxima)
            if start == 0:
                origin = acts
            old = row_slots // 4 if start else 0
            sizes = (start // GROUP, here, stride // GROUP, row_groups // 4, listed, old, row_slots // 4)
            keep.launch((chunk,), acts, maxima, bound, slots, tops, numbers, moves, gate, *sizes)
        unit = GROUP if copy or stride % GROUP == 0 else 1
        select = tuning.best(_select_variant(listed, unit, copy, only is not None), pairs.device)
        acts, stride = (slots, row_slots * GROUP) if copy else (origin, stride)
        select.launch(
            (chunk,), acts, numbers, bound, pairs, gate, first, d_sae, stride // unit, row_slots // 4, listed, k
        )


def ordered(pairs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """pairs [n, k] int64 -> values [n, k], indices [n, k] int64, largest first, equal ones by lower column, relu'd."""
    n, k = pairs.shape
    block = next((block for block in _FINISH_BLOCKS if k <= block), None)
    if block is not None:
        finish = _finish_variant(dtype, block)
        values, indices = pairs.new_empty(n, k, dtype=dtype), torch.empty_like(pairs)
        finish.launch((triton.cdiv(n, finish.constants["BLOCK_M"]),), pairs, values, indices, n, k)
        return values, indices
    pairs = pairs.sort(dim=1, descending=True).values
    keys, indices = (pairs >> 32).int(), NAN_KEY - (pairs & NAN_KEY)
    broken = keys[:, :1] == NAN_KEY
    values = torch.where(broken, torch.nan, keys.clamp(min=0).view(torch.float32)).to(dtype)
    return values, torch.where(broken, torch.arange(k, device=pairs.device), indices)
