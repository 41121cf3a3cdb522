"""TopKSAE: each token by itself, its k most active features."""

from __future__ import annotations

from torch import Tensor

from csae.factors import Pass
from csae.ops import sparse_decode, topk_encode
from csae.sae import SAE, Code, Sweeps


class TopKSAE(SAE):
    """The per-token TopK SAE (Gao et al. 2024, arXiv 2406.04093).

        code  = relu(topk(W_enc (x - b_dec) + b_enc, k))
        x_hat = sum_i code.values_i * W_dec[code.indices_i] + b_dec

    Args: see `SAE`.
    """

    arch = "topk"

    def encode(self, acts: Tensor) -> Code:
        """acts [..., d_in] -> the code [..., k]."""
        self._check_acts(acts)
        values, indices = topk_encode(self._normalised(acts) - self.b_dec, self.W_enc, self.b_enc, self.k)
        return Code(values.to(self.W_enc.dtype), indices)

    def decode(self, code: Code) -> Tensor:
        """The code [..., k] -> the reconstruction [..., d_in], in the units of the activations."""
        values, indices = code
        x_hat = sparse_decode(values.to(self.W_dec.dtype), indices, self.W_dec) + self.b_dec
        return self._in_units_of(x_hat, self.W_dec.dtype)

    def _run(
        self, ops: Pass, x: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: Sweeps | None
    ) -> tuple[Tensor, Code, Tensor]:
        code = Code(*ops.encode(ops.centred(x), mask))
        return ops.decode("W_dec", code) + self.b_dec, code, x.new_zeros(()).expand_as(x)
