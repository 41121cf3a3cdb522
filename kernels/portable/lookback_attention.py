"""Look-back attention a block of queries at a time: scores [B, H, block, keys up to the block's end].

Forward keeps the log of each softmax's denominator; backward makes the weights again from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Scores of one block of queries.
WORKSPACE_BYTES = 16 << 20


def forward(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor, mask: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, d_head], v [B, T, H, d_value], slope, null [H], mask [B, T] bool, starts [B, T]
    -> out [B, T, H, d_value] in v's dtype, lse [B, H, T] (float32, or float64 for float64 input).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, T, H = v.shape[:3]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, T, dtype=wide, device=v.device)
    k, v = k.to(wide).transpose(1, 2), v.to(wide).transpose(1, 2)  # [B, H, T, .]
    for rows in _query_blocks(B, T, H):
        block_q = q[:, rows].to(wide).transpose(1, 2)  # [B, H, block, d_head]
        scores = _scores(block_q, k, slope, mask, starts, rows)
        nothing = null.to(wide)[None, :, None].expand(B, H, scores.shape[2])
        lse[:, :, rows] = torch.logaddexp(scores.logsumexp(dim=-1), nothing)
        weights = (scores - lse[:, :, rows, None]).exp()
        out[:, rows] = (weights @ v[:, :, : rows.stop]).transpose(1, 2).to(out.dtype)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    null: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, slope and null, each in its own dtype."""
    wide = lse.dtype
    B, T, H, d_head = q.shape
    scale = 1 / math.sqrt(d_head)
    wide_k, wide_v = k.to(wide).transpose(1, 2), v.to(wide).transpose(1, 2)  # [B, H, T, .]
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    d_slope, d_null = slope.new_zeros(H, dtype=wide), null.new_zeros(H, dtype=wide)
    for rows in _query_blocks(B, T, H):
        block_q = q[:, rows].to(wide).transpose(1, 2)  # [B, H, block, d_head]
        block_grad = grad_out[:, rows].to(wide).transpose(1, 2)  # [B, H, block, d_value]
        block_lse = lse[:, :, rows, None]
        scores = _scores(block_q, wide_k, slope, mask, starts, rows)
        weights = (scores - block_lse).exp()  # [B, H, block, keys]
        d_v[:, :, : rows.stop] += weights.transpose(2, 3) @ block_grad
        mean = (block_grad * out[:, rows].to(wide).transpose(1, 2)).sum(-1, keepdim=True)  # [B, H, block, 1]
        d_scores = weights * (block_grad @ wide_v[:, :, : rows.stop].transpose(2, 3) - mean)
        d_q[:, rows] = (d_scores @ wide_k[:, :, : rows.stop] * scale).transpose(1, 2).to(d_q.dtype)
        d_k[:, :, : rows.stop] += d_scores.transpose(2, 3) @ block_q * scale
        d_slope -= torch.einsum("bhtj,tj->h", d_scores, _log_distance(rows, q.device, wide))
        d_null -= ((null.to(wide)[:, None, None] - block_lse).exp() * mean).sum(dim=(0, 2, 3))
    return (
        d_q,
        d_k.transpose(1, 2).to(k.dtype).contiguous(),
        d_v.transpose(1, 2).to(v.dtype).contiguous(),
        d_slope.to(slope.dtype),
        d_null.to(null.dtype),
    )


def _query_blocks(B: int, T: int, H: int) -> Iterator[slice]:
    step = max(1, min(128, WORKSPACE_BYTES // max(1, 4 * B * H * T)))
    for start in range(0, T, step):
        yield slice(start, min(start + step, T))


def _scores(q: Tensor, k: Tensor, slope: Tensor, mask: Tensor | None, starts: Tensor | None, rows: slice) -> Tensor:
    """Scores [B, H, block, rows.stop] of queries q [B, H, block, d_head] at `rows`; -inf where not visible."""
    position = torch.arange(rows.stop, device=q.device)
    visible = (position[None, :] < position[rows, None])[None]  # [1, block, keys]
    if starts is not None:
        visible = visible & (position >= starts[:, rows, None])
    if mask is not None:
        visible = visible & mask[:, None, : rows.stop] & mask[:, rows, None]
    scores = q @ k[:, :, : rows.stop].transpose(2, 3) * (1 / math.sqrt(q.shape[-1]))
    scores -= slope.to(q.dtype)[:, None, None] * _log_distance(rows, q.device, q.dtype)
    return scores.masked_fill_(~visible[:, None], -math.inf)


def _log_distance(rows: slice, device: torch.device, dtype: torch.dtype) -> Tensor:
    """log(t - j) for t in rows, j < rows.stop: [block, rows.stop]; zero where j is not before t."""
    position = torch.arange(rows.stop, device=device)
    return (position[rows, None] - position[None, :]).clamp_(min=1).to(dtype).log_()
