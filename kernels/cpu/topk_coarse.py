"""Encode and select on a CPU that multiplies bfloat16 matrices faster than float32 ones (AMX, AVX512-BF16).

A product of rounded numbers gives an upper bound for each pre-activation. The features with the largest ones are
multiplied again in float32, until the next bound is below the k-th largest: that proves that no other feature is among
the k largest. So the result is that of a product in float32, and the large product costs what it costs in bfloat16.
Where nothing is proven, the caller multiplies the row in float32.

With dx = x - bf16(x) and dw likewise, what the inputs lose (Cauchy-Schwarz), and what sums in float32 may lose in two
orders, a pre-activation is at most

    <bf16(x), bf16(w)> + b + (|dx| + 2^-22 d |x|) |w| + |bf16(x)| |dw|

which is itself a product, of rows that are four numbers wider:

    bf16(x) | 1 | 1 | |dx| + 2^-22 d |x| | |bf16(x)|
    bf16(w) | b in two parts | |w|       | |dw|

All lengths are measured and rounded up. A feature with a long row makes only its own bound a loose one. For numbers
that look random a bound is about |x| |w| / 280 above the pre-activation: of 18,432 random features, the 43 largest
bounds reach the 32nd largest pre-activation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import library
from .arguments import STORED
from .memory import fresh
from .round_rows import BESIDE, BLOCK, PairedRows, paired_room, round_pairs, round_rows
from .topk_rows import Best, topk_add_products, topk_finish, topk_settle, topk_start

# With fewer rows, or narrower ones, rounding W_enc costs more than the product saves.
LEAST_ROWS, LEAST_WIDTH = 256, 128
# In wider rows the error of a length, summed in float32, may exceed what the bound allows for.
MOST_WIDTH = 1 << 16
# Rows are padded with zeros to a multiple of what the units multiply at once.
AT_ONCE = 32
# A row's threshold is the SAMPLE_RANK-th largest bound in a sample of the features; a larger rank depends less on
# chance. The sample has one feature for each CANDIDATES_PER_SAMPLED candidates.
SAMPLE_RANK, CANDIDATES_PER_SAMPLED = 14, 6
# With fewer rows, finding a threshold first costs more than it saves.
LEAST_SAMPLED = 768
# A second search, of rows that changed a little: re-measure every 8th row, as the RANK_OF_MOVED-th largest bound in the
# sample, take the 25th percentile of how its threshold moved, and scale all thresholds by that.
EVERY_ROW, RANK_OF_MOVED, MOVED_QUANTILE = 8, 9, 0.25
# W_enc is rounded a tile at a time, and multiplied while the tile is in cache. Fewer rows are not worth a call.
TILE_BYTES, LEAST_TILE_ROWS = 5 << 19, 512
# Lengths are exact to 2^-10, and rounded to 8 bits: times this they are upper bounds.
ABOVE = 1 + 2.0**-7
# Larger biases and products of lengths may overflow in a sum.
TOO_LONG = 2.0**100
# Lists this long settle all but a few rows in 10,000 while an SAE trains; one row left costs all of W_enc once more.
MORE_CANDIDATES = 64
LEAST_COLUMNS_PER_CANDIDATE = 16


def candidates(k: int) -> int:
    """Candidates of a row, found in bfloat16."""
    return 2 * k + MORE_CANDIDATES


def possible(W_enc: Tensor) -> bool:
    """Whether this CPU gains by products in bfloat16 of rows so wide, W_enc being [d_sae, d_in]."""
    return W_enc.dtype in STORED and LEAST_WIDTH <= W_enc.shape[1] <= MOST_WIDTH and library.multiplies_bfloat16()


def worthwhile(W_enc: Tensor, k: int) -> bool:
    """Whether this is a gain for LEAST_ROWS or more."""
    return len(W_enc) >= LEAST_COLUMNS_PER_CANDIDATE * candidates(k) and possible(W_enc)


def width(d_in: int) -> int:
    """The width of a rounded row: its numbers, BESIDE more, and padding."""
    return -(-(d_in + BESIDE) // AT_ONCE) * AT_ONCE


def rounded(W_enc: Tensor, bias: Tensor, out: Tensor | None = None) -> PairedRows:
    """W_enc [m, d_in] float32 or bfloat16, rows contiguous, bias [m] float32 -> rounded, and wider, [m, width(d_in)].

    In `out`, a `paired_room`, if given.
    """
    m, d_in = W_enc.shape
    out = paired_room(m, width(d_in)) if out is None else out
    return round_pairs(W_enc, in_two(bias, d_in), _unseen(d_in), ABOVE, out)


def like_rounded(W_enc: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised pairs and lengths, of the shapes and dtypes that `rounded` gives."""
    m, d_in = W_enc.shape
    blocks = -(-m // BLOCK)
    pairs = W_enc.new_empty(blocks, width(d_in) // 2, BLOCK, 2, dtype=torch.bfloat16)
    return pairs, W_enc.new_empty(m, dtype=torch.float32)


def in_two(bias: Tensor, d_in: int) -> Tensor:
    """bias [m] float32 -> [m, 2] bfloat16 whose sum is no less than bias, also within a float32 sum of d_in numbers."""
    first = bias.bfloat16().float()
    rest = bias - first + (2.0**-17 + _sums(d_in)) * first.abs()
    # The bound of NaN, and of what may overflow, is infinite: such features are computed again in float32.
    unbounded = ~(bias.abs() < TOO_LONG) & (bias != -torch.inf)
    first = torch.where(unbounded, torch.inf, first)
    return torch.stack([first, torch.where(first.isfinite(), rest, 0)], dim=1).bfloat16()


def rounded_acts(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, d_in] float32, rows contiguous -> the same, rounded and wider, [n, width(d_in)] bfloat16; lengths [n]."""
    n, d_in = x.shape
    out = fresh((n, width(d_in)), torch.bfloat16)
    _, lengths, errors = round_rows(x, out[:, :d_in])
    # Inflate, so that they stay upper bounds after rounding to bfloat16.
    for measured in (lengths, errors):
        measured.add_(_unseen(d_in)).mul_(ABOVE)
    out[:, d_in : d_in + 2] = 1
    out[:, d_in + 2] = (errors + _sums(d_in) * lengths) * ABOVE
    out[:, d_in + 3] = (lengths + errors) * ABOVE
    out[:, d_in + 4 :] = 0
    return out, lengths


def _unseen(d_in: int) -> float:
    """The largest length that is measured as zero: squares below 2^-126 are lost."""
    return math.sqrt(d_in) * 2.0**-62


def _sums(d_in: int) -> float:
    """By how much two float32 sums of a row can differ, relative to the sum of absolute values."""
    return 2.0**-22 * (d_in + BESIDE)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    k: int,
    values: Tensor,
    indices: Tensor,
    table: PairedRows | None = None,
    sample: PairedRows | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [rows, d_in], bias [d_sae] float32, W_enc [d_sae, d_in] float32 or bfloat16 -> values, indices [rows, k].

    Args:
        table: W_enc rounded; without it W_enc is rounded a tile at a time.
        sample: `sample_of` W_enc, to find a threshold by before the search; without it there is none.
        last: what this gave for rows much like these, [2, rows]. The result does not depend on it, only the time.

    Returns:
        settled [rows] bool, False where values and indices hold nothing; and [2, rows] float32: the bound that the last
        candidate of each row reached, and the length of the row.
    """
    acts, lengths = rounded_acts(x)
    threshold = None
    if sample is not None and last is None:
        threshold = _reached(acts, sample, SAMPLE_RANK)
    elif sample is not None and last is not None:
        before = last[0] * (lengths / last[1])
        moved = _reached(acts[::EVERY_ROW], sample, RANK_OF_MOVED) / before[::EVERY_ROW]
        threshold = before * moved.nanquantile(MOVED_QUANTILE)
    settled, bounds = _search(x, acts, lengths, W_enc, bias, k, values, indices, table, threshold)
    if sample is not None and last is not None and not settled.all():
        left = (~settled).nonzero().squeeze(1)
        found, threshold = (values[left], indices[left]), _reached(acts[left], sample, SAMPLE_RANK)
        settled[left], bounds[left] = _search(
            x[left], acts[left], lengths[left], W_enc, bias, k, *found, table, threshold
        )
        values[left], indices[left] = found
    return settled, torch.stack([bounds, lengths])


def _search(
    x: Tensor,
    acts: Tensor,
    lengths: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    k: int,
    values: Tensor,
    indices: Tensor,
    table: PairedRows | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of x, which is rounded in acts, among the features whose bounds are not below threshold [rows].

    Gives settled, and [rows] float32: the bounds that the last candidates reached.
    """
    best = topk_start(x.shape[0], W_enc.shape[0], candidates(k))
    if threshold is not None:
        best.threshold.copy_(threshold)
    longest = add_bounds(best, acts, W_enc, bias, table)
    settled = topk_settle(best, k, x, W_enc, bias, values, indices)[2]
    return settled & (lengths * longest < TOO_LONG), best.threshold


def add_bounds(best: Best, acts: Tensor, W_enc: Tensor, bias: Tensor, table: PairedRows | None) -> Tensor:
    """Add the upper bounds of all features, by their table or a tile at a time. -> the length of the longest row, [].

    acts [rows, width(d_in)]: rounded.
    """
    if table is not None:
        topk_add_products(best, acts, table, 0)
        return table.lengths.max()
    d_sae, d_in = W_enc.shape
    size = max(LEAST_TILE_ROWS, TILE_BYTES // (2 * width(d_in)) // BLOCK * BLOCK)
    room = paired_room(min(size, d_sae), width(d_in))
    first, longest = 0, bias.new_zeros(())
    for W, bias_here in zip(W_enc.split(size), bias.split(size), strict=True):
        tile = rounded(W, bias_here, room[: -(-len(W) // BLOCK)])
        topk_add_products(best, acts, tile, first)
        first, longest = first + len(W), torch.maximum(longest, tile.lengths.max())  # NaN, if one is there
    return longest


def sample_of(W_enc: Tensor, bias: Tensor, k: int) -> PairedRows:
    """Some of the features: SAMPLE_RANK of them reach a bound that about 2.3 candidates(k) of all features reach.

    The result does not depend on which ones: features whose bounds are below are no candidates, and a row that would
    need one of them is left unsettled. Were the sample drawn at random, fewer than 1.4 k would reach that bound in 1 of
    10^7 rows for k = 32, in 5 of 10^5 for k = 512.
    """
    return rounded(W_enc[:: every(k)], bias[:: every(k)])


def every(k: int) -> int:
    """One feature in so many is in the sample."""
    return max(1, candidates(k) // CANDIDATES_PER_SAMPLED)


def _reached(acts: Tensor, sample: PairedRows, rank: int) -> Tensor:
    """acts [rows, width(d_in)] -> [rows] float32: the rank-th largest bound of each row in the sample."""
    m = len(sample.lengths)
    best = topk_start(acts.shape[0], m, min(rank, m))
    topk_add_products(best, acts, sample, 0)
    return topk_finish(best)[0][:, -1]
