"""Pairs sorted by feature, gradients summed from their factors, and Adam fused with that sum: on the CPU.

`csae.kernels.portable.feature_rows` has the same functions, `csae.kernels.pairs` their tensors. Each sum is float32 and
has a fixed order, so results don't depend on the number of threads, which is torch.get_num_threads(). TypeError and
ValueError name the argument that doesn't fit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..pairs import Pairs, Table, given_pairs
from .arguments import FLOATS, STORED, check_count, check_output, check_strided, with_rows
from .library import BAD_INDEX, TYPES, AdamStep, AdamTable, DenseGradient, Gradient, SortedPairs, check_status, native
from .memory import fresh


def sort_pairs(features: Tensor, tokens: Tensor, d_sae: int) -> Pairs:
    """features, tokens [P] int64 -> Pairs, stably sorted. Pairs with a feature outside of [0, d_sae) are inactive."""
    check_strided("features", features, torch.int64, (None,))
    check_strided("tokens", tokens, torch.int64, (features.shape[0],))
    check_count("d_sae", d_sae)
    features, tokens = features.contiguous(), tokens.contiguous()
    pairs = Pairs(torch.empty_like(features), torch.empty_like(tokens), features.new_empty(d_sae + 1))
    status = native().csae_sort_pairs(
        *(features.data_ptr(), tokens.data_ptr(), features.shape[0], d_sae),
        *(tensor.data_ptr() for tensor in pairs),
        torch.get_num_threads(),
    )
    check_status("sort_pairs", status)
    return pairs


def sort_codes(features: list[Tensor], groups: list[list[int]], d_sae: int) -> list[Pairs]:
    """The pairs of several groups of codes [n, k], each as by `sort_pairs`: see `kernels/pairs.py`."""
    return [sort_pairs(*given, d_sae) for given in given_pairs(features, groups)]


def feature_sums(pairs: Pairs, weights: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    """weights [P] and rows [N, d] of each table -> its gradient [d_sae, d] in rows' dtype."""
    sorted_pairs = _sorted(pairs)
    named = enumerate(zip(weights, rows, strict=True))
    factors = [
        _factors(pairs, f"weights[{i}]", own_weights, f"rows[{i}]", own_rows) for i, (own_weights, own_rows) in named
    ]
    out = [fresh((sorted_pairs.d_sae, stored.shape[1]), stored.dtype) for _, stored in factors]
    dense = [DenseGradient(_gradient(*own), o.data_ptr(), o.stride(0)) for own, o in zip(factors, out, strict=True)]
    status = native().csae_feature_sums(
        ctypes.byref(sorted_pairs), (DenseGradient * len(dense))(*dense), len(dense), torch.get_num_threads()
    )
    _check("feature_sums", status)
    return [o.to(own_rows.dtype) for o, own_rows in zip(out, rows, strict=True)]


def adam_rows(pairs: Pairs, tables: list[Table], hyper: Tensor, seed: Tensor, lazy: bool, first_row: int = 0) -> None:
    """One step of Adam on each table, in place; autograd is not told. Denormal numbers count as zero.

    hyper: [6] float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, 1 - beta1, beta2, 1 - beta2.
    seed: [1] int64, the number of the step, for the stochastic rounding of bfloat16 moments.
    lazy: rows without pairs stay as they are, as in torch.optim.SparseAdam.
    first_row: the number of the tables' first row, where they are part of larger ones; that rounding goes by it.
    """
    sorted_pairs = _sorted(pairs)
    factors = [
        _factors(pairs, f"tables[{i}].weights", table.weights, f"tables[{i}].rows", table.rows)
        for i, table in enumerate(tables)
    ]
    natives = [_adam_table(f"tables[{i}]", table, *factors[i], sorted_pairs.d_sae) for i, table in enumerate(tables)]
    check_strided("hyper", hyper, torch.float32, (6,))
    check_strided("seed", seed, torch.int64, (1,))
    step = AdamStep(*hyper.tolist(), int(seed) & 0xFFFFFFFF, lazy, first_row)
    status = native().csae_adam_rows(
        *(ctypes.byref(sorted_pairs), (AdamTable * len(natives))(*natives), len(natives), ctypes.byref(step)),
        torch.get_num_threads(),
    )
    _check("adam_rows", status)
    for table in tables:
        if table.rounded is not None:  # a pass of its own: a cast that the next step would make
            table.rounded.copy_(table.param)


def _sorted(pairs: Pairs) -> SortedPairs:
    P = pairs.order.shape[0] if isinstance(pairs.order, Tensor) and pairs.order.ndim else None
    for name, size in (("order", None), ("tokens", P), ("ends", None)):
        tensor = getattr(pairs, name)
        check_strided(f"pairs.{name}", tensor, torch.int64, (size,))
        if not tensor.is_contiguous():
            raise ValueError(f"pairs.{name}: given strides {tensor.stride()}; needed a contiguous tensor")
    if pairs.ends.shape[0] == 0:
        raise ValueError("pairs.ends: given no element; needed d_sae + 1")
    return SortedPairs(*(tensor.data_ptr() for tensor in pairs), pairs.order.shape[0], pairs.ends.shape[0] - 1)


def _factors(pairs: Pairs, weights_name: str, weights: Tensor, rows_name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and rows of one table as native code takes them: keep them alive as long as it does."""
    check_strided(weights_name, weights, FLOATS, (pairs.order.shape[0],))
    check_strided(rows_name, rows, FLOATS, (None, None))
    return weights.float().contiguous(), with_rows(rows if rows.dtype in STORED else rows.float())


def _gradient(weights: Tensor, rows: Tensor) -> Gradient:
    return Gradient(weights.data_ptr(), rows.data_ptr(), rows.stride(0), *rows.shape, TYPES[rows.dtype])


def _adam_table(name: str, table: Table, weights: Tensor, rows: Tensor, d_sae: int) -> AdamTable:
    shape = (d_sae, rows.shape[1])
    check_output(f"{name}.param", table.param, torch.float32, shape)
    check_output(f"{name}.exp_avg", table.exp_avg, STORED, shape)
    check_output(f"{name}.exp_avg_sq", table.exp_avg_sq, table.exp_avg.dtype, shape)
    updated = table[:3]
    return AdamTable(
        _gradient(weights, rows),
        *(tensor.data_ptr() for tensor in updated),
        *(tensor.stride(0) for tensor in updated),
        *(TYPES[table.exp_avg.dtype], table.unit_rows),
    )


def _check(function: str, status: int) -> None:
    if status == BAD_INDEX:
        raise ValueError(
            f"{function}: given pairs with an order or a token out of range, or ends that don't ascend from 0 to at "
            "most P; needed what sort_pairs gives, with 0 <= token < N for each rows [N, d]"
        )
    check_status(function, status)
