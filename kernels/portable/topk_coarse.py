"""Encode and select on a CPU that multiplies bfloat16 matrices several times as fast as float32 ones (AMX).

A product of rounded numbers finds candidates, which are multiplied again in float32, and a bound on the rounding
proves that no other feature could be among the k largest. So the result is that of a product in float32, and the
large product costs what it costs in bfloat16. Where nothing is proven, the caller multiplies the row in float32.

With dx = x - bf16(x) and dw likewise, a pre-activation is off by at most

    |dx| |w| + |bf16(x)| |dw| + 2^-22 d |x| |w|

before the result is rounded: what the inputs lose (Cauchy-Schwarz), and what sums in float32 may lose in two orders.
Lengths are measured, those of w as the largest of all features. For numbers that look random that is about
|x| |w| / 280: of 18,432 random features, 45 can't be told apart from the 32 largest; of those of trained SAEs fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cpu

# Below, rounding W_enc costs more than the product saves.
LEAST_ROWS, LEAST_WIDTH = 256, 128
# Above, lengths that are added up in four lanes of float32 may be off by more than the bound has room for.
MOST_WIDTH = 1 << 16
# Lists this long settle all but a few rows in 10,000 while an SAE trains; one row left costs all of W_enc once more.
MORE_CANDIDATES = 64
LEAST_COLUMNS_PER_CANDIDATE = 16


def candidates(k: int) -> int:
    """How many are found in bfloat16."""
    return 2 * k + MORE_CANDIDATES


def worthwhile(W_enc: Tensor, k: int) -> bool:
    """Whether this is a gain where W_enc [d_sae, d_in] is rounded already, or for LEAST_ROWS."""
    d_sae, d_in = W_enc.shape
    known = W_enc.dtype in (torch.float32, torch.bfloat16) and W_enc.device.type == "cpu" and cpu.available()
    large = LEAST_WIDTH <= d_in <= MOST_WIDTH and d_sae >= LEAST_COLUMNS_PER_CANDIDATE * candidates(k)
    return known and large and has_bfloat16_units()


def has_bfloat16_units() -> bool:
    """Whether torch multiplies bfloat16 matrices by AMX here."""
    supported: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and supported()


class Table(NamedTuple):
    """Rows of W_enc, rounded."""

    rows: Tensor
    """bfloat16"""
    longest: float
    """the length of the longest"""
    most_lost: float
    """the length of what the rounding took, where it took most"""


def rounded(W: Tensor, out: Tensor | None = None) -> Table:
    """W [m, d_in] float32 or bfloat16, rows contiguous -> `Table`, in `out` [m, d_in] if given."""
    if W.dtype == torch.bfloat16:
        return Table(W, float(torch.linalg.vector_norm(W, dim=1, dtype=torch.float32).max()), 0.0)
    rows, lengths, errors = cpu.round_rows(W, out)
    return Table(rows, float(lengths.max()), float(errors.max()))


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
    d_sae, d_in = W_enc.shape
    width = min(columns, d_sae)
    best = cpu.topk_start(x.shape[0], d_sae, candidates(k))
    acts = cpu.round_rows(x)
    tile = torch.empty(x.shape[0] * width, dtype=torch.bfloat16)
    room = torch.empty(width, d_in, dtype=torch.bfloat16) if table is None else None
    longest, most_lost = (0.0, 0.0) if table is None else table[1:]
    for first in range(0, d_sae, columns):
        W = (W_enc if table is None else table.rows)[first : first + columns]
        if room is not None:
            W, longest_here, most_lost_here = rounded(W, room[: len(W)])
            longest, most_lost = max(longest, longest_here), max(most_lost, most_lost_here)
        product = tile[: x.shape[0] * len(W)].view(-1, len(W))
        torch.mm(acts.rows, W.T, out=product)
        cpu.topk_add(best, product, bias[first : first + columns], first)
    return cpu.topk_settle(best, k, x, W_enc, bias, error_bound(acts, longest, most_lost, bias), values, indices)[2]


def error_bound(acts: cpu.Rounded, longest: float, most_lost: float, bias: Tensor) -> Tensor:
    """[rows]: by how much a pre-activation may be off. longest, most_lost: the largest length and error in W_enc."""
    d_in = acts.rows.shape[1]
    lost_squares = math.sqrt(d_in) * 2.0**-62  # of lengths: those below 2^-126
    lengths, errors = acts.lengths + lost_squares, acts.errors + lost_squares
    longest, most_lost = longest + lost_squares, most_lost + lost_squares
    sums = 2.0**-22 * d_in * longest
    # NaN, if one is there, stays one.
    off = errors * longest + (lengths + errors) * most_lost + sums * lengths + 2.0**-22 * cpu.largest_finite(bias)
    return off * (1 + 2.0**-8)
