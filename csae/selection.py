"""Which features a code has: the k largest of a token, as many of a batch together, or all above a threshold.

    "topk"      the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)
    "batch"     in training the n * k largest of the n tokens of a batch (Bussmann et al. 2024, arXiv 2412.06410); in
                use, where a token can't wait for others, those above one threshold
    "jumprelu"  those above a threshold of their own, which is trained (Rajamanoharan et al. 2024, arXiv 2407.14435)

A code has k_max slots. With "batch" and "jumprelu" a token uses k of them on average, and the others are empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from csae.errors import UserError

if TYPE_CHECKING:
    from csae.sae import SAE

SELECTIONS = ("topk", "batch", "jumprelu")
# Slots of a code, in multiples of k, where tokens have different numbers of features. On text a token in twenty has
# more than 2.4 k features.
SLOTS = 4


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


def only_topk(sae: SAE, what: str) -> None:
    """Raise UserError where the number of features varies from token to token: `what` can't follow that."""
    if sae.selection != "topk":
        raise UserError(f'{what}: given an SAE with selection="{sae.selection}"; needed one with selection="topk"')
