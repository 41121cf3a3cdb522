"""TemporalSAE: a loss term keeps some features the same from one token to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csae.bench.baselines.batch_topk import BatchTopKSAE
from csae.bench.baselines.dense import dense_gradients
from csae.dead_rows import Dead
from csae.forward_pass import Pass
from csae.losses import fraction_unexplained
from csae.ops import sparse_decode
from csae.sae import Code, Losses, Sweeps


class TemporalSAE(BatchTopKSAE):
    """The Temporal SAE (Bhalla et al. 2025, arXiv 2511.05541).

    A BatchTopK SAE whose first features are high-level, with two more terms in its loss. The high-level features alone
    must reconstruct the activations too, as in a Matryoshka SAE with two groups. And a contrastive term makes those of
    a token and of the token before it more similar than those of tokens of other documents:

        s(i, j)  = cosine(high-level code at t_i, high-level code at t_j - 1)
        contrast = mean_i -log(exp(s(i, i) / temperature) / sum_j exp(s(i, j) / temperature)), and the same
                   with i and j swapped, the mean of both
        loss     = high_weight * fvu of the high-level features alone + (1 - high_weight) * fvu
                   + contrast_coef * contrast + aux_coef * aux

    As in the paper: BatchTopK, the two groups, the contrast by cosines within a batch, and a fifth of the features
    high-level. The weights are those of the authors' release (AI4LIFE-GROUP/temporal-saes): 0.1 for the contrast, and
    for each reconstruction the share of its group. The release contrasts scalar products, not cosines.

    Different from the paper: reconstruction is measured in units of variance, so that the weights mean the same for any
    data. All pairs of whole windows are used, and other pairs of the same document are no negatives (the authors draw
    pairs from many documents). There is a temperature; other values than 1 make high-level features smoother and cost
    some FVU.

    Args: as `BatchTopKSAE`, and
        high_level: the share of the features, the first ones, that are high-level.
        high_weight: the weight of their own reconstruction; the whole one has the rest.
        contrast_coef: the weight of the contrast.
        temperature: what cosines are divided by.
    """

    arch = "temporal-sae"
    note = "l0 is k on average; the first n_high features are trained to stay the same from token to token"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        high_level: float = 0.2,
        high_weight: float = 0.2,
        contrast_coef: float = 0.1,
        temperature: float = 1.0,
        k_aux: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(d_in, d_sae, k, k_aux, aux_coef, dead_after)
        if not 0 < high_level <= 1:
            raise ValueError(f"high_level: given {high_level}; needed a share above 0, 1 at most")
        if not temperature > 0:
            raise ValueError(f"temperature: given {temperature}; needed a positive number")
        self.n_high = max(1, round(high_level * d_sae))
        self.high_weight, self.contrast_coef, self.temperature = high_weight, contrast_coef, temperature

    gradients = dense_gradients

    def _losses(
        self,
        ops: Pass,
        acts: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        dead: Tensor | Dead | None,
        sweeps: Sweeps | None,
        target: Tensor | None,
    ) -> Losses:
        plain = super()._losses(ops, acts, mask, documents, dead, sweeps, target)
        high = plain.code.values * (plain.code.indices < self.n_high)
        x = acts / self.scale
        weight = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x.dtype)
        x_hat = sparse_decode(high, plain.code.indices, self.W_dec) + self.b_dec
        fvu_high = fraction_unexplained(x, x - x_hat, weight)
        contrast = self._contrast(Code(high, plain.code.indices), mask, documents)
        loss = plain.loss + self.high_weight * (fvu_high - plain.fvu) + self.contrast_coef * contrast
        return plain._replace(loss=loss)

    def _contrast(self, high: Code, mask: Tensor | None, documents: Tensor | None) -> Tensor:
        """The contrastive loss of a batch of windows: high [B, T, width] has the high-level features, others zero."""
        B, T = high.values.shape[:2]
        device = high.values.device
        mask = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask
        documents = torch.zeros(B, T, dtype=torch.int64, device=device) if documents is None else documents
        pairs = mask[:, 1:] & mask[:, :-1] & (documents[:, 1:] == documents[:, :-1])  # [B, T - 1]
        if not pairs.any():
            return high.values.new_zeros(())
        within = high.indices.clamp_max(self.n_high - 1)  # what is beyond adds a zero there
        dense = high.values.new_zeros(B, T, self.n_high).scatter_add(-1, within, high.values)
        direction = nn.functional.normalize(dense, dim=-1)
        now, before = direction[:, 1:][pairs], direction[:, :-1][pairs]  # [P, n_high]
        similarity = now @ before.T / self.temperature
        window = torch.arange(B, device=device).unsqueeze(1).expand(B, T - 1)[pairs]
        document = documents[:, 1:][pairs]
        same = (window[:, None] == window[None, :]) & (document[:, None] == document[None, :])
        own = torch.arange(len(now), device=device)
        same[own, own] = False
        similarity = similarity.masked_fill(same, -torch.inf)
        return (nn.functional.cross_entropy(similarity, own) + nn.functional.cross_entropy(similarity.T, own)) / 2
