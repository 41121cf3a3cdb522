"""An SAE as other libraries see one: dense feature activations, from `encode` and to `decode`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csae.contextual_sae import ContextualSAE
from csae.data.activations import sink_mask
from csae.errors import UserError
from csae.interop.feature_acts import FeatureActs, carried_of
from csae.outputs import Code
from csae.selection import Rule
from csae.topk_sae import TopKSAE


class DenseSAE(nn.Module):
    """`encode` and `decode` with one dense tensor between them, and the weights as the field lays them out.

    A contextual SAE runs in its exact form, on windows, autocast or not. What it carries to each position, c, is not
    part of its feature activations. So `encode` returns a tensor that keeps c (`csae.interop.feature_acts`), through
    copies, edits and slices, and `decode` adds it: an edit of feature activations edits what is new. Other feature
    activations need a `c` to be decoded, and are refused without. Positions that `sink_mask` leaves out neither look
    back nor are looked at, as in training; since other libraries may count them, they are encoded as by a per-token
    SAE. A contextual SAE's `encode` has no gradient.

    sae: with a scale of one, as `csae.interop.weights.unscaled` makes them.
    """

    def __init__(self, sae: TopKSAE | ContextualSAE) -> None:
        super().__init__()
        if sae.is_transcoder:
            raise UserError("sae: given a transcoder; needed an SAE without d_out: others read what they rebuild")
        self.sae: TopKSAE | ContextualSAE = sae

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae], a view"""
        return self.sae.W_enc.mT

    @property
    def b_enc(self) -> Tensor:
        """[d_sae]"""
        return self.sae.b_enc

    @property
    def W_dec(self) -> Tensor:
        """[d_sae, d_in]"""
        return self.sae.W_dec

    @property
    def b_dec(self) -> Tensor:
        """[d_in]"""
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.W_dec.dtype

    def encode(self, acts: Tensor) -> Tensor:
        """acts [..., d_in], for a contextual SAE windows [B, T, d_in] -> feature activations [..., d_sae]."""
        acts = acts.to(self.dtype)
        c = None
        if isinstance(self.sae, ContextualSAE):
            code, c = self._look_back(self.sae, acts)
        else:
            code = self.sae.encode(acts)
        # Unused slots of a code are zero and add nothing, whatever their index.
        dense = code.values.new_zeros(*code.values.shape[:-1], self.sae.d_sae)
        dense = dense.scatter_add(-1, code.indices, code.values)
        return dense if c is None else FeatureActs.of(dense, c)

    @torch.no_grad()
    def _look_back(self, sae: ContextualSAE, acts: Tensor) -> tuple[Code, Tensor]:
        if acts.dim() != 3 or acts.shape[1] < 2:
            raise ValueError(
                f"acts: given shape {list(acts.shape)}; needed whole windows [B, T, d_in] with T >= 2 for a contextual "
                "SAE: positions in their order, not shuffled or one at a time (`csae.splice` follows generation)"
            )
        if acts.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"sae: in {acts.dtype}; needed torch.float32, which the exact form runs in: load and keep the SAE so "
                "(activations are converted, whatever they are)"
            )
        mask = sink_mask(acts, None, *sae.masking)
        out = sae(acts, mask, exact=True)
        with torch.autocast(acts.device.type, enabled=False):
            rule = Rule.of(sae, training=False)
            values, indices = rule.encode(acts[~mask] - sae.b_dec, sae.W_enc, sae.b_enc, None)
        out.code.values[~mask], out.code.indices[~mask] = values, indices
        return out.code, out.c

    def decode(self, feature_acts: Tensor, c: Tensor | None = None) -> Tensor:
        """Feature activations [..., d_sae] -> the reconstruction [..., d_in].

        c: [..., d_in], what a contextual SAE carried there, where the feature activations don't know it.
        """
        x_hat = torch.Tensor.as_subclass(feature_acts, Tensor).to(self.dtype) @ self.W_dec + self.b_dec
        if not isinstance(self.sae, ContextualSAE):
            return x_hat
        c = carried_of(feature_acts) if c is None else c
        if c is None or c.shape != x_hat.shape:
            known = "what was carried there is not known" if c is None else f"c is {list(c.shape)}"
            raise ValueError(
                f"feature_acts: given shape {list(feature_acts.shape)}, and {known}; needed what encode() gave, a "
                "copy, an edit or a slice of it, or c of these positions: a contextual SAE adds what it carried there"
            )
        return x_hat + c.to(x_hat)

    def forward(self, acts: Tensor) -> Tensor:
        """acts -> the reconstruction, of the same shape."""
        return self.decode(self.encode(acts))
