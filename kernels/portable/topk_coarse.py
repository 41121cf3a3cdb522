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

import torch
from torch import Tensor

from .. import cpu

# Below, rounding W_enc costs more than the product saves.
LEAST_ROWS, LEAST_WIDTH = 256, 128
# Lists this long settle 999 rows of 1000 of trained SAEs; a row costs a comparison of each with each.
MORE_CANDIDATES = 32
LEAST_COLUMNS_PER_CANDIDATE = 16


def candidates(k: int) -> int:
    """How many are found in bfloat16."""
    return 2 * k + MORE_CANDIDATES


def worthwhile(x: Tensor, W_enc: Tensor, k: int) -> bool:
    """Whether this is a gain for x [n, d_in]. The native library is there."""
    n, d_in = x.shape
    large = n >= LEAST_ROWS and d_in >= LEAST_WIDTH
    return large and W_enc.shape[0] >= LEAST_COLUMNS_PER_CANDIDATE * candidates(k) and has_bfloat16_units()


def has_bfloat16_units() -> bool:
    """Whether torch multiplies bfloat16 matrices by AMX here."""
    supported: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and supported()


def topk_encode(
    x: Tensor, W_enc: Tensor, bias: Tensor, k: int, columns: int, values: Tensor, indices: Tensor
) -> Tensor:
    """x [rows, d_in] float32, W_enc [d_sae, d_in] float32 or bfloat16, bias [d_sae] float32, into
    values and indices [rows, k].

    columns: of a tile. Gives settled [rows] bool, False where values and indices hold nothing.
    """
    d_sae, d_in = W_enc.shape
    best = cpu.topk_start(x.shape[0], d_sae, candidates(k))
    acts = cpu.round_rows(x)
    tile = torch.empty(x.shape[0] * min(columns, d_sae), dtype=torch.bfloat16)
    rounded = torch.empty(min(columns, d_sae), d_in, dtype=torch.bfloat16)
    longest = most_lost = 0.0
    for first in range(0, d_sae, columns):
        W = W_enc[first : first + columns]
        if W.dtype == torch.float32:
            here = cpu.round_rows(W, rounded[: len(W)])
            longest, most_lost = max(longest, float(here.lengths.max())), max(most_lost, float(here.errors.max()))
            W = here.rows
        else:
            longest = max(longest, float(torch.linalg.vector_norm(W, dim=1, dtype=torch.float32).max()))
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
    off = errors * longest + (lengths + errors) * most_lost + sums * lengths + 2.0**-22 * bias.abs().max()
    return off * (1 + 2.0**-8)
