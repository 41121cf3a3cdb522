"""The selection of topk_encode: `_merge` picks the k largest of a range and of earlier ranges, `_finish` sorts them.

topk_encode.py explains the algorithm, and defines A, B and C and the rates behind the predicted times.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .topk_product import GROUP
from .variant import FLOATS, Variant, aligned, jit

NAN_KEY = 2**31 - 1  # above the key of +inf
_NO_KEY = tl.constexpr(-(2**31))  # below the key of -inf


@triton.jit
def to_key(b_acts):
    """float32 -> int32 keys that sort like the floats; -0.0 as +0.0, every NaN as NAN_KEY."""
    b_bits = tl.where(b_acts == 0.0, 0.0, b_acts).to(tl.int32, bitcast=True)
    b_keys = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_acts == b_acts, b_keys, 0x7FFFFFFF)


@triton.jit
def _keys_at(start, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Candidates start .. start + BLOCK of a row: [BLOCK] columns in acts, [BLOCK] keys (_NO_KEY past the end).

    With GROUP == 1 the candidates are acts[:count]. With GROUP > 1 they are the `old` entries found in earlier ranges,
    then all columns of the listed groups.
    """
    o_e = start + tl.arange(0, BLOCK)
    m_e = o_e < count
    if GROUP == 1:
        # [BLOCK]
        b_keys = to_key(tl.load(acts_ptr + o_e, mask=m_e, other=0.0))
        return o_e, tl.where(m_e, b_keys, _NO_KEY)
    else:
        m_old = o_e < old
        o_new = tl.where(m_old, 0, o_e - old)
        # [BLOCK], the same word for GROUP neighbours
        b_groups = tl.load(list_ptr + o_new // GROUP, mask=m_e & ~m_old, other=0)
        o_c = b_groups * GROUP + o_new % GROUP
        m_new = m_e & ~m_old & (o_c < columns)
        # [BLOCK]
        b_keys = to_key(tl.load(acts_ptr + o_c, mask=m_new, other=0.0))
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
    """Write the k largest of `count` candidates that are above `below`, in candidate order, to chosen_ptr.

    Bisection select on the keys. It ends when exactly k candidates reach the trial key, or when only keys equal to the
    k-th are left, of which the first are taken. The first BLOCK candidates stay in registers; mostly that is all.
    Returns the number above `below`, the number taken, and a key that the k-th largest reaches.
    """
    _, b_first = _keys_at(0, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK, GROUP)
    hits = tl.sum((b_first > below).to(tl.int32), 0)
    top = tl.max(b_first, 0)
    for start in range(BLOCK, count, BLOCK):
        _, b_keys = _keys_at(start, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK, GROUP)
        hits += tl.sum((b_keys > below).to(tl.int32), 0)
        top = tl.maximum(top, tl.max(b_keys, 0))

    # Invariant: at least k candidates (if there are k) reach `low`; `above` < k candidates are over `high`.
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


# keys[first + r], columns[first + r] = the k largest of this range's columns and of the `old` entries from earlier
# ranges, lowest column first; of keys equal to the k-th, the lower columns.
# bound[r] = the k-th largest, or a number between it and the next if the bisection ended early.
#
# A program: one row, in one warp. It lists the groups whose maximum is above the bound (the k with the largest maxima,
# if there are more), then selects among the columns of these groups and the old entries.
# Bytes a row: 4 a group, and 4 GROUP for each listed group: k groups in the first range, about k/q after q others.
# Operations, counted from SASS (sm_90): 1,446 instructions to load 1,024 candidates, 1,428 for each bisection step
# beyond the first block, 3,170 (382 of them shuffles) for the last pass.
# Floor: the bytes, A 0.05, B 0.13, C 0.19 ms for all ranges. Predicted from these counts with simulated trip counts:
# A 0.48, B 1.33, C 2.0 ms. Instructions decide, not bytes.
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
        # With no groups and no old entries nothing is selected for this row.
        wanted = tl.load(only_ptr + row) != 0  # only_ptr is at this chunk's first row, unlike keys_ptr
        count = tl.where(wanted, count, 0)
        old = tl.where(wanted, old, 0)
    acts_ptr += row * stride
    list_ptr += row * listed
    old_keys_ptr += row * k
    old_columns_ptr += row * k
    columns_ptr += (first + row) * k
    keys_ptr += (first + row) * k
    bound = to_key(tl.load(bound_ptr + row))
    bound = tl.where(old > 0, bound, _NO_KEY)

    hits, taken, low = _choose(
        maxima_ptr + row * groups, list_ptr, old_keys_ptr, old_columns_ptr, list_ptr, keys_ptr,
        count, 0, count, 0, k, bound, BLOCK_G, 1,
    )  # fmt: skip
    tl.debug_barrier()  # other threads read the list
    # k entries reach the bound; and k reach `low` if the maxima of k groups do.
    below = tl.where((hits > k) | (old == 0), low - 1, bound.to(tl.int64) - 1).to(tl.int32)
    _, _, low = _choose(
        acts_ptr, list_ptr, old_keys_ptr, old_columns_ptr, columns_ptr, keys_ptr,
        old + taken * GROUP, old, columns, offset, k, below, BLOCK, GROUP,
    )  # fmt: skip
    last = low.to(tl.int32)
    last = tl.where(last < 0, last ^ 0x7FFFFFFF, last)
    tl.store(bound_ptr + row, last.to(tl.float32, bitcast=True))


# values, indices = keys and columns [rows, k] sorted, largest first; equal keys by lower column. Values are relu'd.
#
# A program: BLOCK_M rows of up to BLOCK entries. Bytes: 8 n k read, 10 or 12 n k written. Floor: the launch.
# Predicted: 3 to 5 us at A, B and C.
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
    # [BLOCK_M, BLOCK] each
    b_keys = tl.load(keys_ptr + o_e, mask=m_k, other=_NO_KEY)
    b_columns = tl.load(columns_ptr + o_e, mask=m_k, other=0)
    # One integer orders by key, then by lower column. All are different, so the sort need not be stable.
    b_pairs = (b_keys.to(tl.int64) << 32) | (0x7FFFFFFF - b_columns).to(tl.int64)
    b_pairs = tl.sort(b_pairs, 1, descending=True)
    b_keys = (b_pairs >> 32).to(tl.int32)
    b_columns = 0x7FFFFFFF - (b_pairs & 0x7FFFFFFF)
    m_broken = (tl.max(b_keys, 1) == 0x7FFFFFFF)[:, None]
    # A key >= 0 is the bit pattern of its float, so clamping the key is the relu.
    b_values = tl.where(b_keys > 0, b_keys, 0).to(tl.float32, bitcast=True)
    b_values = tl.where(m_broken, float("nan"), b_values)
    tl.store(values_ptr + o_e, b_values.to(values_ptr.dtype.element_ty), mask=m_k)
    tl.store(indices_ptr + o_e, tl.where(m_broken, o_k[None, :].to(tl.int64), b_columns), mask=m_k)


def merge_variant(gated: bool = False) -> Variant:
    """`_merge` for all rows, or (gated) for the rows whose flag is set."""
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


_FINISH_BLOCKS = (32, 128)  # torch sorts for a larger k


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel, unless another was tuned for a device."""
    finishes = [_finish_variant(dtype, block) for dtype in FLOATS for block in _FINISH_BLOCKS]
    return [merge_variant(), *finishes]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    changes = [{"num_warps": 2}, {"BLOCK": 2048, "num_warps": 4}] if variant.kernel is _merge else []
    return [tuning.changed(variant, change) for change in changes]


Multiply = Callable[[int, int, int, int, Tensor, Tensor], tuple[Tensor, int]]


def merge_ranges(
    multiply: Multiply,
    rows: int,
    width: int,
    d_sae: int,
    keys: Tensor,
    columns: Tensor,
    only: Tensor | None = None,
) -> None:
    """Multiply and merge each range of each chunk. The result of the last range goes to keys and columns [n, k].

    multiply(first, chunk, start, here, bound, maxima) computes the pre-activations of rows first .. first + chunk and
    columns start .. start + here. It writes the groups that exceed `bound` [rows], and all group maxima to `maxima`
    [rows, groups]. It returns the tensor at whose start they are, and their stride.
    """
    n, k = keys.shape
    groups = triton.cdiv(width, GROUP)
    maxima = keys.new_empty(rows, groups, dtype=torch.float32)
    bound = keys.new_empty(rows, dtype=torch.float32)
    listed = keys.new_empty(rows, min(k, groups))
    several = width < d_sae
    old, new = ((keys.new_empty(rows if several else 0, k), keys.new_empty(rows if several else 0, k)) for _ in "ab")
    merge = tuning.best(merge_variant(gated=only is not None), keys.device)
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
    """keys, columns [n, k] int32, lowest column first -> values [n, k], indices [n, k] int64, largest first, relu'd."""
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
