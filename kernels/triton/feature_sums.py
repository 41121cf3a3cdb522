"""sort_pairs and feature_sums, and the sum over a feature's run of pairs, which adam_rows.py shares.

Some features fire on nearly every token, so the length of a run has no bound. Long runs are summed in two steps, as in
a split-k product: the sorted pairs are cut into blocks of `piece` pairs; `_pieces` sums each block's part of a run that
is longer than `piece`; then the program of that run adds its partial sums.

feature_rows.py says what holds for all sums, and defines A, B and C and the rates behind the predicted times.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pairs import Pairs, given_pairs
from . import tuning
from .variant import FLOATS, Variant, aligned, jit, unit_of, vector_units

# Shortest piece, in pairs: for rows of 128 columns or more, and for narrower ones, whose pairs cost less.
MIN_PIECE = 256
MIN_NARROW_PIECE = 64
# Most memory for the partial sums of one table; pieces are made longer to stay within it.
PARTIAL_BYTES = 32 * 2**20


@triton.jit
def widen(b_narrow):
    """To float32. bfloat16 is widened by its bits, because Triton's interpreter takes them for an integer."""
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
    """[FEATURES, COLUMNS]: sum over b_starts <= p < b_ends of weights[order[p]] * rows[tokens[p], o_c]."""
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
        b_rows = widen(tl.load(p_rows, mask=m_p[:, :, None] & m_c[None, None, :], other=0.0))
        b_sum += tl.sum(b_weights[:, :, None] * b_rows, axis=1)
    return b_sum


@triton.jit
def sum_runs(
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
    """[FEATURES, COLUMNS]: the sum of each feature's run. Of a run longer than `piece`, the partial sums are added."""
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


# Partial sums of long runs. Block j is the sorted pairs j piece to (j + 1) piece - 1, and has two slots:
#
#     partial[2 j]     = sum over the block's pairs in the long run that contains pair j piece
#     partial[2 j + 1] = sum over the block's pairs in a long run that begins later in the block
#
# There is no third: a long run has more than `piece` pairs, so at most one of them begins in a block.
# Slots without a long run are not written.
#
# A program: COLUMNS columns of one slot, of one table or two. It finds its run by a search in `ends` with 64 probes a
# step: 3 dependent loads for 262,144 features. Without a long run it returns.
# Bytes (n tokens, e bytes an element): 20 + d e for each pair of a long run, mostly from L2, because `rows` has only
# n d e; at most 8 d / piece written for each pair. Operations: 2 d a pair. Floor: the gathered bytes at the rate of L2.
# Predicted without long runs: A 4,096 programs of 2 us, about 1,000 at a time, 0.01 ms; B and C 18,000, 0.04 ms. With
# long runs: 0.03 ms for a piece of 256 pairs (A) to 0.06 ms for one of 512 (C); pieces run side by side.
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
        # Invariant: the last feature with ends[feature] <= place is in [feature, feature + count).
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
def runs(ends_ptr, d_sae, FEATURES: tl.constexpr):
    """This program's features, and the start and end of each one's run. Beyond d_sae runs are empty."""
    o_f = tl.program_id(0).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    m_f = o_f < d_sae
    # [FEATURES]
    b_starts = tl.load(ends_ptr + o_f, mask=m_f, other=0)
    # [FEATURES]
    b_ends = tl.load(ends_ptr + o_f + 1, mask=m_f, other=0)
    return o_f, m_f, b_starts, b_ends


# out[f] = sum over the pairs p of feature f of weights[p] rows[tokens[p]], for one table or two; 0 for an empty run.
#
# A program: COLUMNS columns of FEATURES neighbouring features; FEATURES > 1 for narrow rows only. Two tables share the
# reading of the run. All features of a slab of columns come before the next slab, so that L2 holds the slab of `rows`,
# n COLUMNS e bytes.
# Bytes (P pairs, n tokens, e bytes an element), for each table: P d e gathered from L2; `rows` n d e from memory;
# d_sae d e written; 20 a pair and slab for the run. Operations: 2 P d. Floor: (d_sae + n) d e from memory.
# Predicted for two tables in bf16: A 0.17 ms (floor 0.03), B 1.04 (0.16): the gathers decide, and at B the
# instructions are close behind.
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
    o_f, m_f, b_starts, b_ends = runs(ends_ptr, d_sae, FEATURES)
    p_out = o_f[:, None] * d + o_c[None, :]
    m_out = m_f[:, None] & m_c[None, :]
    b_sum = sum_runs(
        order_ptr, tokens_ptr, weights_ptr, rows_ptr, partial_ptr, b_starts, b_ends, piece, d, o_c, m_c,
        FEATURES, ROWS, COLUMNS,
    )  # fmt: skip
    tl.store(out_ptr + p_out, b_sum.to(out_ptr.dtype.element_ty), mask=m_out)
    if TABLES == 2:
        b_sum = sum_runs(
            order_ptr, tokens_ptr, weights2_ptr, rows2_ptr, partial2_ptr, b_starts, b_ends, piece, d, o_c, m_c,
            FEATURES, ROWS, COLUMNS,
        )  # fmt: skip
        tl.store(out2_ptr + p_out, b_sum.to(out2_ptr.dtype.element_ty), mask=m_out)


# Of sorted keys, feature + group * (d_sae + 1): for each pair its place in its group's order and its token, and for
# each group and feature where its run ends before, ends[group, f] = the number of the group's keys below f.
#
# A program: BLOCK pairs, and BLOCK ends, each by a bisection of all keys. Bytes: 24 a pair; 8 an end written, and about
# 20 loads from L2. Floor: the bytes; TopK A 2, B 4, C 5 us.
@jit
def _runs_of(
    keys_ptr,
    order_ptr,
    own_ptr,
    tokens_ptr,
    ends_ptr,
    pairs: tl.int64,
    features: tl.int32,
    groups: tl.int32,
    k: tl.int32,
    steps: tl.int32,
    first1: tl.int64,
    first2: tl.int64,
    BLOCK: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < pairs
    # [BLOCK]
    b_order = tl.load(order_ptr + o_p, mask=m_p, other=0)
    b_order -= tl.where(o_p >= first2, first2, tl.where(o_p >= first1, first1, 0))
    tl.store(own_ptr + o_p, b_order, mask=m_p)
    tl.store(tokens_ptr + o_p, b_order // k, mask=m_p)
    m_f = o_p < groups * features.to(tl.int64)
    # Invariant: keys before `b_low` are below the bound, keys from `b_high` on are not.
    b_low, b_high = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64) + pairs
    for _ in range(steps):
        b_middle = (b_low + b_high) // 2
        # [BLOCK]
        b_keys = tl.load(keys_ptr + b_middle, mask=m_f & (b_low < b_high), other=0)
        m_below = (b_keys.to(tl.int64) < o_p) & (b_low < b_high)
        b_low, b_high = tl.where(m_below, b_middle + 1, b_low), tl.where(m_below, b_high, b_middle)
    b_group = o_p // features
    b_low -= tl.where(b_group == 2, first2, tl.where(b_group == 1, first1, 0))
    tl.store(ends_ptr + o_p, b_low, mask=m_f)


class Tile(NamedTuple):
    """What a program handles at a time, and its warps."""

    features: int
    rows: int
    columns: int
    warps: int


# Narrowest first; `fitting` chooses by the width of a row.
SUM_TILES = [Tile(1, 8, 128, 1), Tile(1, 4, 512, 2)]
_PIECE_TILES = [Tile(1, 32, 128, 4), Tile(1, 8, 512, 4)]
# For widths that are no multiple of 16 bytes: b_enc, whose rows have one column, and what tests try.
SCALAR_SUM_TILES = [Tile(128, 8, 1, 4), Tile(16, 4, 16, 4), Tile(1, 4, 128, 1)]
_SCALAR_PIECE_TILES = [Tile(1, 64, 1, 2), Tile(1, 64, 16, 4), Tile(1, 32, 128, 8)]


def fitting(tiles: list[Tile], columns: int) -> Tile:
    """The narrowest tile that holds so many columns, or else the widest."""
    return next((tile for tile in tiles if tile.columns >= columns), tiles[-1])


PAIRS = {"order_ptr": torch.int64, "tokens_ptr": torch.int64, "ends_ptr": torch.int64}


def gradient_types(rows: torch.dtype, number: str = "") -> dict[str, torch.dtype]:
    """Names and dtypes of the arguments that hold a factored gradient. number: "2" for the second table."""
    names = {"weights": torch.float32, "rows": rows, "partial": torch.float32}
    return {f"{name}{number}_ptr": dtype for name, dtype in names.items()}


def _pieces_variant(rows: torch.dtype, unit: int, tables: int, tile: Tile) -> Variant:
    tensors = {**PAIRS, **gradient_types(rows), **gradient_types(rows, "2")}
    constants = {"UNIT": unit, "TABLES": tables, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return Variant(_pieces, tensors, constants, num_warps=tile.warps, num_stages=1)


def _feature_sum_variant(rows: torch.dtype, unit: int, tables: int, tile: Tile) -> Variant:
    tensors = {**PAIRS, **gradient_types(rows), "out_ptr": rows, **gradient_types(rows, "2"), "out2_ptr": rows}
    constants = {"UNIT": unit, "TABLES": tables, "FEATURES": tile.features, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return Variant(_feature_sum, tensors, constants, num_warps=tile.warps, num_stages=1)


_RUNS_OF = Variant(
    _runs_of,
    {"keys_ptr": torch.int32, "order_ptr": torch.int64}
    | dict.fromkeys(("own_ptr", "tokens_ptr", "ends_ptr"), torch.int64),
    {"BLOCK": 256},
    num_warps=4,
    num_stages=1,
)
MOST_GROUPS = 3  # that `_runs_of` takes


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    found = []
    for rows in FLOATS:
        unit, _ = vector_units(rows)
        for tables in (1, 2):
            found += [_pieces_variant(rows, unit, tables, tile) for tile in _PIECE_TILES]
            found += [_feature_sum_variant(rows, unit, tables, tile) for tile in SUM_TILES]
    found += [_pieces_variant(torch.float32, 1, 1, tile) for tile in _SCALAR_PIECE_TILES]
    found += [_feature_sum_variant(torch.float32, 1, 1, tile) for tile in SCALAR_SUM_TILES]
    return [*found, _RUNS_OF]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    if variant.kernel is _runs_of:
        return []
    fewest, most = (8, 32) if variant.kernel is _pieces else (2, 8)
    return other_forms(variant, (256, 512, 1024), (32,), fewest, most)


def other_forms(
    variant: Variant, widths: tuple[int, ...], elements: tuple[int, ...], fewest: int, most: int
) -> list[Variant]:
    """Forms with COLUMNS in `widths`, `fewest` to `most` ROWS, and a number of elements a thread in `elements`."""
    if variant.constants["UNIT"] == 1:
        return []
    found = []
    for width in widths:
        for warps in (1, 2, 4, 8, 16):
            # More elements a thread are more loads in flight; at most 16 columns a thread fit the registers.
            for per_thread in elements:
                rows = per_thread * 32 * warps // width
                if fewest <= rows <= most and width <= 512 * warps:
                    constants = {**variant.constants, "ROWS": rows, "COLUMNS": width}
                    found.append(variant._replace(constants=constants, num_warps=warps))
    return [other for other in found if other != variant]


def sort_pairs(features: Tensor, tokens: Tensor, d_sae: int) -> Pairs:
    """Sort pairs by feature, stably: one run per feature.

    features, tokens [P] int64. A pair whose feature is outside of [0, d_sae) is inactive and comes last. Cost on a GPU:
    a radix sort of 32-bit keys, 4 passes of 24 bytes a pair, and a bisection of the sorted keys for each feature.
    """
    keys = torch.where((features >= 0) & (features < d_sae), features, d_sae).to(torch.int32)
    keys, order = keys.sort(stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=keys.device)
    return Pairs(order, tokens[order], torch.searchsorted(keys, bounds))


def sort_codes(features: list[Tensor], groups: list[list[int]], d_sae: int) -> list[Pairs]:
    """The pairs of several groups of codes, each sorted as by `sort_pairs`, in one sort of all.

    features: of each code, [n, k] int64, from 0 to d_sae; d_sae for a pair that is inactive. groups: for each result,
    the codes that it is of, by their numbers; tokens are counted through them.
    """
    widths = {of.shape[1] for of in features}
    sizes = [sum(features[code].numel() for code in codes) for codes in groups]
    each = d_sae + 1
    if len(widths) != 1 or not 0 < len(groups) <= MOST_GROUPS or len(groups) * each >= 2**31 or not sum(sizes):
        return [sort_pairs(*given, d_sae) for given in given_pairs(features, groups)]
    (k,) = widths
    # A group's keys lie above those of the group before.
    parts = [(features[code], number * each) for number, codes in enumerate(groups) for code in codes]
    if len(parts) == 1:
        keys = parts[0][0].to(torch.int32).reshape(-1)
    else:
        keys = torch.empty(sum(sizes), dtype=torch.int32, device=features[0].device)
        places = keys.split([of.numel() for of, _ in parts])
        above = torch._foreach_add([of for of, _ in parts], [number for _, number in parts])
        torch._foreach_copy_([place.view(of.shape) for place, of in zip(places, above, strict=True)], above)
    keys, order = keys.sort(stable=True)
    own, tokens = torch.empty_like(order), torch.empty_like(order)
    ends = order.new_empty(len(groups), each)
    firsts = [sum(sizes[:number]) for number in range(len(groups))]
    grid = (triton.cdiv(max(sum(sizes), ends.numel()), _RUNS_OF.constants["BLOCK"]),)
    nowhere = 2**62
    given = keys, order, own, tokens, ends, sum(sizes), each, len(groups), k, sum(sizes).bit_length()
    _RUNS_OF.launch(grid, *given, *[*firsts[1:], nowhere, nowhere][:2])
    split = zip(own.split(sizes), tokens.split(sizes), ends.unbind(), strict=True)
    return [Pairs(*of_group) for of_group in split]


def feature_sums(pairs: Pairs, weights: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    """For each table i: out[f] = sum over the pairs p of feature f of weights[i][p] * rows[i][tokens[p]].

    weights: [P] each, in the order in which the pairs were given, not the sorted one. rows: [N, d] each, of any widths.
    Returns [d_sae, d] each, in the dtype of its rows; zeros for a feature without pairs.

    Neighbours in the list with rows of one shape and dtype are summed by one launch. Memory beside the results: the
    smaller of PARTIAL_BYTES a table and 8 d / MIN_PIECE bytes a pair.
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


def _sum_together(pairs: Pairs, given: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The sums of one table, or of two with rows of one shape and dtype."""
    d_sae, d = pairs.ends.shape[0] - 1, given[0][1].shape[1]
    dtype = given[0][1].dtype
    if d_sae == 0 or d == 0:
        return [rows.new_zeros(d_sae, d) for _, rows in given]
    gradients, piece, unit = gradient_tensors(pairs, given)
    outs = [gradients[1].new_empty(d_sae, d) for _ in given]
    tiles = SUM_TILES if unit > 1 else SCALAR_SUM_TILES
    variant = _feature_sum_variant(outs[0].dtype, unit, len(given), fitting(tiles, d))
    variant = tuning.best(variant, outs[0].device)
    grid = (triton.cdiv(d_sae, variant.constants["FEATURES"]), triton.cdiv(d, variant.constants["COLUMNS"]))
    first, second = (*gradients[:3], outs[0]), (*gradients[-3:], outs[-1])
    variant.launch(grid, *pairs, *first, *second, d_sae, d // unit, piece)
    return [out.to(dtype) for out in outs]


def gradient_tensors(pairs: Pairs, given: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], int, int]:
    """What the kernels read of one table, or of two with rows of one shape and dtype.

    given: (weights [P], rows [N, d]) of each table. Returns [weights, rows, partial sums of long runs] of each table in
    one list; the length of a piece; and the unit of the rows. Rows whose width is no multiple of 16 bytes are widened
    to float32, so that fewer forms are compiled; models have no such widths.
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
        variant = _pieces_variant(gradients[1].dtype, unit, len(given), fitting(tiles, d))
        variant = tuning.best(variant, partial.device)
        grid = (slots, triton.cdiv(d, variant.constants["COLUMNS"]))
        d_sae = pairs.ends.shape[0] - 1
        variant.launch(grid, *pairs, *gradients[:3], *gradients[-3:], d_sae, d // unit, piece)
    return gradients, piece, unit
