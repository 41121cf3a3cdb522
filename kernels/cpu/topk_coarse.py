"""Encode and select on a CPU that multiplies bfloat16 matrices several times as fast as float32 ones (AMX).

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
from .topk_rows import topk_add_products, topk_finish, topk_settle, topk_start

# Below, rounding W_enc costs more than the product saves.
LEAST_ROWS, LEAST_WIDTH = 256, 128
# Above, lengths that are added up in four lanes of float32 may be off by more than the bound has room for.
MOST_WIDTH = 1 << 16
# A row is filled up with zeros to a multiple of what the units multiply at once.
AT_ONCE = 32
# Which of a sample's bounds is taken for a likely threshold (the larger, the less it depends on chance), and for how
# many candidates a feature of the sample stands.
SAMPLE_RANK, CANDIDATES_PER_SAMPLED = 14, 6
# For fewer rows, looking for a threshold first costs more than it saves.
LEAST_SAMPLED = 768
# When rows are searched again after a little has changed: the threshold of every EVERY_ROW-th row is measured again, as
# the bound that RANK_OF_MOVED features of the sample reach. All thresholds are scaled by this quantile of the ratios.
EVERY_ROW, RANK_OF_MOVED, MOVED_QUANTILE = 8, 9, 0.25
# So much of W_enc is rounded at a time, and multiplied while it is in cache; but rows enough to be worth a call.
TILE_BYTES, LEAST_TILE_ROWS = 5 << 19, 512
# Lengths are measured to one part in 2^10, and then rounded to 8 bits.
ABOVE = 1 + 2.0**-7
# Products of lengths, and biases, beyond that may overflow when they are added up.
TOO_LONG = 2.0**100
# Lists this long settle all but a few rows in 10,000 while an SAE trains; one row left costs all of W_enc once more.
MORE_CANDIDATES = 64
LEAST_COLUMNS_PER_CANDIDATE = 16


def candidates(k: int) -> int:
    """How many are found in bfloat16."""
    return 2 * k + MORE_CANDIDATES


def worthwhile(W_enc: Tensor, k: int) -> bool:
    """Whether this is a gain for LEAST_ROWS or more, W_enc being [d_sae, d_in]."""
    d_sae, d_in = W_enc.shape
    large = LEAST_WIDTH <= d_in <= MOST_WIDTH and d_sae >= LEAST_COLUMNS_PER_CANDIDATE * candidates(k)
    return W_enc.dtype in STORED and large and library.has_matrix_units()


def width(d_in: int) -> int:
    """Of the rows that are multiplied."""
    return -(-(d_in + BESIDE) // AT_ONCE) * AT_ONCE


def rounded(W_enc: Tensor, bias: Tensor, out: Tensor | None = None) -> PairedRows:
    """W_enc [m, d_in] float32 or bfloat16, rows contiguous, bias [m] float32 -> rounded, and wider, [m, width(d_in)].

    In `out`, a `paired_room`, if given.
    """
    m, d_in = W_enc.shape
    out = paired_room(m, width(d_in)) if out is None else out
    return round_pairs(W_enc, in_two(bias, d_in), _unseen(d_in), ABOVE, out)


def like_rounded(W_enc: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs and lengths that `rounded` gives, of that shape and dtype, nothing written yet."""
    m, d_in = W_enc.shape
    blocks = -(-m // BLOCK)
    pairs = W_enc.new_empty(blocks, width(d_in) // 2, BLOCK, 2, dtype=torch.bfloat16)
    return pairs, W_enc.new_empty(m, dtype=torch.float32)


def in_two(bias: Tensor, d_in: int) -> Tensor:
    """bias [m] float32 -> [m, 2] bfloat16 that add up to no less, whatever sums of d_in numbers lose of them."""
    first = bias.bfloat16().float()
    rest = bias - first + (2.0**-17 + _sums(d_in)) * first.abs()
    # NaN and what may overflow have no other bound; they are looked at in float32.
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
    """How long a row may be of which nothing is measured: squares below 2^-126 are lost."""
    return math.sqrt(d_in) * 2.0**-62


def _sums(d_in: int) -> float:
    """What two sums of a row's numbers differ by, as a share of what the numbers come to."""
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
    d_sae, d_in = W_enc.shape
    best = topk_start(x.shape[0], d_sae, candidates(k))
    if threshold is not None:
        best.threshold.copy_(threshold)
    if table is not None:
        topk_add_products(best, acts, table, 0)
        longest = table.lengths.max()
    else:
        size = max(LEAST_TILE_ROWS, TILE_BYTES // (2 * width(d_in)) // BLOCK * BLOCK)
        room = paired_room(min(size, d_sae), width(d_in))
        first, longest = 0, x.new_zeros(())
        for W, bias_here in zip(W_enc.split(size), bias.split(size), strict=True):
            tile = rounded(W, bias_here, room[: -(-len(W) // BLOCK)])
            topk_add_products(best, acts, tile, first)
            first, longest = first + len(W), torch.maximum(longest, tile.lengths.max())  # NaN, if one is there
    settled = topk_settle(best, k, x, W_enc, bias, values, indices)[2]
    return settled & (lengths * longest < TOO_LONG), best.threshold


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
    """acts [rows, width(d_in)] -> [rows] float32: the bound that so many features of the sample reach."""
    m = len(sample.lengths)
    best = topk_start(acts.shape[0], m, min(rank, m))
    topk_add_products(best, acts, sample, 0)
    return topk_finish(best)[0][:, -1]
