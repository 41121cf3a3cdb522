"""Encode and select: a tile of pre-activations at a time is multiplied into one reused buffer and searched there.

A tile is many rows by some of the features: the product is efficient, and its result is still in cache when it is
searched. What is left of each tile is its k best, and of these the k best are taken. Where k is large against a
tile's width, a tile is some rows by all features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import on_native

# Pre-activations of one tile.
WORKSPACE_BYTES = 16 << 20
TILE_ROWS = 1024
# A tile of fewer columns than this many times k is hardly narrowed down by taking its k best.
COLUMNS_PER_K = 16


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [n, k] in x's dtype, indices [n, k] int64.

    Selection is on float32 pre-activations (float64 for float64 input), whatever the input's dtype.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = torch.empty(n, k, dtype=wide, device=x.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0:
        return values.to(x.dtype), indices
    rows, columns = _tile(n, d_sae, k, wide.itemsize)
    workspace = torch.empty(rows * columns, dtype=wide, device=x.device)
    for first_row in range(0, n, rows):
        here = slice(first_row, min(first_row + rows, n))
        acts = x[here].to(wide)
        found = []
        for first in range(0, d_sae, columns):
            W, b = W_enc[first : first + columns], b_enc[first : first + columns]
            pre_acts = workspace[: acts.shape[0] * W.shape[0]].view(acts.shape[0], W.shape[0])
            _pre_acts(acts, W, b, pre_acts)
            if columns >= d_sae:
                _select(pre_acts, k, values[here], indices[here])
            else:
                found.append(_best_of_tile(pre_acts, min(k, W.shape[0]), first))
        if found:
            _merge(found, k, values[here], indices[here])
    return values.to(x.dtype), indices


def _tile(n: int, d_sae: int, k: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    pre_acts = WORKSPACE_BYTES // itemsize
    rows = min(n, TILE_ROWS)
    columns = max(1, pre_acts // rows)
    if columns >= d_sae or columns < COLUMNS_PER_K * k:
        return max(1, min(n, pre_acts // d_sae)), d_sae
    return rows, columns


def _pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, out: Tensor) -> None:
    """out [rows, columns] = x W_enc^T + b_enc, in the dtype of x and out."""
    if W_enc.dtype == out.dtype:
        torch.addmm(b_enc, x, W_enc.T, out=out)
        return
    # Half precision is widened a block of features at a time: W_enc is never copied whole.
    for start in range(0, W_enc.shape[0], 4096):
        block = slice(start, start + 4096)
        torch.addmm(b_enc[block].to(out.dtype), x, W_enc[block].to(out.dtype).T, out=out[:, block])


def _best_of_tile(pre_acts: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row as they are, not relu'd, and their features; NaN where the row has a NaN."""
    values = pre_acts.new_empty(pre_acts.shape[0], k)
    indices = torch.empty_like(values, dtype=torch.int64)
    _select(pre_acts, k, values, indices)
    return torch.where(values.isnan(), values, pre_acts.gather(1, indices)), indices + first


def _merge(found: list[tuple[Tensor, Tensor]], k: int, values: Tensor, indices: Tensor) -> None:
    """The k best of what the tiles of a row left; tiles are in the order of features, so ties fall as they should."""
    candidates, features = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    _select(candidates, k, values, indices)
    chosen = features.gather(1, indices)
    # A broken row's indices are 0..k-1 already.
    torch.where(values.isnan(), indices, chosen, out=indices)


def _select(pre_acts: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """The k largest of each row, relu'd, into values and indices [rows, k]; equal ones by lower index."""
    if on_native(pre_acts):
        cpu.topk_rows(pre_acts, k, values, indices)
        return
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
