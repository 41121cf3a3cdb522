"""The three ways in which a sparse code [n, k] meets a table of rows [d_sae, d].

gather_sum   out[t]    = sum_i values[t, i] * table[indices[t, i]]          an embedding bag: the decoder
gather_dot   out[t, i] = <grad[t], table[indices[t, i]]>                    an SDDMM: d values of the decoder
feature_sum  out[f]    = sum over (t, i) with indices[t, i] = f of values[t, i] * rows[t]    an SpMM: d W_dec

Each row of a code ends at its length (`kernels/codes.py`), so its entries are taken as a CSR matrix: those of all rows
one after the other.

The last is the transpose of the first: with the entries sorted by feature it is an embedding bag too, a bag for each
feature instead of each token. So each sum has a fixed order and needs no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..codes import before_length, check_indices

# Gathered rows [chunk * k, d] held at a time: so few that a core's cache holds them.
WORKSPACE_BYTES = 1 << 20


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """values [n, k], indices [n, k] int64, table [d_sae, d] -> [n, d] in table's dtype."""
    live = before_length(values)
    features = _entries(indices, live)
    check_indices(features, table.shape[0])
    if indices.numel() == 0 or table.shape[1] == 0:
        return table.new_zeros(indices.shape[0], table.shape[1])
    if table.dtype not in (torch.float16, torch.bfloat16):
        return _bags(features, table, live.sum(dim=1), _entries(values, live))
    # Half precision is summed in float32: the rows are widened a chunk of tokens at a time.
    out = table.new_empty(indices.shape[0], table.shape[1])
    for chunk in _chunks(indices, table.shape[1]):
        here = live[chunk]
        rows = table[_entries(indices[chunk], here)].float()
        places = torch.arange(len(rows), device=rows.device)
        out[chunk] = _bags(places, rows, here.sum(dim=1), _entries(values[chunk], here))
    return out


def gather_dot(grad: Tensor, values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """grad [n, d], values, indices [n, k] int64, table [d_sae, d] -> [n, k] in grad's dtype; 0 behind the length."""
    live = before_length(values)
    check_indices(_entries(indices, live), table.shape[0])
    out = grad.new_zeros(indices.shape)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    for chunk in _chunks(indices, table.shape[1]):
        here = live[chunk]
        rows = table[_entries(indices[chunk], here)].to(wide)  # [entries, d]
        of_tokens = grad[chunk].to(wide).repeat_interleave(here.sum(dim=1), dim=0)
        out[chunk].masked_scatter_(here, torch.linalg.vecdot(rows, of_tokens).to(grad.dtype))
    return out


def feature_sum(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """values [n, k], indices [n, k] int64, rows [n, d] -> [d_sae, d] in rows' dtype; zero where none is active."""
    live = before_length(values)
    features = _entries(indices, live)
    check_indices(features, d_sae)
    if features.numel() == 0 or rows.shape[1] == 0:
        return rows.new_zeros(d_sae, rows.shape[1])
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    tokens = torch.arange(len(rows), device=rows.device).repeat_interleave(live.sum(dim=1))
    by_feature = features.argsort(stable=True)
    counts = torch.bincount(features, minlength=d_sae)
    return _bags(tokens[by_feature], rows.to(wide), counts, _entries(values, live)[by_feature]).to(rows.dtype)


def _entries(of: Tensor, live: Tensor) -> Tensor:
    """of, live [n, k] -> those of all rows one after the other, [entries]. Full codes need no search."""
    return of.flatten() if live.all() else of[live]


def _bags(indices: Tensor, table: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums [n, d] of rows of a table: of the first counts[0] of `indices`, the next counts[1], and so on."""
    return embedding_bag(
        indices, table, counts.cumsum(0) - counts, per_sample_weights=weights.to(table.dtype), mode="sum"
    )


def _chunks(indices: Tensor, d: int) -> list[slice]:
    n, k = indices.shape
    step = max(1, WORKSPACE_BYTES // max(1, 4 * k * d))
    return [slice(start, start + step) for start in range(0, n, step)]
