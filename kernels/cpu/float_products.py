"""Matrix products of float32 on bfloat16 matrix units (AMX): a bf16x3 GEMM (see src/attention/float_products.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_strided
from .library import OUT_OF_RANGE, check_status, native
from .memory import fresh


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n], float32 -> [m, n].

    As exact as torch.mm; faster than it if `has_matrix_units()`, otherwise much slower. The result doesn't depend on
    the number of threads.

    It is torch.mm where sums might overflow: a number is not finite, or max|a| * max|b| * k >= 2^127. Numbers below
    2^-103 lose digits; numbers and products below 2^-126 may count as zero.
    """
    check_strided("a", a, torch.float32, (None, None))
    (m, k), n = a.shape, b.shape[-1] if isinstance(b, Tensor) and b.ndim > 0 else None
    check_strided("b", b, torch.float32, (k, n))
    a, b = (matrix if 1 in matrix.stride() else matrix.contiguous() for matrix in (a, b))
    out = fresh((m, b.shape[1]), torch.float32)
    status = native().csae_multiply(
        *(a.data_ptr(), *_strides(a), b.data_ptr(), *_strides(b)),
        *(m, b.shape[1], k, out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )
    if status == OUT_OF_RANGE:
        return a @ b
    check_status("multiply", status)
    return out


def _strides(matrix: Tensor) -> tuple[int, int]:
    """The strides (row, column) of a matrix, of which one is 1; that of a dimension of size 0 or 1 has no meaning."""
    row, column = matrix.stride()
    return (row, 1) if matrix.shape[1] <= 1 else (1, column) if matrix.shape[0] <= 1 else (row, column)
