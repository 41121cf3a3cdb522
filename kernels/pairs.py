"""Factored gradients of tables of rows, and the tables with their Adam moments: the data of `feature_rows`.

The gradient of a table [d_sae, d] (W_enc, W_dec, W_mem; or b_enc, with d = 1 and rows of ones) is

    gradient[f] = sum over the pairs p with feature f of weights[p] * rows[tokens[p]]

It is kept as factors, P pairs with a weight each and N rows, which take far less memory than [d_sae, d].
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """P pairs (feature, token), sorted by feature; pairs of one feature keep the order in which they were given.

    This is a CSR matrix [d_sae, N]: tokens are the column indices, ends is the indptr. Pairs whose feature is outside
    of [0, d_sae) are inactive: they come last and belong to no feature. Callers mark them by the feature d_sae.
    """

    order: Tensor
    """[P] int64: the place of each sorted pair among the pairs as given."""
    tokens: Tensor
    """[P] int64: the token of each sorted pair (CSR column indices)."""
    ends: Tensor
    """[d_sae + 1] int64 (CSR indptr): the pairs of feature f are at ends[f] to ends[f + 1] - 1; ends[0] is 0."""


class Table(NamedTuple):
    """A table of rows, its Adam moments, and its factored gradient."""

    param: Tensor
    """[d_sae, d] float32; updated in place."""
    exp_avg: Tensor
    """[d_sae, d] float32, or bfloat16 with stochastic rounding; updated in place."""
    exp_avg_sq: Tensor
    """[d_sae, d], dtype as exp_avg; updated in place."""
    weights: Tensor
    """[P] float32, in the order in which the pairs were given, not the sorted one."""
    rows: Tensor
    """[N, d] float32, bfloat16 or float16."""
    unit_rows: bool
    """Rows of param have norm 1. The gradient is projected to be orthogonal to its row; rows are normalised after."""
    rounded: Tensor | None = None
    """[d_sae, d] bfloat16: where the rows of param that were updated are written too, rounded; None for nowhere."""


def given_pairs(features: list[Tensor], groups: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """The features and tokens [P] of each group of codes, as `sort_pairs` takes them."""
    found = []
    for codes in groups:
        own, tokens, first = [features[code] for code in codes], [], 0
        for n, k in (of.shape for of in own):
            here = torch.arange(first, first + n, device=own[0].device)
            tokens.append(here.unsqueeze(1).expand(n, k).reshape(-1))
            first += n
        found.append((torch.cat([of.reshape(-1) for of in own]), torch.cat(tokens)))
    return found
