"""BatchTopK from the largest of each token, with a proof that none of the batch's largest is missing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csae.ops import topk_encode

from .lazy import Code

# How many times the mean a token may have. Each token's largest are found up to so many.
ROOM = 8


@torch.no_grad()
def batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: float) -> Code | None:
    """The int(k n) largest of all relu(W_enc x + b_enc) of n tokens x [..., d_in], W_enc [d_sae, d_in].

    A code as wide as the token that has most; other tokens have zeros at the end. None where a token has more than
    ROOM k, or may have: then the largest of each token don't show which are the batch's.
    """
    tokens, d_sae = x.shape[:-1].numel(), W_enc.shape[0]
    count, room = int(k * tokens), min(math.ceil(ROOM * k), d_sae)
    if not 1 <= count <= tokens * room:
        return None
    values, indices = topk_encode(x, W_enc, b_enc, room)
    largest = values.flatten().topk(count, sorted=False)
    # What a token has beyond its last value is not above that.
    if room < d_sae and not bool((values[..., -1] <= largest.values.min()).all()):
        return None
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=x.device)
    chosen = chosen.index_fill_(0, largest.indices, True).view_as(values) & (values > 0)
    # The chosen ones come first, for a token's values descend; but of equal values any may be chosen.
    width = 1 + max(chosen.flatten(0, -2).any(dim=0).nonzero().flatten().tolist(), default=0)
    kept = torch.where(chosen, values, 0)[..., :width]
    return Code(kept.contiguous(), indices[..., :width].contiguous(), d_sae)
