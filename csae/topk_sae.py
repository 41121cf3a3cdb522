"""TopKSAE: each token by itself, its k most active features."""

from __future__ import annotations

from torch import Tensor

from csae.forward_pass import Pass
from csae.ops import sparse_decode
from csae.outputs import Code, Ran, Sweeps
from csae.sae import SAE
from csae.selection import Rule


class TopKSAE(SAE):
    """The per-token TopK SAE (Gao et al. 2024, arXiv 2406.04093), or with `d_out` a transcoder (see `SAE`).

        code  = relu(topk(W_enc (x - b_dec) + b_enc, k))            or as `selection` says
        x_hat = sum_i code.values_i * W_dec[code.indices_i] + b_dec

    Args: see `SAE`.
    """

    arch = "topk"

    def encode(self, acts: Tensor) -> Code:
        """acts [..., d_in] -> the code [..., k_max], as in use."""
        self._check_whole("encode")
        self._check_acts(acts)
        x = self._normalised(acts) - self.centre
        values, indices = Rule.of(self, training=False).encode(x, self.W_enc, self.b_enc, None)
        return Code(values.to(self.W_enc.dtype), indices)

    def decode(self, code: Code, acts: Tensor | None = None) -> Tensor:
        """The code [..., k_max] -> the reconstruction [..., d_out], in the units of what is reconstructed.

        acts: [..., d_in], which a skip connection reads.
        """
        self._check_whole("decode")
        values, indices = code
        x_hat = sparse_decode(values.to(self.W_dec.dtype), indices, self.W_dec) + self.b_dec
        return self._in_units_of(self._skip_of(x_hat, acts), self.W_dec.dtype)

    def _run(self, ops: Pass, x: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: Sweeps | None) -> Ran:
        zero, x = x.new_zeros(()), ops.centred(x, cast=True)
        code = Code(*ops.encode(x, mask))
        decoded, groups = ops.reconstruct(code)
        parts = (decoded, self.b_dec, *self._skipped(x))
        return Ran(parts, code, zero.expand_as(decoded), zero.expand_as(x), groups)
