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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cpu

# Below, rounding W_enc costs more than the product saves.
LEAST_ROWS, LEAST_WIDTH = 256, 128
# Above, lengths that are added up in four lanes of float32 may be off by more than the bound has room for.
MOST_WIDTH = 1 << 16
# What is beside a row's numbers, and what is then filled up with zeros: what the units multiply at once. (In
# oneDNN 3.12, what lies between rows of another width gets into the product.)
BESIDE, AT_ONCE = 4, 32
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
    known = W_enc.dtype in (torch.float32, torch.bfloat16) and W_enc.device.type == "cpu" and cpu.available()
    large = LEAST_WIDTH <= d_in <= MOST_WIDTH and d_sae >= LEAST_COLUMNS_PER_CANDIDATE * candidates(k)
    return known and large and has_bfloat16_units()


def has_bfloat16_units() -> bool:
    """Whether torch multiplies bfloat16 matrices by AMX here."""
    supported: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and supported()


class Table(NamedTuple):
    """Rows of W_enc, rounded, and wider."""

    rows: Tensor
    """[m, width(d_in)] bfloat16"""
    longest: Tensor
    """scalar: the length of the longest"""


def width(d_in: int) -> int:
    """Of the rows that are multiplied."""
    return -(-(d_in + BESIDE) // AT_ONCE) * AT_ONCE


def room_for(m: int, d_in: int) -> Tensor:
    """[m, width(d_in)] bfloat16, zero from column d_in on; what is beside `rounded` rows stays so."""
    room = cpu.fresh((m, width(d_in)), torch.bfloat16)
    room[:, d_in:] = 0
    return room


def rounded(W: Tensor, bias: Tensor, out: Tensor) -> Table:
    """W [m, d_in] float32 or bfloat16, rows contiguous -> `Table`, in `out`, a `room_for` it. bias: of `in_two`."""
    d_in = W.shape[1]
    lengths, errors = _round(W, out[:, :d_in])
    out[:, d_in : d_in + 2] = bias
    out[:, d_in + 2] = lengths
    out[:, d_in + 3] = errors
    return Table(out, lengths.max())


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
    out = room_for(n, d_in)
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
    columns: int,
    values: Tensor,
    indices: Tensor,
    table: Table | None = None,
) -> Tensor:
    """x [rows, d_in], bias [d_sae] float32, W_enc [d_sae, d_in] float32 or bfloat16 -> values, indices [rows, k].

    columns: of a tile. table: W_enc rounded; a tile at a time is, if not given.
    Gives settled [rows] bool, False where values and indices hold nothing.
    """
    d_sae = W_enc.shape[0]
    columns = min(columns, d_sae)
    if table is None:
        tiles = _rounded_by_tile(W_enc, bias, columns)
    else:
        tiles = (Table(rows, table.longest) for rows in table.rows.split(columns))
    best = cpu.topk_start(x.shape[0], d_sae, candidates(k))
    acts, lengths = rounded_acts(x)
    product = torch.empty(x.shape[0] * columns, dtype=torch.bfloat16)
    first, longest = 0, x.new_zeros(())
    for rows, longest_here in tiles:
        bounds = product[: x.shape[0] * len(rows)].view(-1, len(rows))
        torch.mm(acts, rows.T, out=bounds)
        cpu.topk_add_bounds(best, bounds, first)
        first, longest = first + len(rows), torch.maximum(longest, longest_here)  # NaN, if one is there
    settled = cpu.topk_settle(best, k, x, W_enc, bias, values, indices)[2]
    return settled & (lengths * longest < TOO_LONG)


def _rounded_by_tile(W_enc: Tensor, bias: Tensor, columns: int) -> Iterator[Table]:
    """So many rows of W_enc at a time, each in the place of the ones before."""
    d_in = W_enc.shape[1]
    bias, room = in_two(bias, d_in), room_for(columns, d_in)
    for W, bias_here in zip(W_enc.split(columns), bias.split(columns), strict=True):
        yield rounded(W, bias_here, room[: len(W)])
