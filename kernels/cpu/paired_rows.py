"""Rows of bfloat16 as matrix units take them: two numbers of a row beside the same two of the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_matrix, fresh
from .library import check_status, native

# Rows whose pairs lie side by side.
BLOCK = 16


class PairedRows(NamedTuple):
    """A table [n, width] of bfloat16."""

    pairs: Tensor
    """[n / 16, rounded up, width / 2, 16, 2] bfloat16; zero for rows that there are not"""
    n: int


def paired_room(n: int, width: int) -> Tensor:
    """What `pair_rows` writes to, for n rows of an even width."""
    return fresh((-(-n // BLOCK), width // 2, BLOCK, 2), torch.bfloat16)


def pair_rows(rows: Tensor, out: Tensor | None = None) -> PairedRows:
    """rows [n, width] bfloat16, contiguous at any stride -> `PairedRows`, in `out`, a `paired_room`, if given."""
    check_matrix("rows", rows, torch.bfloat16, (None, None))
    n, width = rows.shape
    if width % 2:
        raise ValueError(f"rows: given shape {list(rows.shape)}; needed an even number of columns")
    out = paired_room(n, width) if out is None else out
    wanted = (-(-n // BLOCK), width // 2, BLOCK, 2)
    if tuple(out.shape) != wanted or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError(f"out: given {out.dtype} {list(out.shape)}; needed contiguous bfloat16 {list(wanted)}")
    status = native().csae_pair_rows(rows.data_ptr(), rows.stride(0), n, width, out.data_ptr(), torch.get_num_threads())
    check_status("pair_rows", status)
    return PairedRows(out, n)
