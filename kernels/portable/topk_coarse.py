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

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cpu

# Below, rounding W_enc costs more than the product saves.
LEAST_ROWS, LEAST_WIDTH = 256, 128
# Above, lengths that are added up in four lanes of float32 may be off by more than the bound has room for.
MOST_WIDTH = 1 << 16
# What is beside a row's numbers, and what is then filled up with zeros: what the units multiply at once.
BESIDE, AT_ONCE = 4, 32
# Which of a sample's bounds is taken for a likely threshold (the larger, the less it depends on chance), and for how
# many candidates a feature of the sample stands.
SAMPLE_RANK, CANDIDATES_PER_SAMPLED = 14, 6
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
    known = W_enc.dtype in (torch.float32, torch.bfloat16) and W_enc.device.type == "cpu"
    large = LEAST_WIDTH <= d_in <= MOST_WIDTH and d_sae >= LEAST_COLUMNS_PER_CANDIDATE * candidates(k)
    return known and large and cpu.has_matrix_units()


class Table(NamedTuple):
    """Rows of W_enc, rounded, and wider."""

    rows: cpu.PairedRows
    """[m, width(d_in)]"""
    longest: Tensor
    """scalar: the length of the longest"""


def width(d_in: int) -> int:
    """Of the rows that are multiplied."""
    return -(-(d_in + BESIDE) // AT_ONCE) * AT_ONCE


def rounded(W_enc: Tensor, bias: Tensor) -> Table:
    """W_enc [d_sae, d_in] float32 or bfloat16, rows contiguous, bias [d_sae] float32 -> `Table`."""
    pairs = cpu.paired_room(W_enc.shape[0], width(W_enc.shape[1]))
    longest = [tile.longest for tile in _rounded_by_tile(W_enc, bias, pairs.split(_tile_rows(W_enc) // cpu.BLOCK))]
    return Table(cpu.PairedRows(pairs, W_enc.shape[0]), torch.stack(longest).max())


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
    out = _room_for(n, d_in)
    lengths, errors = _round(x, out[:, :d_in])
    out[:, d_in : d_in + 2] = 1
    out[:, d_in + 2] = (errors + _sums(d_in) * lengths) * ABOVE
    out[:, d_in + 3] = (lengths + errors) * ABOVE
    return out, lengths


def _round(rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """rows [m, d_in] into `out`, bfloat16; the lengths of the rows and of what they lost, [m] float32.

    Both are too large by a share that their own rounding to bfloat16 doesn't take away.
    """
    if rows.dtype == torch.bfloat16:
        out.copy_(rows)
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        errors = torch.zeros_like(lengths)
    else:
        _, lengths, errors = cpu.round_rows(rows, out)
    unseen = math.sqrt(rows.shape[1]) * 2.0**-62  # squares below 2^-126 are lost
    return lengths.add_(unseen).mul_(ABOVE), errors.add_(unseen).mul_(ABOVE)


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
    table: Table | None = None,
) -> Tensor:
    """x [rows, d_in], bias [d_sae] float32, W_enc [d_sae, d_in] float32 or bfloat16 -> values, indices [rows, k].

    table: W_enc rounded; a tile at a time is, if not given.
    Gives settled [rows] bool, False where values and indices hold nothing.
    """
    if table is None:
        room = cpu.paired_room(min(W_enc.shape[0], _tile_rows(W_enc)), width(W_enc.shape[1]))
        tiles = _rounded_by_tile(W_enc, bias, itertools.repeat(room))
    else:
        tiles = iter([table])
    best = cpu.topk_start(x.shape[0], W_enc.shape[0], candidates(k))
    acts, lengths = rounded_acts(x)
    best.threshold.copy_(_likely_threshold(acts, W_enc, bias, k))
    first, longest = 0, x.new_zeros(())
    for rows, longest_here in tiles:
        cpu.topk_add_products(best, acts, rows, first)
        first, longest = first + rows.n, torch.maximum(longest, longest_here)  # NaN, if one is there
    settled = cpu.topk_settle(best, k, x, W_enc, bias, values, indices)[2]
    return settled & (lengths * longest < TOO_LONG)


def _likely_threshold(acts: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Tensor:
    """acts [rows, width(d_in)] -> [rows] float32: a bound that about 2.3 candidates(k) of all features reach.

    It is the one that SAMPLE_RANK features of a sample reach. The result does not depend on which ones: features whose
    bounds are below are no candidates, and a row that would need one of them is left unsettled. Were the sample drawn
    at random, fewer than 1.4 k would reach it in 1 of 10^7 rows for k = 32, in 5 of 10^5 for k = 512.
    """
    every = max(1, candidates(k) // CANDIDATES_PER_SAMPLED)
    sample = W_enc[::every].contiguous()
    m, d_in = sample.shape
    table = _rounded(sample, in_two(bias[::every], d_in), _room_for(m, d_in), cpu.paired_room(m, width(d_in)))
    best = cpu.topk_start(acts.shape[0], m, min(SAMPLE_RANK, m))
    cpu.topk_add_products(best, acts, table.rows, 0)
    return cpu.topk_finish(best)[0][:, -1]


def _tile_rows(W_enc: Tensor) -> int:
    """How many rows of W_enc a tile has."""
    return max(LEAST_TILE_ROWS, TILE_BYTES // (2 * width(W_enc.shape[1])) // cpu.BLOCK * cpu.BLOCK)


def _rounded_by_tile(W_enc: Tensor, bias: Tensor, rooms: Iterable[Tensor]) -> Iterator[Table]:
    """So many rows of W_enc at a time, each in the next of the rooms."""
    d_in, size = W_enc.shape[1], _tile_rows(W_enc)
    bias, here = in_two(bias, d_in), _room_for(min(size, W_enc.shape[0]), d_in)
    for W, bias_here, room in zip(W_enc.split(size), bias.split(size), rooms, strict=False):
        yield _rounded(W, bias_here, here[: len(W)], room[: -(-len(W) // cpu.BLOCK)])


def _rounded(W: Tensor, bias: Tensor, rows: Tensor, room: Tensor) -> Table:
    """W [m, d_in], bias [m, 2] of `in_two` -> `Table`, in `room`, by way of rows, a `_room_for` it."""
    d_in = W.shape[1]
    lengths, errors = _round(W, rows[:, :d_in])
    rows[:, d_in : d_in + 2] = bias
    rows[:, d_in + 2] = lengths
    rows[:, d_in + 3] = errors
    return Table(cpu.pair_rows(rows, room), lengths.max())


def _room_for(m: int, d_in: int) -> Tensor:
    """[m, width(d_in)] bfloat16, zero from column d_in on; what is beside the numbers of rounded rows stays so."""
    room = cpu.fresh((m, width(d_in)), torch.bfloat16)
    room[:, d_in:] = 0
    return room
