"""topk_encode, a tile of pre-activations at a time: it is multiplied into one reused buffer and searched there.

A tile is many rows by some of the features: the product is efficient, and its result is still in cache when it is
searched. The k best of each tile are kept, and the k best of these are the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Pre-activations of one tile.
TILE_BYTES = 16 << 20
TILE_ROWS = 1024
# A tile of fewer columns than this many times k is hardly narrowed down by taking its k best.
COLUMNS_PER_K = 16
# Half precision is widened so much of W_enc at a time: W_enc is never copied whole.
WIDE_BYTES = 4 << 20


class Inner(NamedTuple):
    """The inner loop: `kernels/cpu` has another, with sizes that suit it."""

    tile: Callable[[Tensor, int, int], tuple[int, int]]
    """x, d_sae, k -> rows and columns of a tile"""
    select: Callable[[Iterable[tuple[slice, Tensor]], Tensor, int, Tensor, Tensor], None]
    """as `select`"""
    new: Callable[[tuple[int, ...], Tensor], Tensor]
    """a new tensor of this shape, of the other's dtype and device"""


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [n, k] in `dtype` or x's, indices [n, k] int64.

    Selection is on float32 pre-activations (float64 for float64 input), whatever the input's dtype.
    """
    values, indices = encode(x, W_enc, b_enc, k, INNER)
    return values.to(dtype or x.dtype), indices


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, inner: Inner) -> tuple[Tensor, Tensor]:
    """topk_encode, values in the dtype of selection."""
    values, indices = output(x, k)
    bias = b_enc.to(values.dtype)
    rows, columns = inner.tile(x, W_enc.shape[0], k)
    workspace = inner.new((rows * columns,), values)
    for here in slices(x.shape[0], rows):
        tiles = _products(x[here].to(values.dtype), W_enc, columns, workspace)
        inner.select(tiles, bias, k, values[here], indices[here])
    return values, indices


def encode_and_keep(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, inner: Inner | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """topk_encode, and all of its pre-activations for `encode_again`: [n, d_sae] in the dtype of selection."""
    inner = inner or INNER
    values, indices = output(x, k)
    bias = b_enc.to(values.dtype)
    rows, columns = inner.tile(x, W_enc.shape[0], k)
    kept = inner.new((x.shape[0], W_enc.shape[0]), values)
    for here in slices(x.shape[0], rows):
        tiles = _updates(kept[here], bias, x[here].to(values.dtype), W_enc, columns)
        inner.select(tiles, torch.zeros_like(bias), k, values[here], indices[here])
    return values.to(dtype or x.dtype), indices, kept


def encode_again(
    kept: Tensor, a: Tensor, W_a: Tensor, k: int, inner: Inner | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of kept - a W_a^T in each row, relu'd, as topk_encode has them; kept becomes kept - a W_a^T.

    kept [n, d_sae] from `encode_and_keep`, a [n, r], W_a [d_sae, r] -> values [n, k] in `dtype` or a's, indices [n, k].
    """
    inner = inner or INNER
    values, indices = output(a, k)
    rows, columns = inner.tile(a, W_a.shape[0], k)
    no_bias = kept.new_zeros(kept.shape[1])
    for here in slices(a.shape[0], rows):
        tiles = _updates(kept[here], None, -a[here].to(values.dtype), W_a, columns)
        inner.select(tiles, no_bias, k, values[here], indices[here])
    return values.to(dtype or a.dtype), indices


def select_kept(kept: Tensor, k: int, inner: Inner) -> tuple[Tensor, Tensor]:
    """What `inner` selects of pre-activations that were kept, [n, d_sae]; values in the dtype of selection."""
    values, indices = output(kept, k)
    no_bias = kept.new_zeros(kept.shape[1])
    rows, columns = inner.tile(kept, kept.shape[1], k)
    for here in slices(kept.shape[0], rows):
        tiles = ((block, kept[here, block]) for block in slices(kept.shape[1], columns))
        inner.select(tiles, no_bias, k, values[here], indices[here])
    return values, indices


def round_table(W_enc: Tensor, b_enc: Tensor, k: int) -> list[Tensor]:
    """Nothing: only the native kernels gain by weights that were rounded before."""
    return []


def output(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values and indices [n, k]; values in the dtype of selection."""
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=wide(x)), x.new_empty(shape, dtype=torch.int64)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of selection."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tile(x: Tensor, d_sae: int, k: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    n = x.shape[0]
    pre_acts = TILE_BYTES // (8 if x.dtype == torch.float64 else 4)
    rows = min(n, TILE_ROWS)
    columns = max(1, pre_acts // max(1, rows))
    if columns >= d_sae or columns < COLUMNS_PER_K * k:
        return max(1, min(n, pre_acts // d_sae)), d_sae
    return rows, columns


def slices(n: int, step: int) -> Iterator[slice]:
    """0 to n, so many at a time."""
    for start in range(0, n, max(1, step)):
        yield slice(start, min(start + step, n))


def _products(acts: Tensor, W: Tensor, columns: int, workspace: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """acts W^T [rows, d_sae] in tiles, each of which is gone when the next one comes."""
    for block in slices(W.shape[0], columns):
        width = block.stop - block.start
        out = workspace[: acts.shape[0] * width].view(acts.shape[0], width)
        _multiply(acts, W[block], out, beta=0)
        yield block, out


def _updates(
    kept: Tensor, start: Tensor | None, acts: Tensor, W: Tensor, columns: int
) -> Iterator[tuple[slice, Tensor]]:
    """kept [rows, d_sae] += acts W^T in tiles; kept begins as start [d_sae] where that is given."""
    for block in slices(W.shape[0], columns):
        out = kept[:, block]
        if start is not None:
            out.copy_(start[block])
        _multiply(acts, W[block], out, beta=1)
        yield block, out


def _multiply(acts: Tensor, W: Tensor, out: Tensor, beta: int) -> None:
    """out = beta out + acts W^T, in the dtype of acts and out."""
    if W.dtype == out.dtype:
        out.addmm_(acts, W.T, beta=beta)
        return
    for block in slices(W.shape[0], WIDE_BYTES // (out.itemsize * max(1, W.shape[1]))):
        out[:, block].addmm_(acts, W[block].to(out.dtype).T, beta=beta)


def select(tiles: Iterable[tuple[slice, Tensor]], bias: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """The k largest of each row of the tiles + bias [d_sae], relu'd, into values and indices [rows, k].

    tiles: columns and pre-activations [rows, columns], in the order of columns; equal ones by lower index.
    """
    found = []
    for columns, pre_acts in tiles:
        pre_acts += bias[columns]
        if pre_acts.shape[1] == bias.shape[0]:
            _select_from(pre_acts, k, values, indices)
            return
        found.append(_best_of_tile(pre_acts, min(k, pre_acts.shape[1]), columns.start))
    _merge(found, k, values, indices)


def _best_of_tile(pre_acts: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row as they are, not relu'd, and their features; NaN where the row has a NaN."""
    values = pre_acts.new_empty(pre_acts.shape[0], k)
    indices = torch.empty_like(values, dtype=torch.int64)
    _select_from(pre_acts, k, values, indices)
    return torch.where(values.isnan(), values, pre_acts.gather(1, indices)), indices + first


def _merge(found: list[tuple[Tensor, Tensor]], k: int, values: Tensor, indices: Tensor) -> None:
    """The k best of what the tiles of a row left; tiles are in the order of features, so ties fall as they should."""
    candidates, features = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    _select_from(candidates, k, values, indices)
    chosen = features.gather(1, indices)
    # A broken row's indices are 0..k-1 already.
    torch.where(values.isnan(), indices, chosen, out=indices)


def _select_from(pre_acts: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """The k largest of each row, relu'd, into values and indices [rows, k]; equal ones by lower index."""
    found, where = pre_acts.topk(k, dim=1)
    # torch.topk takes any of several equal entries: rows with a tie at the threshold are selected again.
    tied = (pre_acts >= found[:, -1:]).sum(dim=1) > k
    if tied.any():
        found[tied], where[tied] = _stable_topk(pre_acts[tied], k)
    where, by_index = where.sort(dim=1)
    found, by_value = found.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    indices.copy_(where.gather(1, by_value))
    values.copy_(found.relu())
    broken = pre_acts.isnan().any(dim=1, keepdim=True)
    values.masked_fill_(broken, torch.nan)
    torch.where(broken, torch.arange(k, device=indices.device), indices, out=indices)


def _stable_topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found, where = pre_acts.sort(dim=1, descending=True, stable=True)
    return found[:, :k], where[:, :k]


INNER = Inner(_tile, select, lambda shape, like: like.new_empty(shape))
