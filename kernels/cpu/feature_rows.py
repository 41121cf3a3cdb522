"""Pairs sorted by feature, gradients summed from their factors, and Adam fused with that sum: on the CPU.

`csae.kernels.portable.feature_rows` defines these functions, `csae.kernels.pairs` their tensors. Matrices have
contiguous rows at any stride; vectors are contiguous. Each sum has a fixed order, so results don't depend on the number
of threads, which is torch.get_num_threads(). TypeError and ValueError name the argument that doesn't fit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..pairs import Pairs, Table
from .arguments import STORED, check_count, check_matrix, check_output, check_strided
from .library import BAD_INDEX, TYPES, AdamStep, AdamTable, DenseGradient, Gradient, SortedPairs, check_status, native
from .memory import fresh


def sort_pairs(features: Tensor, tokens: Tensor, d_sae: int) -> Pairs:
    """features, tokens [P] int64 -> Pairs, stably sorted. Pairs with a feature outside of [0, d_sae) are inactive."""
    _check_vector("features", features, torch.int64, (None,))
    _check_vector("tokens", tokens, torch.int64, (features.shape[0],))
    check_count("d_sae", d_sae)
    pairs = Pairs(torch.empty_like(features), torch.empty_like(tokens), features.new_empty(d_sae + 1))
    status = native().csae_sort_pairs(
        *(features.data_ptr(), tokens.data_ptr(), features.shape[0], d_sae),
        *(tensor.data_ptr() for tensor in pairs),
        torch.get_num_threads(),
    )
    check_status("sort_pairs", status)
    return pairs


def feature_sums(
    pairs: Pairs, weights: list[Tensor], rows: list[Tensor], out: list[Tensor] | None = None
) -> list[Tensor]:
    """weights [P] float32 and rows [N, d] float32 or bfloat16 of each table -> its gradient [d_sae, d] in rows' dtype.

    Gradients go to `out` if given, which must not overlap an input.
    """
    sorted_pairs = _sorted(pairs)
    gradients = [
        _gradient(f"weights[{i}]", table_weights, f"rows[{i}]", table_rows, pairs)
        for i, (table_weights, table_rows) in enumerate(zip(weights, rows, strict=True))
    ]
    if out is None:
        out = [fresh((sorted_pairs.d_sae, table_rows.shape[1]), table_rows.dtype) for table_rows in rows]
    for i, (table_out, table_rows) in enumerate(zip(out, rows, strict=True)):
        check_output(f"out[{i}]", table_out, table_rows.dtype, (sorted_pairs.d_sae, table_rows.shape[1]))
    dense = [
        DenseGradient(gradient, table_out.data_ptr(), table_out.stride(0))
        for gradient, table_out in zip(gradients, out, strict=True)
    ]
    status = native().csae_feature_sums(
        ctypes.byref(sorted_pairs), (DenseGradient * len(dense))(*dense), len(dense), torch.get_num_threads()
    )
    _check("feature_sums", status)
    return out


def adam_rows(pairs: Pairs, tables: list[Table], hyper: Tensor, seed: Tensor, lazy: bool) -> None:
    """One step of Adam on each table, in place; autograd is not told. Denormal numbers count as zero.

    hyper: [6] float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, 1 - beta1, beta2, 1 - beta2.
    seed: [1] int64, the number of the step, for the stochastic rounding of bfloat16 moments.
    lazy: rows without pairs stay as they are, as in torch.optim.SparseAdam.
    """
    sorted_pairs = _sorted(pairs)
    natives = [_adam_table(f"tables[{i}]", table, pairs) for i, table in enumerate(tables)]
    _check_vector("hyper", hyper, torch.float32, (6,))
    _check_vector("seed", seed, torch.int64, (1,))
    step = AdamStep(*hyper.tolist(), int(seed) & 0xFFFFFFFF, lazy)
    status = native().csae_adam_rows(
        *(ctypes.byref(sorted_pairs), (AdamTable * len(natives))(*natives), len(natives), ctypes.byref(step)),
        torch.get_num_threads(),
    )
    _check("adam_rows", status)


def _sorted(pairs: Pairs) -> SortedPairs:
    _check_vector("pairs.order", pairs.order, torch.int64, (None,))
    _check_vector("pairs.tokens", pairs.tokens, torch.int64, tuple(pairs.order.shape))
    _check_vector("pairs.ends", pairs.ends, torch.int64, (None,))
    if pairs.ends.shape[0] == 0:
        raise ValueError("pairs.ends: given no element; needed d_sae + 1")
    return SortedPairs(*(tensor.data_ptr() for tensor in pairs), pairs.order.shape[0], pairs.ends.shape[0] - 1)


def _gradient(weights_name: str, weights: Tensor, rows_name: str, rows: Tensor, pairs: Pairs) -> Gradient:
    _check_vector(weights_name, weights, torch.float32, (pairs.order.shape[0],))
    check_matrix(rows_name, rows, STORED, (None, None))
    return Gradient(weights.data_ptr(), rows.data_ptr(), rows.stride(0), *rows.shape, TYPES[rows.dtype])


def _adam_table(name: str, table: Table, pairs: Pairs) -> AdamTable:
    gradient = _gradient(f"{name}.weights", table.weights, f"{name}.rows", table.rows, pairs)
    shape = (pairs.ends.shape[0] - 1, table.rows.shape[1])
    check_output(f"{name}.param", table.param, torch.float32, shape)
    check_output(f"{name}.exp_avg", table.exp_avg, STORED, shape)
    check_output(f"{name}.exp_avg_sq", table.exp_avg_sq, table.exp_avg.dtype, shape)
    updated = table[:3]
    return AdamTable(
        gradient,
        *(tensor.data_ptr() for tensor in updated),
        *(tensor.stride(0) for tensor in updated),
        *(TYPES[table.exp_avg.dtype], table.unit_rows),
    )


def _check_vector(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    check_strided(name, tensor, dtype, shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: given strides {tensor.stride()}; needed a contiguous tensor")


def _check(function: str, status: int) -> None:
    if status == BAD_INDEX:
        raise ValueError(
            f"{function}: given pairs with an order or a token out of range, or ends that don't ascend from 0 to at "
            "most P; needed what sort_pairs gives, with 0 <= token < N for each rows [N, d]"
        )
    check_status(function, status)
