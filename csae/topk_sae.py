"""TopKSAE: each token by itself, its k most active features."""

from __future__ import annotations

import torch
from torch import Tensor

from csae.factors import Trace
from csae.ops import sparse_decode, topk_encode
from csae.sae import SAE, Code, Output


class TopKSAE(SAE):
    """The per-token TopK SAE (Gao et al. 2024, arXiv 2406.04093).

        code  = relu(topk(W_enc (x - b_dec) + b_enc, k))
        x_hat = sum_i code.values_i * W_dec[code.indices_i] + b_dec

    Args: see `SAE`.
    """

    arch = "topk"

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

    def encode(self, acts: Tensor) -> Code:
        """acts [..., d_in] -> the code [..., k]."""
        self._check_acts(acts)
        values, indices = topk_encode(self._normalised(acts) - self.b_dec, self.W_enc, self.b_enc, self.k)
        return Code(values.to(self.W_enc.dtype), indices)

    def decode(self, code: Code) -> Tensor:
        """The code [..., k] -> the reconstruction [..., d_in], in the units of the activations."""
        return self._decode(code, self.W_dec.dtype)

    def _decode(self, code: Code, dtype: torch.dtype) -> Tensor:
        values, indices = code
        return self._in_units_of(sparse_decode(values.to(self.W_dec.dtype), indices, self.W_dec) + self.b_dec, dtype)

    def forward(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Output:
        """acts [..., d_in] -> `Output`. Tokens don't see each other: mask and documents change nothing here."""
        self._check_acts(acts, mask, documents)
        code = self.encode(acts)
        return Output(self._decode(code, acts.dtype), code, torch.zeros_like(acts))

    def _run(
        self, x: Tensor, mask: Tensor | None, documents: Tensor | None, trace: Trace | None = None
    ) -> tuple[Tensor, Code, Tensor]:
        centred = x - self.b_dec
        if trace is None:
            code = Code(*topk_encode(centred, self.W_enc, self.b_enc, self.k))
            x_hat = sparse_decode(*code, self.W_dec) + self.b_dec
        else:
            code = Code(*trace.encode(centred.detach(), self.W_enc, self.b_enc, self.k, mask))
            x_hat = trace.decode("W_dec", *code, self.W_dec) + self.b_dec
        return x_hat, code, x.new_zeros(()).expand_as(x)
