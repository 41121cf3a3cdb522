"""The three ways in which a sparse code [n, k] meets a table of rows [d_sae, d].

gather_sum   out[t]    = sum_i values[t, i] * table[indices[t, i]]
gather_dot   out[t, i] = <grad[t], table[indices[t, i]]>
feature_sum  out[f]    = sum over (t, i) with indices[t, i] = f of values[t, i] * rows[t]

All tensors are on the CPU, float32 and int64, with contiguous rows at any stride. The result goes to `out` where it
is given; no part of it may be part of an input. Each sum has a fixed order: the result doesn't depend on the number
of threads, which is torch.get_num_threads(). TypeError and ValueError name an argument that doesn't fit; an index
outside of [0, d_sae) is a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_matrix, output_matrix
from .library import BAD_INDEX, check_status, native


def gather_sum(values: Tensor, indices: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """values [n, k], indices [n, k], table [d_sae, d] -> [n, d]."""
    check_matrix("values", values, torch.float32, (None, None))
    n, k = values.shape
    check_matrix("indices", indices, torch.int64, (n, k))
    check_matrix("table", table, torch.float32, (None, None))
    d_sae, d = table.shape
    out = output_matrix("out", out, torch.float32, (n, d))
    status = native().csae_gather_sum(
        *(values.data_ptr(), values.stride(0), indices.data_ptr(), indices.stride(0), n, k),
        *(table.data_ptr(), table.stride(0), d_sae, d),
        *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )
    _check(status, "gather_sum", indices, d_sae)
    return out


def gather_dot(grad: Tensor, indices: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """grad [n, d], indices [n, k], table [d_sae, d] -> [n, k]."""
    check_matrix("table", table, torch.float32, (None, None))
    d_sae, d = table.shape
    check_matrix("grad", grad, torch.float32, (None, d))
    n = grad.shape[0]
    check_matrix("indices", indices, torch.int64, (n, None))
    k = indices.shape[1]
    out = output_matrix("out", out, torch.float32, (n, k))
    status = native().csae_gather_dot(
        *(grad.data_ptr(), grad.stride(0), indices.data_ptr(), indices.stride(0), n, k),
        *(table.data_ptr(), table.stride(0), d_sae, d),
        *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )
    _check(status, "gather_dot", indices, d_sae)
    return out


def feature_sum(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, out: Tensor | None = None) -> Tensor:
    """values [n, k], indices [n, k], rows [n, d] -> [d_sae, d], zero where a feature is in no row."""
    check_matrix("values", values, torch.float32, (None, None))
    n, k = values.shape
    check_matrix("indices", indices, torch.int64, (n, k))
    check_matrix("rows", rows, torch.float32, (n, None))
    d = rows.shape[1]
    if isinstance(d_sae, bool) or not isinstance(d_sae, int):
        raise TypeError(f"d_sae: given {type(d_sae).__name__}; needed int")
    if d_sae < 0:
        raise ValueError(f"d_sae: given {d_sae}; needed 0 or more")
    out = output_matrix("out", out, torch.float32, (d_sae, d))
    status = native().csae_feature_sum(
        *(values.data_ptr(), values.stride(0), indices.data_ptr(), indices.stride(0), n, k),
        *(rows.data_ptr(), rows.stride(0), d_sae, d),
        *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )
    _check(status, "feature_sum", indices, d_sae)
    return out


def _check(status: int, function: str, indices: Tensor, d_sae: int) -> None:
    if status == BAD_INDEX:
        low, high = indices.aminmax()
        raise ValueError(f"indices: given values from {int(low)} to {int(high)}; needed 0 <= index < d_sae = {d_sae}")
    check_status(function, status)
