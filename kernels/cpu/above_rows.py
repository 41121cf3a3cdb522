"""The entries of each row that are in a band, largest first: of tiles in float32, or of candidates by upper bounds."""

from __future__ import annotations

from ctypes import byref, c_float
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import STORED, check_matrix, check_output, check_strided, output_matrix
from .library import BAD_INDEX, TYPES, Band, check_status, native
from .topk_rows import Best, argument


class Between(NamedTuple):
    """Which pre-activations are selected, for each column: floor < v, and v < ceiling where there is one."""

    floor: Tensor  # [d_sae] float32, contiguous; zero or more, or NaN, which selects nothing
    ceiling: Tensor | None = None  # [d_sae] float32, contiguous

    def of(self, columns: slice) -> Between:
        return Between(self.floor[columns], None if self.ceiling is None else self.ceiling[columns])


def above_add(best: Best, band: Between, pre_acts: Tensor, bias: Tensor, first_column: int) -> None:
    """As `topk_add`, of what is in the band of the tile's columns. best.k: the most that are kept of a row."""
    check_matrix("pre_acts", pre_acts, torch.float32, (best.counts.shape[0], None))
    check_strided("bias", bias, torch.float32, (pre_acts.shape[1],))
    bias = bias.contiguous()
    status = native().csae_above_add(
        *(byref(argument(best)), byref(_band(band, pre_acts.shape[1])), pre_acts.data_ptr(), pre_acts.stride(0)),
        *(bias.data_ptr(), pre_acts.shape[1], first_column, torch.get_num_threads()),
    )
    check_status("above_add", status)


def above_finish(best: Best, values: Tensor | None = None, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `topk_finish`, of rows that may have fewer than best.k: behind the last, values and indices are 0."""
    n = best.counts.shape[0]
    values = output_matrix("values", values, torch.float32, (n, best.k))
    indices = output_matrix("indices", indices, torch.int64, (n, best.k))
    status = native().csae_above_finish(
        *(byref(argument(best)), values.data_ptr(), values.stride(0), indices.data_ptr(), indices.stride(0)),
        torch.get_num_threads(),
    )
    check_status("above_finish", status)
    return values, indices


def above_settle(
    best: Best,
    band: Between,
    start: float,
    of_values: bool,
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    values: Tensor,
    indices: Tensor,
) -> Tensor:
    """As `topk_settle`, of what is in the band, up to the width of values.

    best: what `topk_add_products` found, from thresholds that were `start`.
    of_values: whether the bounds are of pre-activations; if not, a candidate whose bound is below `start` is not in
    the band, and that is all: rows with more than best.k candidates are not settled.

    -> settled [n] bool, False for rows whose values [n, k] and indices [n, k] are not filled.
    """
    n, k = values.shape
    check_matrix("x", x, torch.float32, (best.counts.shape[0], None))
    check_matrix("table", table, STORED, (None, x.shape[1]))
    check_strided("bias", bias, torch.float32, (table.shape[0],))
    bias = bias.contiguous()
    check_output("values", values, torch.float32, (best.counts.shape[0], k))
    check_output("indices", indices, torch.int64, (best.counts.shape[0], k))
    settled = torch.empty(n, dtype=torch.bool)
    status = native().csae_above_settle(
        *(byref(argument(best)), byref(_band(band, table.shape[0])), k, start, of_values),
        *(x.data_ptr(), x.stride(0), table.data_ptr(), table.stride(0), *table.shape, TYPES[table.dtype]),
        *(bias.data_ptr(), values.data_ptr(), values.stride(0), indices.data_ptr(), indices.stride(0)),
        *(settled.data_ptr(), torch.get_num_threads()),
    )
    if status == BAD_INDEX:
        raise ValueError(f"best: holds a column of {table.shape[0]} or more; needed columns of table")
    check_status("above_settle", status)
    return settled


def cut(values: Tensor, indices: Tensor, budget: int) -> float:
    """The `budget` largest of codes [n, k], in place: the rest becomes 0. -> the smallest that is kept, 0 if fewer are.

    values: float32, each row descending, and ending at the first zero. Equal ones by lower row, then in their order. A
    row of NaN stays, and takes none of the budget.
    """
    check_output("values", values, torch.float32, tuple(values.shape))  # type: ignore[arg-type]
    check_output("indices", indices, torch.int64, tuple(values.shape))  # type: ignore[arg-type]
    threshold = c_float()
    status = native().csae_cut(
        *(values.data_ptr(), values.stride(0), indices.data_ptr(), indices.stride(0)),
        *(*values.shape, budget, byref(threshold)),
    )
    check_status("cut", status)
    return threshold.value


def _band(band: Between, width: int) -> Band:
    for name, numbers in zip(Between._fields, band, strict=True):
        if numbers is not None:
            check_strided(name, numbers, torch.float32, (width,))
            if width > 1 and numbers.stride(0) != 1:
                raise ValueError(f"{name}: given strides {numbers.stride()}; needed contiguous numbers")
    return Band(band.floor.data_ptr(), None if band.ceiling is None else band.ceiling.data_ptr())
