"""topk_encode on the CPU: the product is torch's, the selection native.

It is `csae.kernels.portable.topk_encode` with another inner loop: a short list of candidates a row is kept from tile to
tile, so that a tile costs one comparison an entry. Large products go to `topk_coarse`, where this CPU
multiplies bfloat16 faster.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from ..portable import topk_encode as portable
from ..portable.topk_encode import WIDE_BYTES, Inner, encode, output, slices
from . import topk_coarse
from .arguments import with_rows
from .memory import fresh
from .round_rows import PairedRows
from .topk_rows import topk_add, topk_capacity, topk_finish, topk_start

# Pre-activations of one tile, and the candidates of its rows.
TILE_BYTES = 12 << 20
CANDIDATES_BYTES = 8 << 20
TILE_ROWS = 2048


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [n, k] in `dtype` or x's, indices [n, k] int64.

    Of one dtype, float32, bfloat16 or float16. Selection is on float32 pre-activations.
    """
    if x.shape[0] >= topk_coarse.LEAST_ROWS and topk_coarse.worthwhile(W_enc, k):
        return encode_by_table(x, W_enc, b_enc, k, [], None, dtype)[:2]
    values, indices = encode(x, W_enc, b_enc, k, INNER)
    return values.to(dtype or x.dtype), indices


def round_table(W_enc: Tensor, b_enc: Tensor, k: int) -> list[Tensor]:
    """What can be made of the weights once: the pairs and lengths (`PairedRows`) of all rows, and of a sample.

    For `encode_by_table`. Empty where it is no gain.
    """
    if not topk_coarse.worthwhile(W_enc, k):
        return []
    rows, bias = with_rows(W_enc), b_enc.float()
    return [*topk_coarse.rounded(rows, bias), *topk_coarse.sample_of(rows, bias, k)]


def encode_by_table(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    table: list[Tensor],
    last: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """topk_encode by `topk_coarse`, and in float32 for the rows that it leaves unsettled.

    table: the `round_table` of the weights; where it is empty, they are rounded a tile at a time.
    last: what the call before gave, if its rows were much like these. The result does not depend on it, only the time.

    -> values [n, k], indices [n, k], and [2, n] float32 for the next call.
    """
    values, indices = output(x, k)
    W_enc, bias = with_rows(W_enc), b_enc.float()
    rounded, sample = (PairedRows(*table[:2]), PairedRows(*table[2:])) if table else (None, None)
    last = None if last is None or last.shape[1] != x.shape[0] else last
    reached = x.new_zeros(2, x.shape[0], dtype=torch.float32)
    rows, _ = _tile(x, W_enc.shape[0], topk_coarse.candidates(k))
    for here in slices(x.shape[0], rows):
        acts, found = x[here].float().contiguous(), (values[here], indices[here])
        sampled = len(acts) >= topk_coarse.LEAST_SAMPLED
        if sampled and sample is None:
            sample = topk_coarse.sample_of(W_enc, bias, k)
        before = last[:, here] if sampled and last is not None else None
        settled, reached[:, here] = topk_coarse.topk_encode(
            *(acts, W_enc, bias, k, *found, rounded, sample if sampled else None, before)
        )
        if not settled.all():
            left = (~settled).nonzero().squeeze(1)
            found[0][left], found[1][left] = encode(acts[left], W_enc, bias, k, INNER)
    return values.to(dtype or x.dtype), indices, reached


def rows_at_once(x: Tensor, capacity: int) -> int:
    """Rows whose lists of candidates, of this capacity, are held at the same time."""
    n, d_in = x.shape
    rows = min(TILE_ROWS, CANDIDATES_BYTES // (8 * capacity))
    if x.dtype != torch.float32:
        rows = min(rows, WIDE_BYTES // (4 * max(1, d_in)))
    # Chunks of nearly equal size.
    return -(-n // -(-n // max(1, rows))) if n else 0


def _tile(x: Tensor, d_sae: int, k: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    rows = rows_at_once(x, topk_capacity(d_sae, k))
    columns = max(1, TILE_BYTES // 4 // max(1, rows))
    # The native library reads 64 columns at a time.
    return rows, min(d_sae, columns if columns < 64 else columns // 64 * 64)


def _select(tiles: Iterable[tuple[slice, Tensor]], bias: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """The k largest of each row of the tiles + bias [d_sae], relu'd, into values and indices [rows, k]."""
    best = topk_start(values.shape[0], bias.shape[0], k)
    for columns, pre_acts in tiles:
        topk_add(best, pre_acts, bias[columns], columns.start)
    topk_finish(best, values, indices)


INNER = Inner(_tile, _select, lambda shape, like: fresh(shape, like.dtype))
encode_and_keep = partial(portable.encode_and_keep, inner=INNER)
encode_again = partial(portable.encode_again, inner=INNER)
