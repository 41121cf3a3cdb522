"""The selection of topk_encode: of the groups that a product wrote and the k found before, the k largest; their order.

The scheme that it belongs to, and the shapes and rates that predicted times are for, are in topk_encode.py.
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
    """float32 -> int32 of the same order; -0.0 as +0.0; every NaN as NAN_KEY."""
    b_bits = tl.where(b_acts == 0.0, 0.0, b_acts).to(tl.int32, bitcast=True)
    b_keys = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_acts == b_acts, b_keys, 0x7FFFFFFF)


@triton.jit
def _keys_at(start, acts_ptr, list_ptr, old_keys_ptr, count, old, columns, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Entries start .. start + BLOCK of a row's candidates: their columns in acts, and keys (_NO_KEY past the end).

    With GROUP > 1 the first `old` candidates are those found before; then come the columns of the listed groups.
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
        # [BLOCK]: GROUP neighbours read the same word
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
    bound = to_key(tl.load(bound_ptr + row))
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


def merge_variant(gated: bool = False) -> Variant:
    """`_merge`, of all rows or of those that a flag names."""
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
    finishes = [_finish_variant(dtype, block) for dtype in FLOATS for block in _FINISH_BLOCKS]
    return [merge_variant(), *finishes]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms of `_merge` that its launcher may take: for `make gpu` to try and `tuned.json` to name."""
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
