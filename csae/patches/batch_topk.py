"""BatchTopK from the largest of each token, with a proof that none is missing: by a batch's budget, or a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csae.ops import topk_encode
from csae.ops.threshold_encode import rows_of

from .lazy import Code

# At most ROOM * k features of a token can be in the code: so many are found for each.
ROOM = 8


@torch.no_grad()
def batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: float) -> Code | None:
    """The int(k n) largest of all relu(W_enc x + b_enc) of n tokens x [..., d_in], W_enc [d_sae, d_in].

    A code as wide as the token with most features; other rows end with zeros. None where a token has, or might have,
    more than ROOM k of the batch's largest: then the largest of each token do not settle the choice.
    """
    tokens, d_sae = x.shape[:-1].numel(), W_enc.shape[0]
    count, room = int(k * tokens), min(math.ceil(ROOM * k), d_sae)
    if not 1 <= count <= tokens * room:
        return None
    values, indices = topk_encode(x, W_enc, b_enc, room)
    largest = values.flatten().topk(count, sorted=False)
    # No pre-activation that was not found exceeds the last one found of its token.
    if room < d_sae and not bool((values[..., -1] <= largest.values.min()).all()):
        return None
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=x.device)
    chosen = chosen.index_fill_(0, largest.indices, True).view_as(values) & (values > 0)
    # A token's values descend, so the chosen ones come first, but for ties.
    return _narrowed(torch.where(chosen, values, 0), indices, d_sae)


@torch.no_grad()
def above_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: float) -> Code | None:
    """All relu(W_enc x + b_enc) of n tokens x [..., d_in] above a threshold, W_enc [d_sae, d_in].

    A code as `batch_topk` gives it. None where a token has, or might have, more than ROOM k of them, or has a NaN; and
    with a threshold below zero, which stands for none.
    """
    d_sae = W_enc.shape[0]
    room = min(math.ceil(ROOM * k), d_sae)
    if not bool(threshold >= 0):
        return None
    # Not `threshold_encode`: its empty slots all name feature 0, and a lazy tensor's code names none twice.
    values, indices = topk_encode(x, W_enc, b_enc, room)
    last = values[..., -1]
    complete = last <= threshold if room < d_sae else ~last.isnan()
    return _narrowed(torch.where(values > threshold, values, 0), indices, d_sae) if bool(complete.all()) else None


def _narrowed(values: Tensor, indices: Tensor, d_sae: int) -> Code:
    """A code as wide as the token with most features, at least one."""
    width = 1 + max(rows_of(values > 0).any(dim=0).nonzero().flatten().tolist(), default=0)
    return Code(values[..., :width].contiguous(), indices[..., :width].contiguous(), d_sae)
