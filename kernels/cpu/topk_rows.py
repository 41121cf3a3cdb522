"""Streaming top-k: the k largest of each row, from tiles of columns that are added one after the other."""

from __future__ import annotations

import math
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import STORED, check_matrix, check_strided, output_matrix
from .library import BAD_INDEX, TYPES, Topk, check_status, native
from .memory import fresh
from .round_rows import PairedRows


class Best(NamedTuple):
    """The candidates so far of each row. Their content is internal to the native library."""

    order: Tensor  # [n, capacity] int32, values as integers that sort like the floats
    columns: Tensor  # [n, capacity] int32
    threshold: Tensor  # [n] float32; what is below it is no candidate
    counts: Tensor  # [n] int32; -1 for a row with a NaN
    k: int


def topk_capacity(d_sae: int, k: int) -> int:
    """The number of candidates of a row that `topk_start` has room for, 8 bytes each."""
    # More room means that a list is pruned to k less often, but also that its threshold rises later.
    return min(d_sae, max(5 * k // 2, k + 96)) + 64


def topk_start(n: int, d_sae: int, k: int, capacity: int | None = None) -> Best:
    """Empty candidates for n rows of d_sae columns. 1 <= k <= d_sae < 2^31. capacity: k + 64 or more."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: given {type(k).__name__}; needed int")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k: given {k}; needed 1 <= k <= d_sae, which is {d_sae}")
    shape = (n, topk_capacity(d_sae, k) if capacity is None else capacity)
    return Best(
        order=fresh(shape, torch.int32),
        columns=fresh(shape, torch.int32),
        threshold=torch.full((n,), -math.inf),
        counts=torch.zeros(n, dtype=torch.int32),
        k=k,
    )


def topk_add(best: Best, pre_acts: Tensor, bias: Tensor, first_column: int) -> None:
    """Add the columns first_column .. first_column + width of each row: pre_acts + bias. Tiles come in column order.

    pre_acts: [n, width] float32 on the CPU, rows contiguous at any stride; not written to. bias: [width] float32.
    """
    check_matrix("pre_acts", pre_acts, torch.float32, (best.counts.shape[0], None))
    check_strided("bias", bias, torch.float32, (pre_acts.shape[1],))
    bias = bias.contiguous()
    status = native().csae_topk_add(
        byref(argument(best)),
        pre_acts.data_ptr(),
        pre_acts.stride(0),
        bias.data_ptr(),
        pre_acts.shape[1],
        first_column,
        torch.get_num_threads(),
    )
    check_status("topk_add", status)


def topk_finish(best: Best, values: Tensor | None = None, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, relu'd after the selection. `best` can't be used afterwards.

    -> values [n, k] float32, indices [n, k] int64; in `values` and `indices` if given (rows contiguous at any stride).

    Largest first, equal ones (0.0 and -0.0 are equal) by lower index first. A row with a NaN gives k NaN values at
    indices 0..k-1. The result depends neither on the tiles nor on the number of threads, which is
    torch.get_num_threads(). Raises ValueError if fewer than k columns were added.
    """
    n = best.counts.shape[0]
    values = output_matrix("values", values, torch.float32, (n, best.k))
    indices = output_matrix("indices", indices, torch.int64, (n, best.k))
    status = native().csae_topk_finish(
        byref(argument(best)),
        values.data_ptr(),
        values.stride(0),
        indices.data_ptr(),
        indices.stride(0),
        torch.get_num_threads(),
    )
    check_status("topk_finish", status)
    return values, indices


def topk_add_products(best: Best, x: Tensor, table: PairedRows, first_column: int) -> None:
    """Add upper bounds of pre-activations, x table^T summed in float32, as `topk_add` adds values; for `topk_settle`.

    x: [n, width] bfloat16, rows contiguous at any stride. width: that of the table's rows, a multiple of 32.
    """
    n, width = best.counts.shape[0], table.pairs.shape[1] * 2
    check_matrix("x", x, torch.bfloat16, (n, width))
    status = native().csae_topk_add_products(
        *(byref(argument(best)), x.data_ptr(), x.stride(0)),
        *(table.pairs.data_ptr(), width, len(table.lengths), first_column, torch.get_num_threads()),
    )
    check_status("topk_add_products", status)


def topk_settle(
    best: Best,
    k: int,
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    values: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row of x table^T + bias, from the best.k candidates of `topk_add_products`.

    Candidates are computed again in float32. Either their upper bounds prove the result, or the row is not settled.
    `best` can't be used afterwards.

    Args:
        k: 1 <= k < best.k.
        x: [n, d] float32, rows contiguous at any stride. table: [d_sae, d] float32 or bfloat16, likewise.
        bias: [d_sae] float32.

    -> values [n, k] float32 and indices [n, k] int64, as `topk_finish` gives them; settled [n] bool, False for rows
    whose values and indices are not filled.
    """
    n = best.counts.shape[0]
    check_matrix("x", x, torch.float32, (n, None))
    check_matrix("table", table, STORED, (None, x.shape[1]))
    check_strided("bias", bias, torch.float32, (table.shape[0],))
    bias = bias.contiguous()
    values = output_matrix("values", values, torch.float32, (n, k))
    indices = output_matrix("indices", indices, torch.int64, (n, k))
    settled = torch.empty(n, dtype=torch.bool)
    status = native().csae_topk_settle(
        *(byref(argument(best)), k, x.data_ptr(), x.stride(0)),
        *(table.data_ptr(), table.stride(0), *table.shape, TYPES[table.dtype], bias.data_ptr()),
        *(values.data_ptr(), values.stride(0), indices.data_ptr(), indices.stride(0)),
        *(settled.data_ptr(), torch.get_num_threads()),
    )
    if status == BAD_INDEX:
        raise ValueError(f"best: holds a column of {table.shape[0]} or more; needed columns of table")
    check_status("topk_settle", status)
    return values, indices, settled


def argument(best: Best) -> Topk:
    """The candidates as native code takes them; `best` must be held meanwhile."""
    n, capacity = best.order.shape
    pointers = (tensor.data_ptr() for tensor in (best.order, best.columns, best.threshold, best.counts))
    return Topk(*pointers, n, best.k, capacity)
