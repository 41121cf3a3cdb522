"""Which features of a code are active, and which tokens they last fired at."""

from __future__ import annotations

import torch
from torch import Tensor


def active_features(values: Tensor, indices: Tensor, mask: Tensor | None, d_sae: int) -> Tensor:
    """values [n, k], indices [n, k] int64, mask [n] bool -> indices, d_sae where a pair is not active: [n, k] int64.

    NaN is active, so that it is seen.
    """
    off = values <= 0 if mask is None else (values <= 0) | ~mask.unsqueeze(-1)
    return torch.where(off, d_sae, indices)


def fired(since: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None) -> None:
    """Set since [d_sae] int64 to zero where a pair of values, indices [n, k] and mask [n] is active."""
    off = values <= 0 if mask is None else (values <= 0) | ~mask.unsqueeze(-1)
    ours = torch.zeros(since.shape[0], dtype=torch.int32, device=since.device)
    ours.scatter_reduce_(0, indices.flatten(), (~off).flatten().to(torch.int32), "amax")
    since.mul_(1 - ours)
