"""Activations over their scale, zero where they take no part."""

from __future__ import annotations

import torch
from torch import Tensor


def over_scale(acts: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    """acts [n, d], scale a scalar float32, mask [n] bool -> acts / scale float32, zero where the mask is False."""
    out = acts.to(torch.float32) / scale
    return out if mask is None else out.masked_fill_(~mask.unsqueeze(-1), 0)
