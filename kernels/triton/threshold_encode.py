"""threshold_encode, near_threshold and batch_topk_encode: what is above a threshold that is known.

1. Product: `_append_above` multiplies all features once. Its epilogue sets to zero what is not above its feature's
   threshold, and appends each group of SLOT columns with a positive one to a buffer of CAPACITY groups a row. The
   order of groups is not deterministic.
2. `_order` takes what is in the buffer, or the k_max largest of it, by value and column, so the order of groups does
   not matter; `_finish` (topk_select.py) sorts. That is all there is if the buffer did not overflow.
3. Fallback: rows of which more than CAPACITY groups are hit go through `topk_encode.search`, with a product that sets
   to zero as above (`_pre_acts_above`), gated by a flag a row. The host does not read the flags. All rows do where a
   batch has too few above the guess of its threshold, and then for all that are positive.

Nothing is merged, because nothing is estimated. The appending product is that of topk_threshold.py, the choice that of
topk_select.py. topk_encode.py defines A, B and C and the rates behind the predicted times.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..portable import threshold_encode as portable
from ..portable.threshold_encode import Code, in_dtype
from . import topk_encode as by_ranges
from . import topk_threshold, tuning
from .topk_product import (
    best_product,
    blocks_of,
    multiply_tile,
    product_grid,
    product_variant,
    tiles_wanted,
    wanted_rows,
    write_hits,
)
from .topk_select import choose, ordered
from .topk_threshold import CAPACITY, SLOT, append_hits, append_variant
from .variant import FLOATS, Variant, aligned, dot_precision, dtypes_and_precisions, jit, vector_units

threshold_encode_again = portable.threshold_encode_again
threshold_encode_and_keep = portable.threshold_encode_and_keep
threshold_table = portable.threshold_table


@triton.jit
def _above(b_acts, features_ptr, o_n, m_n, BELOW: tl.constexpr):
    """Add the biases, and set to zero what is not above the lower and (BELOW) below the upper bound; NaN stays.

    features: [columns, 3] biases, lower and upper bounds. An upper bound of NaN is none.
    """
    # [BLOCK_N] each
    b_bias = tl.load(features_ptr + o_n.to(tl.int64) * 3, mask=m_n, other=0.0)
    b_low = tl.load(features_ptr + o_n.to(tl.int64) * 3 + 1, mask=m_n, other=0.0)
    b_acts += b_bias[None, :]
    m_zero = b_acts <= b_low[None, :]
    if BELOW:
        b_high = tl.load(features_ptr + o_n.to(tl.int64) * 3 + 2, mask=m_n, other=0.0)
        m_zero = m_zero | (b_acts >= b_high[None, :])
    return tl.where(m_zero, 0.0, b_acts)


# As topk_threshold.py's `_append`, of what `_above` leaves; bound is zero. Upper bounds are left to `_below`: with them
# these kernels spill on sm_100.
#
# Operations, bytes, floor: as there, with 36 bytes for each group that is hit, and all features. Counted from SASS
# (sm_90) the epilogue with TMA has 1,540 instructions and 11 barriers for 128 x 128; that of `_pre_acts_tma` has 468
# and 3 for 128 x 256. Where d_in is small, as at A, that takes back what the selection saves; a GPU has to tell.
@jit
def _append_above(
    x_ptr,
    W_ptr,
    features_ptr,
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
    b_acts = _above(b_acts, features_ptr, o_n, o_n < columns, False)
    append_hits(
        b_acts, o_m, m_m, block_n, bound_ptr, count_ptr, slots_ptr, groups_ptr, columns,
        BLOCK_M, BLOCK_N, SLOT, CAPACITY, UNIT > 1,
    )  # fmt: skip


# The same with TMA loads, in a persistent kernel: see `_pre_acts_tma`.
@jit
def _append_above_tma(
    x_desc,
    W_desc,
    features_ptr,
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
        b_acts = _above(b_acts, features_ptr, o_n, o_n < columns, False)
        append_hits(
            b_acts, o_m, o_m < rows, block_n, bound_ptr, count_ptr, slots_ptr, groups_ptr, columns,
            BLOCK_M, BLOCK_N, SLOT, CAPACITY, True,
        )  # fmt: skip


# As topk_product.py's GATED `_pre_acts`, of what `_above` leaves: the fallback's product.
@jit
def _pre_acts_above(
    x_ptr,
    W_ptr,
    features_ptr,
    bound_ptr,
    acts_ptr,
    maxima_ptr,
    only_ptr,
    first: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    units: tl.int32,
    programs: tl.int32,
    stride: tl.int32,
    groups: tl.int32,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WHOLE: tl.constexpr = UNIT > 1
    d_in = units * UNIT
    if WHOLE:
        stride = stride * GROUP
    tiles = tiles_wanted(only_ptr + first, rows, columns, BLOCK_M, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, programs):
        block_m, block_n = blocks_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < columns
        m_m, wanted = wanted_rows(only_ptr + first, o_m, o_m < rows)
        if wanted:
            b_acts = multiply_tile(
                x_ptr, W_ptr, first + o_m, o_n, m_m, m_n, d_in, d_in, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
            b_acts = _above(b_acts, features_ptr, o_n, m_n, True)
            write_hits(
                b_acts, o_m, m_m, block_n, bound_ptr, acts_ptr, maxima_ptr, columns, stride, groups,
                BLOCK_M, BLOCK_N, GROUP, WHOLE, False,
            )  # fmt: skip


# slots[r] = 0 where it is not below its feature's upper bound. A program: one row, in one warp. Bytes: 36 a group, and
# 12 a column for its bound, from L2.
@jit
def _below(
    features_ptr,
    slots_ptr,
    count_ptr,
    groups_ptr,
    columns: tl.int32,
    BLOCK_J: tl.constexpr,
    SLOT: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots_ptr += row * CAPACITY * SLOT
    groups_ptr += row * CAPACITY
    count = tl.minimum(tl.load(count_ptr + row), CAPACITY)
    for start in range(0, count, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        # [BLOCK_J]
        b_groups = tl.load(groups_ptr + o_j, mask=o_j < count, other=0)
        o_c = (b_groups * SLOT)[:, None] + tl.arange(0, SLOT)[None, :]
        m_c = (o_j < count)[:, None] & (o_c < columns)
        p_slots = slots_ptr + (o_j * SLOT)[:, None] + tl.arange(0, SLOT)[None, :]
        # [BLOCK_J, SLOT] each
        b_acts = tl.load(p_slots, mask=(o_j < count)[:, None], other=0.0)
        b_high = tl.load(features_ptr + o_c.to(tl.int64) * 3 + 2, mask=m_c, other=0.0)
        tl.store(p_slots, 0.0, mask=m_c & (b_acts >= b_high))


# pairs[first + r] = the k largest positive ones of row r's groups, in no order, then pairs of zero in column 0; and
# failed[first + r] = 0. If more groups were hit than fit, failed[first + r] = 1, and the pairs are of zero.
#
# A program: one row, in one warp. Bytes a row: 36 a group, 8 k written. Counted from SASS (sm_90): 470 instructions for
# up to 128 groups, 117 for each step of a bisection, which only rows with more than k need, 700 for 64 groups to write,
# and 32 for 32 pairs of zero. Predicted with 64 groups a row: A, B and C 0.012 ms; by bytes 0.007 ms.
@jit
def _order(
    slots_ptr,
    count_ptr,
    groups_ptr,
    pairs_ptr,
    failed_ptr,
    first: tl.int32,
    columns: tl.int32,
    k: tl.int32,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SLOT: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.load(count_ptr + row)
    proved = groups <= CAPACITY
    tl.store(failed_ptr + first + row, tl.where(proved, 0, 1))
    pairs_ptr += (first + row) * k
    low = tl.zeros([], tl.int32) + 1  # the key of the least positive number
    taken, _ = choose(
        slots_ptr + row * CAPACITY * SLOT, groups_ptr + row * CAPACITY, pairs_ptr, tl.where(proved, groups, 0), columns,
        k, low, BLOCK_J, BLOCK_T, SLOT, True, True,
    )  # fmt: skip
    for start in range(taken, k, 32):
        o_k = start + tl.arange(0, 32)
        tl.store(pairs_ptr + o_k, tl.full([32], 0x7FFFFFFF, tl.int64), mask=o_k < k)


def _append_variant(product: Variant) -> Variant:
    """The appending product with the tiles of `product`."""
    append = append_variant(product)
    kernel = _append_above_tma if product.descriptors else _append_above
    return append._replace(kernel=kernel, tensors=_with_features(append.tensors))


def _order_variant() -> Variant:
    names = ("slots_ptr", "count_ptr", "groups_ptr", "pairs_ptr", "failed_ptr")
    types = {name: torch.int32 for name in names} | {"slots_ptr": torch.float32, "pairs_ptr": torch.int64}
    constants = {"BLOCK_J": 128, "BLOCK_T": 64, "SLOT": SLOT, "CAPACITY": CAPACITY}
    return Variant(_order, types, constants, num_warps=1, num_stages=1)


def _below_variant() -> Variant:
    floats = {name: torch.float32 for name in ("features_ptr", "slots_ptr")}
    constants = {"BLOCK_J": 32, "SLOT": SLOT, "CAPACITY": CAPACITY}
    types = floats | {"count_ptr": torch.int32, "groups_ptr": torch.int32}
    return Variant(_below, types, constants, num_warps=1, num_stages=1)


def _fallback_variant(dtype: torch.dtype, precision: str, unit: int) -> Variant:
    product = product_variant(dtype, precision, unit)
    constants = {name: of for name, of in product.constants.items() if name not in ("SUBTRACT", "GATED")}
    constants["BLOCK_N"] = 64  # wider ones spill on sm_100
    return product._replace(kernel=_pre_acts_above, tensors=_with_features(product.tensors), constants=constants)


def _with_features(tensors: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    return {"features_ptr" if name == "bias_ptr" else name: dtype for name, dtype in tensors.items()}


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel and no other does."""
    forms = [(dtype, precision, unit) for dtype, precision in dtypes_and_precisions() for unit in vector_units(dtype)]
    products = [*(product_variant(*form) for form in forms), *map(topk_threshold.tma_variant, FLOATS)]
    return [
        *map(_append_variant, products),
        _below_variant(),
        _order_variant(),
        *(_fallback_variant(*form) for form in forms),
    ]


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, dtype: torch.dtype | None = None
) -> Code:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae], threshold [] or [d_sae] float32 -> values [n, k_max] in `dtype`
    or x's, indices [n, k_max] int64.

    Products of float32 are as in `topk_encode`. Memory beside the result: 8 n k_max bytes, WORKSPACE_BYTES, and a
    workspace of `topk_encode`.
    """
    return in_dtype(*_encode(x, W_enc, b_enc, threshold, None, k_max), dtype or x.dtype)


def near_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int) -> Code:
    """As `threshold_encode`, of the positive pre-activations less than bandwidth / 2 from their threshold; float32."""
    return _encode(x, W_enc, b_enc, threshold - bandwidth / 2, threshold + bandwidth / 2, k_max)


def threshold_encode_by_table(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, table: list[Tensor]
) -> Code:
    """`threshold_encode`; the table is empty."""
    return threshold_encode(x, W_enc, b_enc, threshold, k_max)


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    k_max: int,
    mask: Tensor | None,
    guess: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The portable `batch_topk_encode`. The proof of a search is read by kernels, not by the host."""
    if guess is None:
        code = by_ranges.topk_encode(x, W_enc, b_enc, k_max, dtype=torch.float32)
    else:
        low = portable.LOWERED * guess.float().nan_to_num(nan=0.0)
        code = _encode(x, W_enc, b_enc, low, None, k_max, lambda values: portable.enough(values, k, mask))
    values, indices, threshold = portable.in_budget(*code, k, mask)
    return *in_dtype(values, indices, dtype or x.dtype), threshold


def batch_encode_and_keep(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, k_max: int, mask: Tensor | None, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The portable `batch_encode_and_keep`, from the k_max largest of each row: there is no guess to prove."""
    values, indices, kept = by_ranges.encode_and_keep(x, W_enc, b_enc, k_max, torch.float32)
    values, indices, threshold = portable.in_budget(values, indices, k, mask)
    return *in_dtype(values, indices, x.dtype), threshold, kept


def batch_encode_again(
    kept: Tensor, a: Tensor, W_a: Tensor, k: int, k_max: int, mask: Tensor | None, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The portable `batch_encode_again`, likewise."""
    code = by_ranges.encode_again(kept, a, W_a, k_max, torch.float32)
    values, indices, threshold = portable.in_budget(*code, k, mask)
    return *in_dtype(values, indices, a.dtype), threshold


def _encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    low: Tensor,
    high: Tensor | None,
    k_max: int,
    enough: Callable[[Tensor], Tensor] | None = None,
) -> Code:
    """Values [n, k_max] float32 and indices of the positive pre-activations above `low` and, if given, below `high`.

    enough: whether the values [n, k_max] of what fits the buffer, [] bool. Where not, all rows are of what is positive.
    """
    x, W_enc = aligned(x), aligned(W_enc)
    n, d_sae = x.shape[0], W_enc.shape[0]
    pairs = torch.empty(n, k_max, dtype=torch.int64, device=x.device)
    if n == 0:
        return x.new_empty(0, k_max, dtype=torch.float32), pairs
    # Nothing is above a NaN, and nothing below one.
    low = low.float().clamp(min=0).nan_to_num(nan=math.inf, posinf=math.inf).expand(d_sae)
    upper = high is not None
    if high is None:
        high = low.new_full((), math.nan)
    else:
        high = high.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    features = torch.stack([b_enc.float(), low, high.expand(d_sae)], dim=1)
    failed = torch.empty(n, dtype=torch.int32, device=x.device)
    product = best_product(x, d_sae)
    _append_and_order(x, W_enc, features, pairs, failed, product, upper)
    if enough is not None:
        few = ~enough(ordered(pairs, torch.float32)[0])
        failed |= few
        features[:, 1].masked_fill_(few, 0)
    unit = product.constants.get("UNIT", 16 // x.element_size())
    fallback = tuning.best(_fallback_variant(x.dtype, dot_precision(x.dtype), unit), x.device)
    by_ranges.search(x, W_enc, features, pairs, fallback, only=failed)
    values, indices = ordered(pairs, torch.float32)
    return values, indices.masked_fill_(values == 0, 0)


def _append_and_order(
    x: Tensor, W_enc: Tensor, features: Tensor, pairs: Tensor, failed: Tensor, product: Variant, upper: bool
) -> None:
    """Fill pairs [n, k] of the rows that fit; failed [n] is 1 for the others."""
    (n, k), d_sae = pairs.shape, W_enc.shape[0]
    append, order = tuning.best(_append_variant(product), x.device), _order_variant()
    rows = min(n, by_ranges.WORKSPACE_BYTES // (CAPACITY * (4 * SLOT + 4)) // 128 * 128)
    slots = torch.empty(rows, CAPACITY * SLOT, dtype=torch.float32, device=x.device)
    groups, count = failed.new_empty(rows, CAPACITY), failed.new_empty(rows)
    bound = slots.new_zeros(rows)
    for first in range(0, n, rows):
        chunk = min(rows, n - first)
        count.zero_()
        grid, (x_given, W_given, *sizes) = product_grid(append, x, W_enc, first, chunk)
        append.launch(grid, x_given, W_given, features, bound, slots, count, groups, *sizes)
        if upper:
            _below_variant().launch((chunk,), features, slots, count, groups, d_sae)
        order.launch((chunk,), slots, count, groups, pairs, failed, first, d_sae, k)
