"""Rows as bfloat16, and what that takes from them: row by row, or in pairs, as matrix units take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import STORED, check_matrix, output_matrix
from .library import TYPES, check_status, native
from .memory import fresh

# Rows whose pairs lie side by side, and how many numbers `round_pairs` puts beside a row.
BLOCK, BESIDE = 16, 4


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


class PairedRows(NamedTuple):
    """A table [n, width] of bfloat16, two numbers of a row beside the same two of the next."""

    pairs: Tensor
    """[n / 16, rounded up, width / 2, 16, 2] bfloat16; zero for rows that there are not"""
    lengths: Tensor
    """[n] float32: of the rows that were rounded, made larger"""


def paired_room(n: int, width: int) -> Tensor:
    """What `round_pairs` writes to, for n rows of an even width."""
    return fresh((-(-n // BLOCK), width // 2, BLOCK, 2), torch.bfloat16)


def round_pairs(rows: Tensor, bias: Tensor, unseen: float, above: float, out: Tensor) -> PairedRows:
    """rows [n, d] float32 or bfloat16, contiguous at any stride -> `PairedRows`, in `out`, a `paired_room`.

    Beside a row's numbers are the two of bias [n, 2] bfloat16, the row's length, and that of what rounding took from
    it, both made larger: (length + unseen) * above. Then zeros.
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
