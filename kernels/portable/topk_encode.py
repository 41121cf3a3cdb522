"""Encode and select: a chunk of rows at a time is multiplied into one reused buffer and searched there."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import on_native

# Pre-activations of one chunk. Few enough to be read back from cache, enough rows for an efficient product.
WORKSPACE_BYTES = 16 << 20


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [n, k] in x's dtype, indices [n, k] int64.

    Selection is on float32 pre-activations (float64 for float64 input), whatever the input's dtype.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = torch.empty(n, k, dtype=accumulator, device=x.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0:
        return values.to(x.dtype), indices
    rows = max(1, min(n, WORKSPACE_BYTES // (d_sae * accumulator.itemsize)))
    workspace = torch.empty(rows, d_sae, dtype=accumulator, device=x.device)
    for start in range(0, n, rows):
        chunk = x[start : start + rows]
        pre_acts = workspace[: chunk.shape[0]]
        _pre_acts(chunk, W_enc, b_enc, pre_acts)
        _select(pre_acts, k, values[start : start + rows], indices[start : start + rows])
    return values.to(x.dtype), indices


def _pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, out: Tensor) -> None:
    """out [rows, d_sae] = x W_enc^T + b_enc, accumulated in out's dtype."""
    if x.dtype == out.dtype:
        torch.addmm(b_enc, x, W_enc.T, out=out)
        return
    # Half precision is widened a block of features at a time: W_enc is never copied whole.
    x = x.to(out.dtype)
    for start in range(0, W_enc.shape[0], 4096):
        block = slice(start, start + 4096)
        torch.addmm(b_enc[block].to(out.dtype), x, W_enc[block].to(out.dtype).T, out=out[:, block])


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
