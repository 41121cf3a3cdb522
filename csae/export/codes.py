"""The feature activations of an SAE on windows of text, as sparse codes, for what shows or explains features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csae.data.activations import ActivationSource
from csae.errors import UserError
from csae.evaluate import run_form
from csae.progress import Progress, quiet
from csae.sae import SAE

WINDOWS_AT_ONCE = 16


class About(NamedTuple):
    """What is exported."""

    name: str
    """of the SAE"""
    data: str
    """what the text is called"""


class Codes(NamedTuple):
    """Feature activations on N windows of T tokens, on the CPU."""

    values: Tensor
    """[N, T, k] float32: how active, in units of what is reconstructed; zero where fewer are active"""
    indices: Tensor
    """[N, T, k] int32: which features"""
    mask: Tensor
    """[N, T] bool: which positions take part; the code of the others is zero"""
    tokens: Tensor
    """[N, T] int64"""

    def active(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each activation: its feature, its place (window * T + position) and its value, by feature and then place."""
        at = self.values.flatten().nonzero().squeeze(1)
        features, places = self.indices.flatten()[at].long(), at // self.values.shape[-1]
        order = (features * self.tokens.numel() + places).argsort()
        return features[order], places[order], self.values.flatten()[at][order]


@torch.no_grad()
def read_codes(sae: SAE, source: ActivationSource, windows: Sequence[int], progress: Progress = quiet) -> Codes:
    """The codes of these windows, in the exact form. Raises UserError where the source knows no tokens."""
    device = sae.W_dec.device
    parts = []
    for start in progress(range(0, len(windows), WINDOWS_AT_ONCE), "feature activations"):
        batch = source.read(windows[start : start + WINDOWS_AT_ONCE])
        if batch.tokens is None:
            raise UserError("the activations come without token ids, so there is no text to show: cache them anew")
        mask = batch.mask.to(device)
        code = run_form(sae, batch.acts.to(device), mask, batch.documents.to(device), exact=True).code
        values = (code.values.float() * sae.out_scale).masked_fill(~mask.unsqueeze(-1), 0)
        parts.append((values.cpu(), code.indices.int().cpu(), batch.mask.cpu(), batch.tokens.cpu()))
    return Codes(*(torch.cat(part) for part in zip(*parts, strict=True)))
