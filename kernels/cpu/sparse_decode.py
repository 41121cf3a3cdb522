"""The decoder and its gradients: three products of a sparse code [n, k] and a table of rows [d_sae, d].

gather_sum   out[t]    = sum_i values[t, i] * table[indices[t, i]]    a weighted embedding bag
gather_dot   out[t, i] = <grad[t], table[indices[t, i]]>              an SDDMM
feature_sum  out[f]    = sum over (t, i) with indices[t, i] = f of values[t, i] * rows[t]    an SpMM, code^T rows

Each row of a code ends at its length (`csae.kernels.codes`). `csae.kernels.portable.sparse_decode` has the same
functions. Tensors are on the CPU; indices are int64, all else is
float32 or bfloat16. Each sum is float32 and has a fixed order, so results don't depend on the number of threads, which
is torch.get_num_threads(). TypeError and ValueError name the argument that doesn't fit; an index outside of [0, d_sae)
is a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import before_length, check_indices
from .arguments import STORED, check_count, check_strided, with_rows
from .feature_rows import feature_sums, sort_pairs
from .library import BAD_INDEX, TYPES, check_status, native
from .memory import fresh


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """values [n, k], indices [n, k], table [d_sae, d] -> [n, d] in table's dtype."""
    check_strided("values", values, STORED, (None, None))
    n, k = values.shape
    check_strided("indices", indices, torch.int64, (n, k))
    check_strided("table", table, STORED, (None, None))
    d_sae, d = table.shape
    values, indices, table = with_rows(values.float()), with_rows(indices), with_rows(table)
    out = fresh((n, d), table.dtype)
    status = native().csae_gather_sum(
        *(values.data_ptr(), values.stride(0), indices.data_ptr(), indices.stride(0), n, k),
        *(table.data_ptr(), table.stride(0), d_sae, d, TYPES[table.dtype]),
        *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )
    _check(status, "gather_sum", values, indices, d_sae)
    return out


def gather_dot(grad: Tensor, values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """grad [n, d], values [n, k], indices [n, k], table [d_sae, d] -> [n, k] in grad's dtype; 0 behind the length."""
    check_strided("table", table, STORED, (None, None))
    d_sae, d = table.shape
    check_strided("grad", grad, STORED, (None, d))
    n = grad.shape[0]
    check_strided("values", values, STORED, (n, None))
    k = values.shape[1]
    check_strided("indices", indices, torch.int64, (n, k))
    rows, values = with_rows(grad.float()), with_rows(values.float())
    indices, table = with_rows(indices), with_rows(table)
    out = fresh((n, k), torch.float32)
    status = native().csae_gather_dot(
        *(rows.data_ptr(), rows.stride(0), values.data_ptr(), values.stride(0)),
        *(indices.data_ptr(), indices.stride(0), n, k),
        *(table.data_ptr(), table.stride(0), d_sae, d, TYPES[table.dtype]),
        *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )
    _check(status, "gather_dot", values, indices, d_sae)
    return out.to(grad.dtype)


def feature_sum(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """values [n, k], indices [n, k], rows [n, d] -> [d_sae, d] in rows' dtype, zero for a feature in no code."""
    check_strided("values", values, STORED, (None, None))
    n, k = values.shape
    check_strided("indices", indices, torch.int64, (n, k))
    check_strided("rows", rows, STORED, (n, None))
    check_count("d_sae", d_sae)
    live = before_length(values)
    pairs = sort_pairs(torch.where(live, indices, d_sae).flatten(), torch.arange(n).repeat_interleave(k), d_sae)
    if pairs.ends[-1] != live.sum():
        check_indices(indices[live], d_sae)
    return feature_sums(pairs, [values.flatten()], [rows])[0]


def _check(status: int, function: str, values: Tensor, indices: Tensor, d_sae: int) -> None:
    if status == BAD_INDEX:
        check_indices(indices[before_length(values)], d_sae)
    check_status(function, status)
