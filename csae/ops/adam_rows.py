"""adam_rows: one step of Adam on tables of rows, from factored gradients.

The gradient of a table of features, [d_sae, d], is a sum over the pairs (feature, token) that were active:

    gradient[f] = sum over pairs p of feature f of weights[p] * rows[tokens[p]]

W_enc, W_dec and W_mem all have this form. The pairs are sorted by feature once (a CSR matrix with an `indptr`), so each
row's gradient is the sum of one run. Adam is fused with that sum: parameters and moments pass through memory once, and
nothing else of their size does.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from csae.kernels.pairs import Pairs, Table

from .backend import fake, kernels, no_gradient, operator

__all__ = ["Pairs", "Table", "adam_numbers", "adam_rows", "feature_sums", "sort_codes", "sort_pairs"]


def sort_pairs(features: Tensor, tokens: Tensor, d_sae: int) -> Pairs:
    """features, tokens [P] int64 -> the pairs in order of feature, those of one feature in the order given.

    A pair with feature d_sae is left out of every run.
    """
    return Pairs(*_sort_pairs(features, tokens, d_sae))


def sort_codes(features: list[Tensor], groups: list[list[int]], d_sae: int) -> list[Pairs]:
    """The pairs of several groups of codes, each sorted as by `sort_pairs`; on a GPU all in one sort.

    features: of each code, [n, k] int64 from 0 to d_sae; d_sae for a pair that is left out. groups: for each result,
    the codes that it is of, by their numbers. Its tokens are counted through them.
    """
    found = _sort_codes(features, [code for codes in groups for code in codes], [len(codes) for codes in groups], d_sae)
    return [Pairs(*found[first : first + 3]) for first in range(0, len(found), 3)]


def adam_rows(pairs: Pairs, tables: list[Table], hyper: Tensor, seed: Tensor, lazy: bool, first_row: int = 0) -> None:
    """Update the tables and their moments in place.

    Args:
        pairs: what `sort_pairs` gave.
        tables: what to update, with the weights and rows of its gradient.
        hyper: [6] float32 on the tables' device: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, 1 - beta1, beta2,
            1 - beta2. A tensor, so that a captured graph can be replayed with another learning rate.
        seed: [1] int64, the step's number: for the stochastic rounding of bfloat16 moments.
        lazy: leave rows without a pair as they are (`torch.optim.SparseAdam`), or not (`torch.optim.Adam`).
        first_row: the number of the tables' first row, where they are part of larger ones. The rounding goes by it.
    """
    columns = zip(*tables, strict=True)
    params, exp_avgs, exp_avg_sqs, weights, rows, unit_rows, rounded = (list(column) for column in columns)
    copied = [copy is not None for copy in rounded]
    copies = [copy for copy in rounded if copy is not None]
    how = hyper, seed, lazy, first_row, copied, copies
    _adam_rows(*pairs, params, exp_avgs, exp_avg_sqs, weights, rows, unit_rows, *how)


def adam_numbers(constants: Tensor, step: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor]:
    """`adam_rows`' hyper and seed, made on the device of `step`, a scalar.

    constants: [3, 6] float64, factors, bases and powers: each number is factor * (1 - base^step)^power, the first also
    times lr, a number or a scalar there.
    """
    given = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    return _adam_numbers(constants, step, *given)


@operator("adam_numbers")
def _adam_numbers(constants: Tensor, step: Tensor, lr: Tensor | None, lr_number: float) -> tuple[Tensor, Tensor]:
    return kernels("adam_numbers", step.device, step.dtype).adam_numbers(constants, step, lr, lr_number)


@fake("adam_numbers")
def _(constants, step, lr, lr_number):
    return step.new_empty(constants.shape[1], dtype=torch.float32), step.new_empty(1, dtype=torch.int64)


@operator("sort_pairs")
def _sort_pairs(features: Tensor, tokens: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(kernels("feature_rows", features.device, torch.float32).sort_pairs(features, tokens, d_sae))  # type: ignore[return-value]


@fake("sort_pairs")
def _(features: Tensor, tokens: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(tokens), features.new_empty(d_sae + 1)


@operator("sort_codes")
def _sort_codes(features: list[Tensor], codes: list[int], sizes: list[int], d_sae: int) -> list[Tensor]:
    groups = _groups(codes, sizes)
    by = kernels("feature_rows", features[0].device, torch.float32)
    return [tensor for pairs in by.sort_codes(features, groups, d_sae) for tensor in pairs]


@fake("sort_codes")
def _(features: list[Tensor], codes: list[int], sizes: list[int], d_sae: int) -> list[Tensor]:
    found = []
    for group in _groups(codes, sizes):
        P = sum(features[code].numel() for code in group)
        found += [features[0].new_empty(P), features[0].new_empty(P), features[0].new_empty(d_sae + 1)]
    return found


def _groups(codes: list[int], sizes: list[int]) -> list[list[int]]:
    rest = iter(codes)
    return [list(islice(rest, size)) for size in sizes]


# torch compiles no list that is written to and holds None: so `copies` has those alone that are there.
@operator("adam_rows", ("params", "exp_avgs", "exp_avg_sqs", "copies"))
def _adam_rows(
    order: Tensor,
    tokens: Tensor,
    ends: Tensor,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    weights: list[Tensor],
    rows: list[Tensor],
    unit_rows: list[bool],
    hyper: Tensor,
    seed: Tensor,
    lazy: bool,
    first_row: int,
    copied: list[bool],
    copies: list[Tensor],
) -> None:
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *copies])
    rest = iter(copies)
    rounded = [next(rest) if is_there else None for is_there in copied]
    tables = list(map(Table, params, exp_avgs, exp_avg_sqs, weights, rows, unit_rows, rounded))
    dtype = params[0].dtype if params else torch.float32
    pairs = Pairs(order, tokens, ends)
    kernels("feature_rows", hyper.device, dtype).adam_rows(pairs, tables, hyper, seed, lazy, first_row)


@fake("adam_rows")
def _(
    order, tokens, ends, params, exp_avgs, exp_avg_sqs, weights, rows, unit_rows, hyper, seed, lazy, first_row, copied,
    copies,
):  # fmt: skip
    return None


def feature_sums(pairs: Pairs, weights: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    """The gradients themselves: for each i, [d_sae, d] in rows[i]'s dtype from weights[i] [P] and rows[i] [N, d]."""
    return _feature_sums(*pairs, weights, rows)


@operator("feature_sums")
def _feature_sums(
    order: Tensor, tokens: Tensor, ends: Tensor, weights: list[Tensor], rows: list[Tensor]
) -> list[Tensor]:
    dtype = rows[0].dtype if rows else torch.float32
    return kernels("feature_rows", ends.device, dtype).feature_sums(Pairs(order, tokens, ends), weights, rows)


@fake("feature_sums")
def _(order, tokens, ends, weights, rows):
    return [of.new_empty(ends.shape[0] - 1, of.shape[1]) for of in rows]


no_gradient("adam_numbers")
no_gradient("sort_pairs")
no_gradient("sort_codes")
no_gradient("feature_sums")
