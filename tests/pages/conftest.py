"""A text as SAEs see it, for the tests of `csae view`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_model import D_IN
from viewed import D_SAE, LAYER, N_CTX, TEXT, K, fitted

from csae import ContextualSAE, TopKSAE
from csae.data.language_model import LanguageModel
from csae.features.effects import Effects, effects_of
from csae.pages.view import Window, read_windows, view
from csae.sae import SAE


@pytest.fixture(scope="module")
def windows(tiny_lm: LanguageModel) -> list[Window]:
    found, whole = read_windows(tiny_lm, LAYER, TEXT, N_CTX)
    assert whole
    return found


@pytest.fixture(scope="module", params=["current", "past"])
def contextual(request: pytest.FixtureRequest, windows: list[Window]) -> ContextualSAE:
    torch.manual_seed(0)
    sae = ContextualSAE(D_IN, D_SAE, K, n_heads=2, d_head=4, d_value=6, d_memory=8, query=request.param)
    return fitted(sae, windows)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def per_token(windows: list[Window]) -> SAE:
    torch.manual_seed(1)
    return fitted(TopKSAE(D_IN, D_SAE, K), windows)


@pytest.fixture(scope="module")
def effects(tiny_lm: LanguageModel) -> Effects:
    """Of the model, with nothing taken for noise: what directions of 16 dimensions do is never clear."""
    return effects_of(tiny_lm)._replace(noise=0)


@pytest.fixture(scope="module")
def facts(contextual: SAE, per_token: SAE, windows: list[Window], tiny_lm: LanguageModel, effects) -> dict[str, Any]:
    found = view(contextual, windows, tiny_lm, trained_on=10, beside=per_token, effects=effects)
    return json.loads(json.dumps(found, allow_nan=False))
