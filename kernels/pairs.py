"""The gradient of a table of rows in factors, and the table with its Adam moments: what `feature_rows` works on.

The gradient of a table [d_sae, d] (W_enc, W_dec, W_mem; b_enc is one with d = 1 and rows of ones) is

    gradient[f] = sum over the pairs p with feature f of weights[p] * rows[tokens[p]]

P pairs with a weight each, and N rows, take far less room than [d_sae, d].
"""

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """P pairs (feature, token), sorted by feature; equal features in the order given.

    A pair whose feature is outside of [0, d_sae) comes last and belongs to no feature: callers use d_sae for a pair
    that is inactive.
    """

    order: Tensor
    """[P] int64: which of the pairs given comes at each place."""
    tokens: Tensor
    """[P] int64: its token, in that order."""
    ends: Tensor
    """[d_sae + 1] int64: the pairs of feature f are at ends[f] to ends[f + 1] - 1; ends[0] is 0."""


class Table(NamedTuple):
    """A table of rows, its moments, and its gradient in factors."""

    param: Tensor
    """[d_sae, d] float32; updated in place."""
    exp_avg: Tensor
    """[d_sae, d] float32, or bfloat16, which is rounded stochastically; updated in place."""
    exp_avg_sq: Tensor
    """[d_sae, d], dtype as exp_avg; updated in place."""
    weights: Tensor
    """[P] float32, in the order in which the pairs were given, not in the sorted one."""
    rows: Tensor
    """[N, d] float32, bfloat16 or float16."""
    unit_rows: bool
    """Rows of param have norm 1: the gradient's part along them is taken out, and they are normalised after."""
