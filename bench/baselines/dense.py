"""Gradients by plain autograd, for SAEs that use their tables in other ways than by sparse codes."""

from __future__ import annotations

import torch
from torch import Tensor

from csae.dead_rows import Dead
from csae.factors import Gradients
from csae.sae import SAE, Code, Losses, Sweeps


def dense_gradients(
    sae: SAE,
    acts: Tensor,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    dead: Tensor | Dead | None = None,
    sweeps: Sweeps | None = None,
    target: Tensor | None = None,
) -> tuple[Losses, Gradients]:
    """What `SAE.gradients` returns, each gradient a dense tensor. Args: as `SAE.loss`."""
    losses = sae.loss(acts, mask, documents, dead, sweeps, target)
    parameters = dict(sae.named_parameters())
    with torch.autocast(acts.device.type, enabled=False):  # forward's business
        found = torch.autograd.grad(losses.loss, list(parameters.values()), allow_unused=True)
    gradients = Gradients(
        # AuxK alone gives sparse gradients.
        (name, gradient.to_dense() if gradient.is_sparse else gradient)
        for name, gradient in zip(parameters, found, strict=True)
        if gradient is not None
    )
    code = Code(losses.code.values.detach(), losses.code.indices)
    return Losses(losses.loss.detach(), losses.fvu.detach(), losses.aux.detach(), code), gradients
