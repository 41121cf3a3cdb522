"""A source of activations for tests: windows in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csae import TopKSAE
from csae.data.activations import Batch


@dataclasses.dataclass
class GivenWindows:
    """acts [N, T, d_in], mask [N, T] bool and documents [N, T] as they are given."""

    acts: Tensor
    mask: Tensor
    documents: Tensor

    def __post_init__(self) -> None:
        self.n_windows, self.n_ctx, self.d_in = self.acts.shape

    def read(self, window_indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(window_indices)
        return Batch(self.acts[chosen], self.mask[chosen], self.documents[chosen], None)

    def describe(self) -> dict[str, Any]:
        return {}


def identity_sae(d: int, k: int) -> TopKSAE:
    """Feature f is active where dimension f of the activations is positive."""
    sae = TopKSAE(d, d, k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
    return sae
