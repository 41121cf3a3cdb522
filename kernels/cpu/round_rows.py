"""Rows of float32 as bfloat16, and what that takes from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_matrix, output_matrix
from .library import check_status, native


class Rounded(NamedTuple):
    """Rows [n, d] rounded to the nearest bfloat16."""

    rows: Tensor
    """[n, d] bfloat16"""
    lengths: Tensor
    """[n] float32: of the rows as they were"""
    errors: Tensor
    """[n] float32: the length of what the rounding took; both to one part in 2^10, but for squares below 2^-126"""


def round_rows(rows: Tensor, out: Tensor | None = None) -> Rounded:
    """rows [n, d] float32, contiguous at any stride -> `Rounded`, its rows in `out` [n, d] bfloat16 if given."""
    check_matrix("rows", rows, torch.float32, (None, None))
    n, d = rows.shape
    out = output_matrix("out", out, torch.bfloat16, (n, d))
    lengths, errors = torch.empty(n), torch.empty(n)
    status = native().csae_round_rows(
        *(rows.data_ptr(), rows.stride(0), n, d, out.data_ptr(), out.stride(0)),
        *(lengths.data_ptr(), errors.data_ptr(), torch.get_num_threads()),
    )
    check_status("round_rows", status)
    return Rounded(out, lengths, errors)
