"""What the tests of exports share: what an export holds, and the activations and codes that it is to agree with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from runs_of_a_model import N_CTX, K
from torch import Tensor

from csae.checkpoint import load_sae
from csae.data.sources import open_source
from csae.interop.dense import DenseSAE
from csae.interop.weights import unscaled
from csae.run import read_origin

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test where the package can't be imported."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def activations(n: int = 5) -> Tensor:
    """Random windows [n, N_CTX, d_in] for the SAEs of the runs."""
    return torch.randn(n, N_CTX, 16, generator=torch.Generator().manual_seed(1))


def dense_codes(run: Path) -> tuple[Tensor, Tensor, Tensor]:
    """What an export of activations is to hold, made by other code: feature activations [N, T, d_sae] in units of the
    activations, zero where the mask is false; the mask [N, T]; the tokens [N, T]."""
    sae = load_sae(run)
    source, _ = open_source(read_origin(run), "cpu")
    batch = source.read(range(source.n_windows))
    if sae.arch == "topk":
        feature_acts = DenseSAE(unscaled(sae)).encode(batch.acts)
    else:
        code = sae(batch.acts, batch.mask, batch.documents, exact=True).code
        feature_acts = torch.zeros(*batch.mask.shape, sae.d_sae).scatter_add(-1, code.indices, code.values * sae.scale)
    assert (feature_acts[batch.mask] > 0).sum(dim=-1).float().mean() > K / 2
    return feature_acts.detach().masked_fill(~batch.mask.unsqueeze(-1), 0), batch.mask, batch.tokens


def read(file: Path) -> dict:
    return json.loads(file.read_text())
