"""Adam on tables of rows, a row a feature, from gradients that stay in factors (`kernels/pairs.py`).

sort_pairs     (feature, token) pairs by feature: a run of tokens a feature
feature_sums   the gradients themselves, where they are wanted dense
adam_rows      the step of Adam, in place

Each sum has a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..pairs import Pairs, Table, given_pairs

LOW_32 = 0xFFFFFFFF
# The least norm that a row is divided by, so that a row of zeros stays as it is.
LEAST_NORM = 1e-12


def sort_pairs(features: Tensor, tokens: Tensor, d_sae: int) -> Pairs:
    """features, tokens [P] int64 -> Pairs; stable. A feature outside of [0, d_sae) is inactive, and comes last."""
    keys = torch.where((features >= 0) & (features < d_sae), features, d_sae)
    keys, order = keys.sort(stable=True)
    ends = torch.searchsorted(keys, torch.arange(d_sae + 1, device=keys.device))
    return Pairs(order, tokens[order], ends)


def sort_codes(features: list[Tensor], groups: list[list[int]], d_sae: int) -> list[Pairs]:
    """The pairs of several groups of codes [n, k], each as by `sort_pairs`: see `kernels/pairs.py`."""
    return [sort_pairs(*given, d_sae) for given in given_pairs(features, groups)]


def feature_sums(pairs: Pairs, weights: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    """weights [P] and rows [N, d] of each table -> its gradient [d_sae, d], in rows' dtype."""
    return [
        _feature_sum(pairs, own_weights, own_rows).to(own_rows.dtype)
        for own_weights, own_rows in zip(weights, rows, strict=True)
    ]


def adam_rows(pairs: Pairs, tables: list[Table], hyper: Tensor, seed: Tensor, lazy: bool, first_row: int = 0) -> None:
    """One step of Adam on each table, in place.

    hyper [6]: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, 1 - beta1, beta2, 1 - beta2, on the tables' device.
    seed [1] int64: the number of the step, for the rounding of bfloat16 moments.
    lazy: a row without a pair is left as it is, as torch.optim.SparseAdam does (whose eps is outside of the
    correction: pass eps / sqrt(1 - beta2^t)). Otherwise each row is updated, as torch.optim.Adam does.
    first_row: the number of the tables' first row, where they are part of larger ones; that rounding goes by it.
    """
    touched = (pairs.ends.diff() > 0)[:, None] if lazy else None
    for table in tables:
        gradient = _feature_sum(pairs, table.weights, table.rows).to(table.param.dtype)
        updated = (table.param, table.exp_avg, table.exp_avg_sq)
        for old, new in zip(updated, _adam(table, gradient, hyper, seed, first_row), strict=True):
            old.copy_(new if touched is None else torch.where(touched, new, old))
        if table.rounded is not None:
            table.rounded.copy_(table.param)


def _adam(table: Table, gradient: Tensor, hyper: Tensor, seed: Tensor, first_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """The new param, exp_avg and exp_avg_sq."""
    step_size, correction, eps, one_minus_beta1, beta2, one_minus_beta2 = hyper.to(gradient.dtype).unbind()
    param, exp_avg, exp_avg_sq = (tensor.to(gradient.dtype) for tensor in table[:3])
    if table.unit_rows:
        gradient = gradient - (gradient * param).sum(1, keepdim=True) * param
    exp_avg = exp_avg + (gradient - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + gradient.square() * one_minus_beta2
    param = param - step_size * exp_avg / (exp_avg_sq.sqrt() * correction + eps)
    if table.unit_rows:
        param = param / param.norm(dim=1, keepdim=True).clamp_(min=LEAST_NORM)
    if table.exp_avg.dtype == torch.bfloat16:
        rounded = round_stochastically(exp_avg_sq, seed + 0x9E3779B9, first_row)
        return param, round_stochastically(exp_avg, seed, first_row), rounded
    return param, exp_avg, exp_avg_sq


def _feature_sum(pairs: Pairs, weights: Tensor, rows: Tensor) -> Tensor:
    """weights [P], rows [N, d] -> [d_sae, d], accumulated and given in float32, or float64 for such rows."""
    d_sae, d = pairs.ends.shape[0] - 1, rows.shape[1]
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if pairs.tokens.numel() == 0 or d == 0:
        return rows.new_zeros(d_sae, d, dtype=wide)
    sums = embedding_bag(
        pairs.tokens,
        rows.to(wide),
        offsets=pairs.ends,
        per_sample_weights=weights.to(wide)[pairs.order],
        mode="sum",
    )
    return sums[:d_sae]  # the last bag is of the inactive pairs


def round_stochastically(x: Tensor, seed: Tensor, first_row: int = 0) -> Tensor:
    """x [d_sae, d] -> bfloat16: one of its two neighbours, at random, so that the mean is x.

    seed [1] int64. first_row: the number of the first row in the whole table. The 16 random bits are a hash of the
    element's place in the whole table and the seed, the same on every backend and for any split of the table's rows.
    They are added below the bits that stay, and carry into them. NaN stays NaN.
    """
    place = (torch.arange(x.numel(), device=x.device).view(x.shape) + first_row * x.shape[1]) & LOW_32
    chance = hash32(place ^ hash32(seed & LOW_32)) >> 16
    bits = x.to(torch.float32).view(torch.int32).to(torch.int64)
    rounded = ((bits + chance) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, rounded)


def hash32(x: Tensor) -> Tensor:
    """Integers in [0, 2^32), as int64, -> the same, mixed: lowbias32 of C. Wellons' hash-prospector."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & LOW_32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & LOW_32
    return x ^ (x >> 16)
