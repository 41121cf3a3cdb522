"""BatchTopKSAE: k features a token on average, as many for each token as it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csae.forward_pass import Pass
from csae.ops import sparse_decode
from csae.outputs import Code, Ran, Sweeps
from csae.sae import SAE

# The share of the running threshold that a batch replaces.
THRESHOLD_RATE = 0.05


class BatchTopKSAE(SAE):
    """The BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410).

        pre   = W_enc (x - b_dec) + b_enc
        code  = the n * k largest positive pre-activations of the n tokens of a batch     in training mode
                the pre-activations above the threshold                                  in evaluation mode
        x_hat = sum_i code.values_i * W_dec[code.indices_i] + b_dec

    As in the paper, the threshold is the smallest active value of a batch, averaged over batches. Different from the
    paper: the average is a running mean that forgets early batches, since the parameters move during training; W_dec
    has unit rows, and AuxK is that of `csae.TopKSAE`.

    The code is as wide as the token with the most features needs; other tokens are padded with zeros.

    Args: see `SAE`; k is the mean number of active features.
    """

    arch = "batch-topk"
    note = "l0 is k on average, and differs from token to token"

    threshold: Tensor
    """scalar: what a feature must exceed in evaluation mode, in units of normalised activations; 0 when untrained"""
    threshold_weight: Tensor
    """scalar: the weight of the batches so far in the running mean, from 0 to 1"""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        k_aux: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(d_in, d_sae, k, k_aux, aux_coef, dead_after)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))

    def encode(self, acts: Tensor, mask: Tensor | None = None) -> Code:
        """acts [..., d_in] -> the code [..., width], empty where the mask [...] is False."""
        return self.forward(acts, mask).code

    def decode(self, code: Code) -> Tensor:
        """The code [..., width] -> the reconstruction [..., d_in], in the units of the activations."""
        return (sparse_decode(code.values, code.indices, self.W_dec) + self.b_dec) * self.scale

    @torch.no_grad()
    def track(self, code: Code, mask: Tensor | None = None) -> None:
        """Count tokens since each feature last fired, and take the batch's smallest active value into the threshold."""
        super().track(code, mask)
        active = code.values[code.values > 0]
        if active.numel() > 0:
            before = (1 - THRESHOLD_RATE) * self.threshold_weight
            after = before + THRESHOLD_RATE
            self.threshold.copy_((before * self.threshold + THRESHOLD_RATE * active.min()) / after)
            self.threshold_weight.copy_(after)

    def _run(self, ops: Pass, x: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: Sweeps | None) -> Ran:
        centred = ops.centred(x)
        code = Code(*ops.encode(centred, mask, self._select(centred.detach(), mask)))
        zero = x.new_zeros(()).expand_as(x)
        return Ran((ops.decode("W_dec", code), self.b_dec), code, zero, zero)

    @torch.no_grad()
    def _select(self, centred: Tensor, mask: Tensor | None) -> Code:
        """Which features are active, without a gradient. centred [..., d_in] -> the code [..., width]."""
        pre_acts = nn.functional.linear(centred, self.W_enc, self.b_enc).relu_()
        if mask is not None:
            pre_acts.masked_fill_(~mask.unsqueeze(-1), 0)
        flat = pre_acts.flatten()
        if self.training:
            tokens = centred.shape[:-1].numel() if mask is None else int(mask.sum())
            largest = flat.topk(min(tokens * self.k, flat.numel()))
            values, places = largest.values, largest.indices
            places = places[values > 0]
        else:
            places = (flat > self.threshold).nonzero().squeeze(1)
        return self._padded(flat, places, centred.shape[:-1])

    def _padded(self, flat: Tensor, places: Tensor, shape: torch.Size) -> Code:
        """The entries of flat [n * d_sae] at `places`, token by token, largest first -> the code [*shape, width]."""
        n = shape.numel()
        places = places[flat[places].argsort(descending=True)]
        places = places[(places // self.d_sae).argsort(stable=True)]
        token = places // self.d_sae
        counts = token.bincount(minlength=n)
        slot = torch.arange(len(places), device=flat.device) - (counts.cumsum(0) - counts)[token]
        width = max(1, int(counts.max())) if n > 0 else 1
        values, indices = flat.new_zeros(n, width), places.new_zeros(n, width)
        values[token, slot], indices[token, slot] = flat[places], places % self.d_sae
        return Code(values.view(*shape, width), indices.view(*shape, width))
