"""topk_encode by a threshold from a sample of features, to be measured against topk_encode.py on a GPU.

1. Sample: the first 1/SAMPLE of the features are selected from as one range of topk_encode.py. The `rank`-th largest
   pre-activation is the row's threshold. About SAMPLE * rank of all pre-activations exceed it; fewer than k exceed it
   in one row of millions.
2. Product: `_append` multiplies all other features, and appends each group of SLOT columns that exceeds the threshold
   to a buffer of CAPACITY groups a row. The order of groups is not deterministic. Tiles are at most 128 wide, because
   wider ones spill on a B200.
3. Selection: `_settle` takes the k largest by (key, column), so the order of groups does not matter. They are proven to
   be the top k if at least k were found and the buffer did not overflow: all that is left out is at most the threshold,
   and of features equal to it the sample has the lowest.
4. Fallback: rows without that proof go through the kernels of topk_encode.py, gated by a flag a row. The host does not
   read the flags.

The sample is fair if the order of features is random, as after initialisation. Otherwise, or if more than CAPACITY
groups tie, rows take the fallback. topk_encode.py defines A, B and C and the rates behind the predicted times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import topk_encode as by_ranges
from . import topk_groups, topk_select, tuning
from .topk_encode import search
from .topk_keys import to_pairs
from .topk_product import (
    best_product,
    blocks_of,
    launch_product,
    multiply_tile,
    product_grid,
    product_variant,
    tma_variant,
)
from .topk_select import ordered, select_ranges
from .variant import FLOATS, Variant, aligned, dot_precision, dtypes_and_precisions, jit, max_or_nan, vector_units

SAMPLE = 16
LEAST_SAMPLE = 1024  # features; a threshold from fewer would be too uncertain
CAPACITY = 1024  # groups a row: 2.3 to 4 times the expected number
MOST_K = 128  # the largest k that one program sorts
SLOT = 8  # columns of a group: one count and one group number for 32 bytes of pre-activations
_LEAST_PAIR = tl.constexpr(-(2**63))


@triton.jit
def append_hits(
    b_acts,
    o_m,
    m_m,
    block_n,
    bound_ptr,
    count_ptr,
    slots_ptr,
    groups_ptr,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOT: tl.constexpr,
    CAPACITY: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Append the groups of a tile whose maximum is above their row's bound to the row's next free slots."""
    GROUPS: tl.constexpr = BLOCK_N // SLOT
    o_g = block_n * GROUPS + tl.arange(0, GROUPS)
    b_grouped = tl.reshape(b_acts, [BLOCK_M, GROUPS, SLOT])
    if not WHOLE:
        o_n = (o_g * SLOT)[None, :, None] + tl.arange(0, SLOT)[None, None, :]
        b_grouped = tl.where(o_n < columns, b_grouped, float("-inf"))
    b_maxima = tl.reduce(b_grouped, 2, max_or_nan)
    # [BLOCK_M]
    b_bound = tl.load(bound_ptr + o_m, mask=m_m, other=float("inf"))
    m_hit = m_m[:, None] & (o_g * SLOT < columns)[None, :] & ~(b_maxima <= b_bound[:, None])
    p_count = tl.broadcast_to((count_ptr + o_m)[:, None], [BLOCK_M, GROUPS])
    o_slot = tl.atomic_add(p_count, 1, mask=m_hit, sem="relaxed")
    m_hit = m_hit & (o_slot < CAPACITY)
    o_slot = o_m.to(tl.int64)[:, None] * CAPACITY + o_slot
    tl.store(groups_ptr + o_slot, tl.broadcast_to(o_g[None, :], [BLOCK_M, GROUPS]), mask=m_hit)
    o_e = (o_slot * SLOT)[:, :, None] + tl.arange(0, SLOT)[None, None, :]
    tl.store(slots_ptr + o_e, b_grouped, mask=m_hit[:, :, None])


# For each group g of SLOT columns whose maximum is above bound[r], with s = count[r]++:
#     groups[r, s] = g and slots[r, s] = the pre-activations <x[first + r], W_enc[f]> + b_enc[f] of its columns f
# Groups past CAPACITY are counted and not written.
#
# A program: a tile [BLOCK_M, BLOCK_N], as in `_pre_acts`. Operations: 2 rows d_in columns. Bytes written: 36 for each
# of about SAMPLE (k/8 + 12) hits a row. An atomic addition for each hit, 2 million at A; their latency once a tile.
# Floor: the operations. Predicted (15/16 of all features): A 0.49, B 2.91, C 10.3 ms; the bytes alone A 0.03, B 0.13,
# C 0.4 ms.
@jit
def _append(
    x_ptr,
    W_ptr,
    bias_ptr,
    bound_ptr,
    slots_ptr,
    count_ptr,
    groups_ptr,
    first: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOT: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    block_m, block_n = blocks_of(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    d_in = units * UNIT
    b_acts = multiply_tile(
        x_ptr, W_ptr, first + o_m, o_n, m_m, o_n < columns, d_in, d_in, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    # [BLOCK_N]
    b_acts += tl.load(bias_ptr + o_n, mask=o_n < columns, other=0.0)[None, :]
    append_hits(
        b_acts, o_m, m_m, block_n, bound_ptr, count_ptr, slots_ptr, groups_ptr, columns,
        BLOCK_M, BLOCK_N, SLOT, CAPACITY, UNIT > 1,
    )  # fmt: skip


# The same with TMA loads, in a persistent kernel: see `_pre_acts_tma`.
@jit
def _append_tma(
    x_desc,
    W_desc,
    bias_ptr,
    bound_ptr,
    slots_ptr,
    count_ptr,
    groups_ptr,
    rows: tl.int32,
    columns: tl.int32,
    steps: tl.int32,
    programs: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    RESIDENT: tl.constexpr,
    SLOT: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    tl.assume(steps > 0)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        block_m, block_n = blocks_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        b_acts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]; TMA fills in zeros outside the tensors
            b_x = x_desc.load([block_m * BLOCK_M, step * BLOCK_K])
            b_W = W_desc.load([block_n * BLOCK_N, step * BLOCK_K])
            b_acts = tl.dot(b_x, b_W.T, b_acts, input_precision=PRECISION)
        o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # [BLOCK_N]
        b_acts += tl.load(bias_ptr + o_n, mask=o_n < columns, other=0.0)[None, :]
        append_hits(
            b_acts, o_m, o_m < rows, block_n, bound_ptr, count_ptr, slots_ptr, groups_ptr, columns,
            BLOCK_M, BLOCK_N, SLOT, CAPACITY, True,
        )  # fmt: skip


@triton.jit
def _pairs_at(
    start, sample_ptr, slots_ptr, groups_ptr, count, rank, sampled, d_sae, bound,
    BLOCK: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Entries start .. start + BLOCK of what was found: [BLOCK] pairs, _LEAST_PAIR for what is not above the bound."""
    o_e = start + tl.arange(0, BLOCK)
    m_sampled = o_e < rank
    o_new = tl.where(m_sampled, 0, o_e - rank)
    m_new = (o_e >= rank) & (o_e < count)
    # [BLOCK] each
    b_sample = tl.load(sample_ptr + o_e, mask=m_sampled, other=_LEAST_PAIR)
    b_new = tl.load(slots_ptr + o_new, mask=m_new, other=0.0)
    b_groups = tl.load(groups_ptr + o_new // SLOT, mask=m_new, other=0)
    o_new = sampled + b_groups * SLOT + o_new % SLOT
    m_new = m_new & ~(b_new <= bound) & (o_new < d_sae)
    return tl.where(m_new, to_pairs(b_new, o_new), b_sample)


# pairs[first + r] = the k largest of what was found for row r, in no order, and failed[first + r] = 0. If fewer than k
# were found, or more groups than fit, only failed[first + r] = 1 is written.
#
# A program: one row. It bisects as `choose` does; all pairs differ, so it always ends at exactly k.
# Bytes: 36 a group found, 8 a sampled entry. Floor: the bytes. Predicted by bytes: 0.03 ms at A, B and C; by
# instructions twice that, which was estimated and not counted.
@jit
def _settle(
    sample_ptr,
    slots_ptr,
    count_ptr,
    groups_ptr,
    bound_ptr,
    pairs_ptr,
    failed_ptr,
    first: tl.int32,
    sampled: tl.int32,
    d_sae: tl.int32,
    rank: tl.int32,
    k: tl.int32,
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample_ptr += row * rank
    slots_ptr += row * CAPACITY * SLOT
    groups_ptr += row * CAPACITY
    pairs_ptr += (first + row) * k
    groups = tl.load(count_ptr + row)
    bound = tl.load(bound_ptr + row)
    count = rank + tl.minimum(groups, CAPACITY) * SLOT

    b_first = _pairs_at(0, sample_ptr, slots_ptr, groups_ptr, count, rank, sampled, d_sae, bound, BLOCK, SLOT)
    found = tl.sum((b_first > _LEAST_PAIR).to(tl.int32), 0)
    high = tl.max(b_first, 0)
    for start in range(BLOCK, count, BLOCK):
        b_pairs = _pairs_at(
            start, sample_ptr, slots_ptr, groups_ptr, count, rank, sampled, d_sae, bound,
            BLOCK, SLOT,
        )  # fmt: skip
        found += tl.sum((b_pairs > _LEAST_PAIR).to(tl.int32), 0)
        high = tl.maximum(high, tl.max(b_pairs, 0))
    proved = (found >= k) & (groups <= CAPACITY)
    tl.store(failed_ptr + first + row, tl.where(proved, 0, 1))
    count = tl.where(proved, count, 0)
    low = tl.zeros([], tl.int64) + _LEAST_PAIR + 1
    high = tl.where(proved & (found > k), high, low)
    while low < high:
        # (low + high + 1) // 2, whose sum could overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((b_first >= middle).to(tl.int32), 0)
        for start in range(BLOCK, count, BLOCK):
            b_pairs = _pairs_at(
                start, sample_ptr, slots_ptr, groups_ptr, count, rank, sampled, d_sae, bound,
                BLOCK, SLOT,
            )  # fmt: skip
            reached += tl.sum((b_pairs >= middle).to(tl.int32), 0)
        low = tl.where(reached >= k, middle, low)
        high = tl.where(reached > k, high, tl.where(reached == k, middle, middle - 1))
    taken = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        b_pairs = _pairs_at(
            start, sample_ptr, slots_ptr, groups_ptr, count, rank, sampled, d_sae, bound,
            BLOCK, SLOT,
        )  # fmt: skip
        m_take = b_pairs >= low
        b_take = m_take.to(tl.int32)
        o_place = taken + tl.cumsum(b_take, 0) - 1
        tl.store(pairs_ptr + o_place, b_pairs, mask=m_take)
        taken += tl.sum(b_take, 0)


def append_variant(product: Variant) -> Variant:
    """The appending product with the tiles of `product`, but at most 128 wide, because wider ones spill."""
    given = dict(list(product.tensors.items())[:2])
    floats = {name: torch.float32 for name in ("bias_ptr", "bound_ptr", "slots_ptr")}
    left_out = ("GROUP", "SUBTRACT", "GATED", "EARLY")
    tiles = {name: value for name, value in product.constants.items() if name not in left_out}
    if product.descriptors:
        tiles |= {"FLATTEN": True, "RESIDENT": tiles.pop("RESIDENT")}
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], 128)
    return product._replace(
        kernel=_append_tma if product.descriptors else _append,
        tensors={**given, **floats, "count_ptr": torch.int32, "groups_ptr": torch.int32},
        constants={**tiles, "SLOT": SLOT, "CAPACITY": CAPACITY},
    )


def _settle_variant() -> Variant:
    types = {
        "sample_ptr": torch.int64, "slots_ptr": torch.float32, "count_ptr": torch.int32, "groups_ptr": torch.int32,
        "bound_ptr": torch.float32, "pairs_ptr": torch.int64, "failed_ptr": torch.int32,
    }  # fmt: skip
    constants = {"BLOCK": 2048, "SLOT": SLOT, "CAPACITY": CAPACITY}
    return Variant(_settle, types, constants, num_warps=4, num_stages=1)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel and topk_encode.py doesn't."""
    products = [
        product_variant(dtype, precision, unit)
        for dtype, precision in dtypes_and_precisions()
        for unit in vector_units(dtype)
    ]
    appending = [append_variant(product) for product in (*products, *map(tma_variant, FLOATS))]
    gated = [_gated(product) for product in products]
    return [*appending, _settle_variant(), *gated, *topk_groups.variants(gated=True), *topk_select.variants(gated=True)]


def _gated(product: Variant) -> Variant:
    return product._replace(constants={**product.constants, "GATED": True})


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk_encode.topk_encode by a sampled threshold; the same bits, if products have the same bits.

    Calls topk_encode.topk_encode itself if k is too large or the sample too small.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    sampled = d_sae // SAMPLE // by_ranges.RANGE_UNIT * by_ranges.RANGE_UNIT
    if n == 0 or k > MOST_K or sampled < LEAST_SAMPLE:
        return by_ranges.topk_encode(x, W_enc, b_enc, k)
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    pairs = torch.empty(n, k, dtype=torch.int64, device=x.device)
    failed = torch.empty(n, dtype=torch.int32, device=x.device)
    product = best_product(x, d_sae)
    _sample_and_append(x, W_enc, bias, pairs, failed, product, sampled)
    unit = product.constants.get("UNIT", 16 // x.element_size())
    fallback = product_variant(x.dtype, dot_precision(x.dtype), unit)
    search(x, W_enc, bias, pairs, _gated(tuning.best(fallback, x.device)), only=failed)
    return ordered(pairs, x.dtype)


def _sample_and_append(
    x: Tensor, W_enc: Tensor, bias: Tensor, pairs: Tensor, failed: Tensor, product: Variant, sampled: int
) -> None:
    """Fill pairs [n, k] of the rows with a proven result; failed [n] is 1 for the others."""
    (n, k), d_sae = pairs.shape, W_enc.shape[0]
    rank = k // 8 + 12
    append, settle = append_variant(product), _settle_variant()
    row_bytes = by_ranges.bytes_a_row(sampled, rank) + CAPACITY * (4 * SLOT + 4) + 8 * rank + 4
    rows = min(n, max(by_ranges.WORKSPACE_BYTES // row_bytes // 128 * 128, 128))
    slots = torch.empty(rows, CAPACITY * SLOT, dtype=torch.float32, device=x.device)
    groups, count = failed.new_empty(rows, CAPACITY), failed.new_empty(rows)
    sample = pairs.new_empty(rows, rank)
    acts, bound = torch.empty(rows, sampled, device=x.device), torch.empty(rows, device=x.device)
    W_rest, bias_rest = W_enc[sampled:], bias[sampled:]
    for first in range(0, n, rows):
        chunk = min(rows, n - first)
        count.zero_()

        def multiply(_: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
            launch_product(product, x, W_enc[:sampled], bias, bound, acts, sampled, maxima, first, chunk)  # noqa: B023
            return acts, sampled

        select_ranges(multiply, chunk, sampled, sampled, sample[:chunk], bound=bound)
        grid, (x_given, W_given, *sizes) = product_grid(append, x, W_rest, first, chunk)
        append.launch(grid, x_given, W_given, bias_rest, bound, slots, count, groups, *sizes)
        settle.launch((chunk,), sample, slots, count, groups, bound, pairs, failed, first, sampled, d_sae, rank, k)
