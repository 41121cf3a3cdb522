"""Look-back attention of one position of each of B sequences to its memory of earlier positions.

In language models this is decoding with a key-value cache; here the cache is a ring buffer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def read_memory(
    q: Tensor,
    memory: Tensor,
    takes_part: Tensor,
    slope: Tensor,
    null: Tensor,
    start: Tensor,
    looks: Tensor,
    t: int | Tensor,
) -> Tensor:
    """Position t of B sequences looks at the positions before it: forward, for one position at a time.

    t: a number, or a tensor [1] int64, so that a CUDA graph can be run again for the next position.

    q [B, H, d_head]; memory [B, L, H * (d_head + d_value)]: the keys of all heads, then their values, of position j
    in row j % L; takes_part [B, L] bool: which may be looked at; start [B]: the first position in sight; looks [B]
    bool: which sequences look at all -> [B, H * d_value] in memory's dtype. What is more than L back is forgotten.
    """
    B, H, d_head = q.shape
    room = min(t, memory.shape[1]) if isinstance(t, int) else memory.shape[1]
    rows = torch.arange(room, device=q.device)
    distance = 1 + (t - 1 - rows) % memory.shape[1]
    visible = takes_part[:, :room] & (rows < t) & (t - distance >= start[:, None]) & looks[:, None]
    keys = memory[:, :room, : H * d_head].unflatten(2, (H, d_head))  # [B, room, H, d_head]
    values = memory[:, :room, H * d_head :].unflatten(2, (H, -1))
    scores = torch.einsum("bhd,bjhd->bhj", q, keys) * (1 / math.sqrt(d_head))
    scores -= slope[:, None] * distance.to(scores.dtype).log()
    scores.masked_fill_(~visible[:, None], -math.inf)
    weights = torch.cat([scores, null[:, None].expand(B, H, 1)], dim=2).softmax(dim=2)[:, :, :room]
    return torch.einsum("bhj,bjhd->bhd", weights, values).flatten(1)
