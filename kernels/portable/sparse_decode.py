"""The three ways in which a sparse code [n, k] meets a table of rows [d_sae, d].

gather_sum   out[t]    = sum_i values[t, i] * table[indices[t, i]]          an embedding bag: the decoder
gather_dot   out[t, i] = <grad[t], table[indices[t, i]]>                    an SDDMM: d values of the decoder
feature_sum  out[f]    = sum over (t, i) with indices[t, i] = f of values[t, i] * rows[t]    an SpMM: d W_dec

The last is the transpose of the first: with the pairs sorted by feature it is an embedding bag too, a bag for each
feature instead of each token. So each sum has a fixed order and needs no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Gathered rows [chunk, k, d] held at a time.
WORKSPACE_BYTES = 16 << 20


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """values [n, k], indices [n, k] int64, table [d_sae, d] -> [n, d] in table's dtype."""
    _check_range(indices, table.shape[0])
    n, k = indices.shape
    if n == 0 or k == 0 or table.shape[1] == 0:
        return table.new_zeros(n, table.shape[1])
    if table.dtype in (torch.float16, torch.bfloat16):
        return _gather_sum_wide(values, indices, table)
    return embedding_bag(indices, table, per_sample_weights=values.to(table.dtype), mode="sum")


def _gather_sum_wide(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """Half precision, summed in float32: the rows are widened a chunk of tokens at a time."""
    out = table.new_empty(indices.shape[0], table.shape[1])
    for chunk in _chunks(indices, table.shape[1]):
        rows = table[indices[chunk]].float()  # [chunk, k, d]
        out[chunk] = torch.bmm(values[chunk].float().unsqueeze(1), rows).squeeze(1)
    return out


def gather_dot(grad: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """grad [n, d], indices [n, k] int64, table [d_sae, d] -> [n, k] in grad's dtype."""
    _check_range(indices, table.shape[0])
    out = grad.new_empty(indices.shape)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    for chunk in _chunks(indices, table.shape[1]):
        rows = table[indices[chunk]].to(wide)  # [chunk, k, d]
        out[chunk] = torch.bmm(rows, grad[chunk].to(wide).unsqueeze(2)).squeeze(2)
    return out


def feature_sum(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """values [n, k], indices [n, k] int64, rows [n, d] -> [d_sae, d] in rows' dtype; zero where none is active."""
    _check_range(indices, d_sae)
    n, k = indices.shape
    if n == 0 or k == 0 or rows.shape[1] == 0:
        return rows.new_zeros(d_sae, rows.shape[1])
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    by_feature = indices.flatten().argsort(stable=True)
    ends = torch.bincount(indices.flatten(), minlength=d_sae).cumsum(0)
    return embedding_bag(
        by_feature // k,
        rows.to(wide),
        offsets=torch.cat([ends.new_zeros(1), ends[:-1]]),
        per_sample_weights=values.flatten()[by_feature].to(wide),
        mode="sum",
    ).to(rows.dtype)


def _chunks(indices: Tensor, d: int) -> list[slice]:
    n, k = indices.shape
    step = max(1, WORKSPACE_BYTES // max(1, 4 * k * d))
    return [slice(start, start + step) for start in range(0, n, step)]


def _check_range(indices: Tensor, d_sae: int) -> None:
    if indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if low < 0 or high >= d_sae:
        raise ValueError(f"indices: given values from {int(low)} to {int(high)}; needed 0 <= index < d_sae = {d_sae}")
