"""Which features a code has: the k largest of a token, as many of a batch together, or all above a threshold.

    "topk"      the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)
    "batch"     in training the n * k largest of the n tokens of a batch (Bussmann et al. 2024, arXiv 2412.06410); in
                use, where a token can't wait for others, those above one threshold
    "jumprelu"  those above a threshold of their own, which is trained (Rajamanoharan et al. 2024, arXiv 2407.14435)

A code has k_max slots. With "batch" and "jumprelu" a token uses k of them on average, and the others are empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from csae.config import SELECTIONS
from csae.ops import batch_topk_encode, threshold_encode, topk_encode
from csae.ops.batch_topk_encode import batch_encode_again, batch_encode_and_keep
from csae.ops.threshold_encode import threshold_encode_again, threshold_encode_and_keep, threshold_encoder
from csae.ops.topk_encode import Encode, encode_again, encode_and_keep, encoder

if TYPE_CHECKING:
    from csae.sae import SAE

# Slots of a code, in multiples of k, where tokens have different numbers of features. On text a token in twenty has
# more than 2.4 k features.
SLOTS = 4

_Code = tuple[Tensor, Tensor]  # values and indices, [..., k_max]


def slots(selection: str, k: int, k_max: int | None, d_sae: int) -> int:
    """How many slots a code has: k_max, or what it is if it is not given. Raises ValueError or TypeError."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection: given {selection!r}; needed one of {', '.join(map(repr, SELECTIONS))}")
    if k_max is None:
        return k if selection == "topk" else min(d_sae, SLOTS * k)
    if isinstance(k_max, bool) or not isinstance(k_max, int):
        raise TypeError(f"k_max: given {k_max!r}; needed a whole number, or None")
    if selection == "topk" and k_max != k:
        raise ValueError(f'k_max: given {k_max}; needed None with selection="topk": each token has k = {k} features')
    if not k <= k_max <= d_sae:
        raise ValueError(f"k_max: given {k_max}; needed k <= k_max <= d_sae, with k = {k} and d_sae = {d_sae}")
    return k_max


class Rule(NamedTuple):
    """How an SAE finds the features of a code."""

    k: int
    k_max: int
    threshold: Tensor | None
    """[] or [d_sae], no gradient: what is above it; None: the k largest of each token"""
    shared: bool
    """whether a batch shares its budget; the threshold is then that of the batch before, a guess"""

    @classmethod
    def of(cls, sae: SAE, training: bool) -> Rule:
        """That of training (`loss`, `gradients`, `forward` in training mode), or that of use."""
        threshold = sae.threshold.detach() if sae.selection != "topk" and sae.threshold is not None else None
        return cls(sae.k, sae.k_max, threshold, training and sae.selection == "batch")

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, mask: Tensor | None) -> _Code:
        """The code of x [..., d_in], with its gradient. mask [...] bool: which tokens share the budget, if any do."""
        if self.threshold is None:
            return topk_encode(x, W_enc, b_enc, self.k)
        if self.shared:
            return batch_topk_encode(x, W_enc, b_enc, self.k, self.k_max, mask, self.threshold)[:2]
        return threshold_encode(x, W_enc, b_enc, self.threshold, self.k_max)

    def encoder(self, W_enc: Tensor, b_enc: Tensor, mask: Tensor | None) -> Encode:
        """`encode` without a gradient, for repeated use with the same weights and mask."""
        W_enc, b_enc = W_enc.detach(), b_enc.detach()
        if self.threshold is None:
            return encoder(W_enc, b_enc, self.k)
        if self.shared:
            return lambda x: self.encode(x.detach(), W_enc, b_enc, mask)
        return threshold_encoder(W_enc, b_enc, self.threshold, self.k_max)

    def encode_and_keep(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`encode` without a gradient, and the pre-activations that it chose from, for `encode_again`."""
        if self.threshold is None:
            return encode_and_keep(x, W_enc, b_enc, self.k)
        if self.shared:
            found = batch_encode_and_keep(x, W_enc, b_enc, self.k, self.k_max, mask, self.threshold)
            return found[0], found[1], found[3]
        return threshold_encode_and_keep(x, W_enc, b_enc, self.threshold, self.k_max)

    def encode_again(self, kept: Tensor, a: Tensor, W_a: Tensor, mask: Tensor | None) -> _Code:
        """The code of what was kept less W_a a, without a gradient (`csae.ops.topk_encode.encode_again`)."""
        if self.threshold is None:
            return encode_again(kept, a, W_a, self.k)
        if self.shared:
            return batch_encode_again(kept, a, W_a, self.k, self.k_max, mask, self.threshold)[:2]
        return threshold_encode_again(kept, a, W_a, self.threshold, self.k_max)


def least(code: Any, mask: Tensor | None) -> Tensor:
    """[]: the least positive value of a code, of the tokens in the mask [...]; infinite where there is none."""
    counts = code.values > 0
    if mask is not None:
        counts = counts & mask.unsqueeze(-1)
    values = code.values.masked_fill(~counts, float("inf"))
    return values.amin() if values.numel() else values.new_tensor(float("inf"))


@contextmanager
def in_use(sae: SAE) -> Iterator[None]:
    """The SAE in evaluation mode in here, so that a code does not depend on what else is in the batch."""
    training = sae.training
    sae.eval()
    try:
        yield
    finally:
        sae.train(training)
