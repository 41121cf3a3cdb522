"""Rows rounded to bfloat16, and the norms of the rounding errors: in rows, or in the layout that AMX reads.

"Length" is the Euclidean norm of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import STORED, check_matrix, output_matrix
from .library import TYPES, check_status, native
from .memory import fresh

# Rows of a block in the paired layout, and the numbers that `round_pairs` appends to a row.
BLOCK, BESIDE = 16, 4


class Rounded(NamedTuple):
    """Rows [n, d] rounded to the nearest bfloat16."""

    rows: Tensor
    """[n, d] bfloat16"""
    lengths: Tensor
    """[n] float32: length of each unrounded row"""
    errors: Tensor
    """[n] float32: length of row - rounded row. Both are exact to 2^-10, except that squares below 2^-126 are lost"""


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


class PairedRows(NamedTuple):
    """A table [n, width] of bfloat16, in the layout of AMX's right operand: blocks of 16 rows, interleaved by pairs."""

    pairs: Tensor
    """[ceil(n / 16), width / 2, 16, 2] bfloat16; zero for rows beyond n"""
    lengths: Tensor
    """[n] float32: upper bounds of the lengths of the unrounded rows"""


def paired_room(n: int, width: int) -> Tensor:
    """An output for `round_pairs`, for n rows of an even width."""
    return fresh((-(-n // BLOCK), width // 2, BLOCK, 2), torch.bfloat16)


def round_pairs(rows: Tensor, bias: Tensor, unseen: float, above: float, out: Tensor) -> PairedRows:
    """rows [n, d] float32 or bfloat16, contiguous at any stride -> `PairedRows`, in `out`, a `paired_room`.

    A row is its rounded numbers, its two numbers of bias [n, 2] bfloat16, upper bounds of the row's length and of its
    rounding error's, then zeros. The upper bounds are (length + unseen) * above.
    """
    check_matrix("rows", rows, STORED, (None, None))
    n, d = rows.shape
    check_matrix("bias", bias, torch.bfloat16, (n, 2))
    bias = bias.contiguous()
    width = 2 * out.shape[1]
    wanted = (-(-n // BLOCK), width // 2, BLOCK, 2)
    if tuple(out.shape) != wanted or out.dtype != torch.bfloat16 or not out.is_contiguous() or width < d + BESIDE:
        raise ValueError(
            f"out: given {out.dtype} {list(out.shape)}; needed contiguous bfloat16 {list(wanted)}, with room for "
            f"{d + BESIDE} numbers a row"
        )
    lengths = torch.empty(n)
    status = native().csae_round_pairs(
        *(rows.data_ptr(), rows.stride(0), n, d, TYPES[rows.dtype], bias.data_ptr(), unseen, above),
        *(width, out.data_ptr(), lengths.data_ptr(), torch.get_num_threads()),
    )
    check_status("round_pairs", status)
    return PairedRows(out, lengths)
