"""TemporalFeatureSAE: a part predicted from the past by attention, and a sparse code for what is new."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from csae.bench.baselines.dense import dense_gradients
from csae.forward_pass import Pass
from csae.ops import lookback_attention, sparse_decode, topk_encode
from csae.outputs import Code, Ran, Sweeps
from csae.sae import SAE


class TemporalFeatureSAE(SAE):
    """Temporal Feature Analysis (Lubana et al. 2025, arXiv 2511.01836) with a TopK code of what is new.

        z_t    = relu(W_enc (x_t - b_dec) + b_enc)                       dense, [d_sae]
        a_t    = causal attention: queries W_Q z_t + b_Q, keys W_K z_j, values W_V z_j, for j < t only
        p_t    = relu(W_O a_t + b_O)                                     dense: the predicted code, [d_sae]
        c_t    = the projection of x_t - b_dec onto p_t W_dec            the predicted part
        code_t = relu(topk(W_enc (x_t - b_dec - c_t) + b_enc, k))        the novel part
        x_hat  = sum_i code_t.values_i * W_dec[code_t.indices_i] + c_t + b_dec

    As in the paper and its authors' release (eslubana/TemporalFeatureAnalysis): the two parts and their order, one
    dictionary for both, attention from the dense code of this activation to those of earlier ones, 4 heads, the
    projection, TopK on the rest, and a loss on the reconstruction alone. In the release every position may also look at
    a code of zeros before the first position. With the biases of keys and values taken into b_Q and b_O, that is a null
    slot with score 0.

    Different from the paper: keys and values have a width of their own (with maps of [d_sae, d_sae] the attention would
    have many times the parameters of the dictionary). The encoder is not tied to the decoder and has a bias, W_dec has
    unit rows, and there is AuxK, all as in `csae.TopKSAE`, so that this is an extension of it. The slopes and null
    scores of `lookback_attention` are learned, and start at zero.

    c is dense, and the code does not determine it: it reads the true activations of the past, and its query and length
    come from the present one. So k understates how much a reader must take in.

    Args: as `SAE`, and
        n_heads: heads of the attention.
        d_head: width of a head's queries and keys.
        d_value: width of a head's values.
    """

    arch = "temporal-features"
    note = "beside the k features a dense part, made from the true activations of the past and the present one"
    look_back = ("W_Q", "b_Q", "W_K", "W_V", "W_O", "b_O", "slope", "null")

    W_Q: nn.Parameter
    """[n_heads * d_head, d_sae]; b_Q: [n_heads * d_head]"""
    W_K: nn.Parameter
    """[n_heads * d_head, d_sae]"""
    W_V: nn.Parameter
    """[n_heads * d_value, d_sae]"""
    W_O: nn.Parameter
    """[d_sae, n_heads * d_value]; b_O: [d_sae]"""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        n_heads: int = 4,
        d_head: int = 64,
        d_value: int = 144,
        k_aux: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(d_in, d_sae, k, k_aux, aux_coef, dead_after)
        for name, size in (("n_heads", n_heads), ("d_head", d_head), ("d_value", d_value)):
            if size < 1:
                raise ValueError(f"{name}: given {size}; needed at least 1")
        self.n_heads, self.d_head, self.d_value = n_heads, d_head, d_value
        # About half of the dense code is active, each near unit variance: this makes unit keys and values.
        inwards = math.sqrt(2 / d_sae)
        self.W_Q = nn.Parameter(inwards * torch.randn(n_heads * d_head, d_sae))
        self.b_Q = nn.Parameter(torch.zeros(n_heads * d_head))
        self.W_K = nn.Parameter(inwards * torch.randn(n_heads * d_head, d_sae))
        self.W_V = nn.Parameter(inwards * torch.randn(n_heads * d_value, d_sae))
        self.W_O = nn.Parameter(torch.randn(d_sae, n_heads * d_value) / math.sqrt(n_heads * d_value))
        self.b_O = nn.Parameter(torch.zeros(d_sae))
        self.slope = nn.Parameter(torch.zeros(n_heads))
        self.null = nn.Parameter(torch.zeros(n_heads))

    def encode(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Code:
        """acts [B, T, d_in] -> the code [B, T, k] of what is new, empty where the mask [B, T] is False."""
        return self.forward(acts, mask, documents).code

    def decode(self, code: Code, c: Tensor) -> Tensor:
        """The code [..., k] and the `c` of `Output` [..., d_in] -> the reconstruction, in their units."""
        return (sparse_decode(code.values, code.indices, self.W_dec) + self.b_dec) * self.scale + c

    gradients = dense_gradients

    def _run(self, ops: Pass, x: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: Sweeps | None) -> Ran:
        centred = x - self.b_dec
        c = self._predict(centred, mask, documents)
        values, indices = topk_encode(centred - c, self.W_enc, self.b_enc, self.k)
        if mask is not None:
            c, values = (tensor.masked_fill(~mask.unsqueeze(-1), 0) for tensor in (c, values))
        return Ran((sparse_decode(values, indices, self.W_dec), c, self.b_dec), Code(values, indices), c, c)

    def _predict(self, centred: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
        """x - b_dec [B, T, d_in] -> the predicted part of it [B, T, d_in]."""
        z = nn.functional.linear(centred, self.W_enc, self.b_enc).relu()
        widths = [self.n_heads * self.d_head, self.n_heads * self.d_head, self.n_heads * self.d_value]
        queries, keys, values = (
            part.unflatten(-1, (self.n_heads, -1))
            for part in nn.functional.linear(z, torch.cat([self.W_Q, self.W_K, self.W_V])).split(widths, dim=-1)
        )
        queries = queries + self.b_Q.view(self.n_heads, self.d_head).to(queries)
        read = lookback_attention(queries, keys, values, self.slope, self.null, mask, documents).flatten(-2)
        direction = nn.functional.linear(read, self.W_O, self.b_O).relu() @ self.W_dec
        length = (centred * direction).sum(dim=-1, keepdim=True) / direction.square().sum(
            dim=-1, keepdim=True
        ).clamp_min(1e-6)
        return length * direction

    def _check_acts(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> None:
        super()._check_acts(acts, mask, documents)
        if acts.dim() != 3:
            raise ValueError(f"acts: given shape {list(acts.shape)}; needed windows [B, T, d_in]: positions look back")
