"""The k largest of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_matrix, output_matrix
from .library import check_status, native


def topk_rows(
    pre_acts: Tensor, k: int, values: Tensor | None = None, indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of each row, relu'd after the selection.

    pre_acts [n, d_sae] float32 on the CPU, rows contiguous at any stride, 1 <= k <= d_sae
    -> values [n, k] float32, indices [n, k] int64, written to `values` and `indices` where given (rows contiguous
    at any stride; no part of them may be part of pre_acts).

    Largest first, equal ones (0.0 and -0.0 are equal) by lower index first. A row with a NaN gives k NaN values at
    indices 0..k-1. The result doesn't depend on the number of threads, which is torch.get_num_threads().
    """
    check_matrix("pre_acts", pre_acts, torch.float32, (None, None))
    n, d_sae = pre_acts.shape
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: given {type(k).__name__}; needed int")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k: given {k}; needed 1 <= k <= d_sae, which is {d_sae}")
    values = output_matrix("values", values, torch.float32, (n, k))
    indices = output_matrix("indices", indices, torch.int64, (n, k))
    status = native().csae_topk_rows(
        pre_acts.data_ptr(),
        pre_acts.stride(0),
        n,
        d_sae,
        k,
        values.data_ptr(),
        values.stride(0),
        indices.data_ptr(),
        indices.stride(0),
        torch.get_num_threads(),
    )
    check_status("topk_rows", status)
    return values, indices
