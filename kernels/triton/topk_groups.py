"""What topk_encode keeps between ranges: `_keep_groups` keeps the k groups of columns with the largest maxima so far,
and the k-th largest maximum as the bound.

topk_encode.py explains the algorithm, and defines A, B and C and the rates behind the predicted times.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .topk_keys import LAST, LEAST_KEY, NO_KEY, to_float, to_key
from .topk_product import GROUP
from .variant import Variant, jit


@triton.jit
def _maxima_at(start, tops_ptr, maxima_ptr, old, total, listed, BLOCK: tl.constexpr):
    """[BLOCK] keys of candidates start .. start + BLOCK: the `listed` kept maxima, from `old` on those of the range.

    All else is NO_KEY. `old` is a multiple of 4, and rows are read to the next one, so that loads are of 16 bytes.
    """
    o_e = start + tl.arange(0, BLOCK)
    # [BLOCK] each
    b_old = tl.load(tops_ptr + o_e, mask=o_e < old, other=NO_KEY)
    b_new = tl.load(maxima_ptr + (o_e - old), mask=(o_e >= old) & (o_e < (total + 3) // 4 * 4), other=0.0)
    b_old = tl.where(o_e < listed, b_old, NO_KEY)
    return tl.where((o_e >= old) & (o_e < total), to_key(b_new), b_old)


@triton.jit
def _numbers_at(start, groups_ptr, offset, old, BLOCK: tl.constexpr):
    """[BLOCK] numbers, among all groups, of the candidates that `_maxima_at` gives."""
    o_e = start + tl.arange(0, BLOCK)
    # [BLOCK]
    b_old = tl.load(groups_ptr + o_e, mask=o_e < old, other=0)
    return tl.where(o_e < old, b_old, offset + o_e - old)


@triton.jit
def _move(
    b_keys, start, groups_ptr, moves_ptr, come, go, low, cut, exact, offset, old, total, listed, BLOCK: tl.constexpr
):
    """List the candidates that come and the slots of those that go; returns how many of each there are by now."""
    m_keep = b_keys >= low
    if not exact:
        b_numbers = _numbers_at(start, groups_ptr, offset, old, BLOCK)
        m_keep = (b_keys > low) | ((b_keys == low) & (b_numbers <= cut))
    o_e = start + tl.arange(0, BLOCK)
    m_old = o_e < old
    m_move = (m_keep != m_old) & (b_keys != NO_KEY)
    # Both are counted at once, in 16 bits each.
    b_counts = tl.where(m_move, tl.where(m_old, 1 << 16, 1), 0)
    o_place = tl.cumsum(b_counts, 0)
    o_place = tl.where(m_old, listed + go - 1 + (o_place >> 16), come - 1 + (o_place & 0xFFFF))
    tl.store(moves_ptr + o_place, tl.where(m_old, o_e, o_e - old), mask=m_move)
    counts = tl.sum(b_counts, 0)
    return come + (counts & 0xFFFF), go + (counts >> 16)


# tops[r, s], groups[r, s], slots[r, s] = the key of the maximum, the number and the pre-activations of the `listed`
# groups with the largest maxima of those kept so far (none if `old` is 0) and of this range's; of equal ones the lower
# groups. bound[r] = the least of these maxima, or a number between it and the next below.
# COPY: without it slots stay as they are, because pre-activations stay where they are. GATED: only rows that are set in
# `only`; nothing else is read of others.
#
# A program: one row, in one warp. What is kept stays in its slot; a new group takes the slot of one that goes.
# Bytes a row: 4 a group and a slot; 264 for each group that is new, which are 59, 165 and 210 in all (A, B, C).
# Operations, counted from SASS (sm_90), for up to 512 candidates: 980 instructions, 75 for each step of the bisection,
# of which there are 4 to 9, and 129 to copy up to 32 groups.
# Floor: the bytes, A 0.05, B 0.13, C 0.18 ms for all ranges. Predicted (bench/predict): A 0.12, B 0.19, C 0.38 ms, by
# integer instructions; where no row is set, the launches.
@jit
def _keep_groups(
    acts_ptr,
    maxima_ptr,
    bound_ptr,
    slots_ptr,
    tops_ptr,
    groups_ptr,
    moves_ptr,
    only_ptr,
    offset: tl.int32,
    columns: tl.int32,
    stride: tl.int32,
    row_groups: tl.int32,
    listed: tl.int32,
    old: tl.int32,
    row_slots: tl.int32,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
    COPY: tl.constexpr,
    GATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if GATED:
        wanted = tl.load(only_ptr + row) != 0
    if wanted:
        old = old * 4
        total = old + tl.cdiv(columns, GROUP)
        acts_ptr += row * stride * GROUP
        maxima_ptr += row * row_groups * 4
        slots_ptr += row * row_slots * 4 * GROUP
        tops_ptr += row * row_slots * 4
        groups_ptr += row * row_slots * 4
        moves_ptr += row * row_slots * 8
        # At least `listed` candidates reach `low`; `above` < listed are over `high`.
        low = tl.where(old > 0, to_key(tl.load(bound_ptr + row)), LEAST_KEY)

        # [BLOCK]; mostly that is all
        b_first = _maxima_at(0, tops_ptr, maxima_ptr, old, total, listed, BLOCK)
        o_e = tl.arange(0, BLOCK)
        hits = tl.sum(((b_first > low) & (o_e >= old)).to(tl.int32), 0)
        top = tl.max(b_first, 0)
        for start in range(BLOCK, total, BLOCK):
            b_keys = _maxima_at(start, tops_ptr, maxima_ptr, old, total, listed, BLOCK)
            hits += tl.sum(((b_keys > low) & (start + o_e >= old)).to(tl.int32), 0)
            top = tl.maximum(top, tl.max(b_keys, 0))
        total = tl.where((hits == 0) & (old > 0), 0, total)
        exact = total <= listed
        if old == 0:
            low = tl.min(tl.where(b_first == NO_KEY, LAST, b_first), 0)
            for start in range(BLOCK, total, BLOCK):
                b_keys = _maxima_at(start, tops_ptr, maxima_ptr, old, total, listed, BLOCK)
                low = tl.minimum(low, tl.min(tl.where(b_keys == NO_KEY, LAST, b_keys), 0))
        high = tl.where(exact, low, top)
        above = tl.zeros([], tl.int32)
        while low < high:
            # (low + high + 1) // 2, whose sum could overflow.
            trial = (low | high) - ((low ^ high) >> 1)
            reached = tl.sum((b_first >= trial).to(tl.int32), 0)
            for start in range(BLOCK, total, BLOCK):
                b_keys = _maxima_at(start, tops_ptr, maxima_ptr, old, total, listed, BLOCK)
                reached += tl.sum((b_keys >= trial).to(tl.int32), 0)
            exact = exact | (reached == listed)
            low = tl.where(reached >= listed, trial, low)
            high = tl.where(reached > listed, high, tl.where(reached == listed, trial, trial - 1))
            above = tl.where(reached >= listed, above, reached)

        # Of those equal to `low`, `listed` - `above` are kept: those with numbers up to `cut`.
        cut = tl.zeros([], tl.int32)
        last = tl.where(exact, 0, offset + tl.cdiv(columns, GROUP))
        while cut < last:
            trial = cut + (last - cut) // 2
            equal = tl.zeros([], tl.int32)
            for start in range(0, total, BLOCK):
                b_keys = _maxima_at(start, tops_ptr, maxima_ptr, old, total, listed, BLOCK)
                b_numbers = _numbers_at(start, groups_ptr, offset, old, BLOCK)
                equal += tl.sum(((b_keys == low) & (b_numbers <= trial)).to(tl.int32), 0)
            enough = above + equal >= listed
            cut = tl.where(enough, cut, trial + 1)
            last = tl.where(enough, trial, last)

        # moves[r]: places in this range of the groups that come, and at `listed` the slots of those that go.
        come = tl.zeros([], tl.int32)
        go = tl.zeros([], tl.int32)
        if total > 0:
            come, go = _move(
                b_first, 0, groups_ptr, moves_ptr, come, go, low, cut, exact, offset, old, total, listed, BLOCK
            )
        for start in range(BLOCK, total, BLOCK):
            b_keys = _maxima_at(start, tops_ptr, maxima_ptr, old, total, listed, BLOCK)
            come, go = _move(
                b_keys, start, groups_ptr, moves_ptr, come, go, low, cut, exact, offset, old, total, listed, BLOCK
            )
        tl.debug_barrier()  # other threads read the moves
        o_c = tl.arange(0, GROUP)
        for start in range(0, come, BLOCK_J):
            o_j = start + tl.arange(0, BLOCK_J)
            m_j = o_j < come
            # [BLOCK_J] each
            b_from = tl.load(moves_ptr + o_j, mask=m_j, other=0)
            b_slots = tl.load(moves_ptr + listed + o_j, mask=o_j < go, other=0)
            b_slots = tl.where(old > 0, b_slots, o_j)
            tl.store(tops_ptr + b_slots, to_key(tl.load(maxima_ptr + b_from, mask=m_j, other=0.0)), mask=m_j)
            tl.store(groups_ptr + b_slots, offset + b_from, mask=m_j)
            if COPY:
                # [BLOCK_J, GROUP]
                b_acts = tl.load(acts_ptr + (b_from * GROUP)[:, None] + o_c[None, :], mask=m_j[:, None], other=0.0)
                tl.store(slots_ptr + (b_slots * GROUP)[:, None] + o_c[None, :], b_acts, mask=m_j[:, None])
        tl.store(bound_ptr + row, to_float(low))


def keep_variant(copy: bool, gated: bool = False) -> Variant:
    """The form that keeps groups."""
    block = 16 if gated else 32  # of gated ones, 32 spill on sm_100
    floats = {name: torch.float32 for name in ("acts_ptr", "maxima_ptr", "bound_ptr", "slots_ptr")}
    ints = {name: torch.int32 for name in ("tops_ptr", "groups_ptr", "moves_ptr", "only_ptr")}
    return Variant(
        _keep_groups,
        {**floats, **ints},
        {"BLOCK": 512, "BLOCK_J": block, "GROUP": GROUP, "COPY": copy, "GATED": gated},
        num_warps=1,
        num_stages=1,
    )


def variants(gated: bool = False) -> list[Variant]:
    """Every form in which this module launches a kernel, unless another was tuned for a device."""
    return [keep_variant(copy, gated) for copy in (True, False)]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    return [tuning.changed(variant, {"num_warps": 2})]
