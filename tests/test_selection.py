"""Selections: k features for each token, as many of a batch together, or those above a threshold."""

from __future__ import annotations

import pytest
import torch

from csae import ContextualSAE, TopKSAE
from csae.checkpoint import load_sae
from csae.sae import SAE
from csae.saving import CONFIG

D_IN, D_SAE, K = 6, 24, 3
KINDS = {"topk": TopKSAE, "contextual": ContextualSAE}


def made(kind: str, selection: str = "batch", **given: object) -> SAE:
    torch.manual_seed(0)
    sizes = {"n_heads": 2, "d_head": 2, "d_value": 3, "d_memory": 4} if kind == "contextual" else {}
    return KINDS[kind](D_IN, D_SAE, K, selection=selection, **sizes, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_code_has_k_slots_or_four_times_as_many(kind: str) -> None:
    assert made(kind, "topk").k_max == K
    assert made(kind).k_max == 4 * K
    assert made(kind, k_max=5).k_max == 5
    sae = made(kind)
    sae.k = 2
    assert sae.k_max == 8
    if isinstance(sae, ContextualSAE):
        assert sae.k_mem == 8


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_threshold_that_is_trained_is_a_parameter(kind: str) -> None:
    assert made(kind, "topk").threshold is None
    assert "threshold" not in made(kind, "topk").state_dict()
    batch, jumprelu = made(kind), made(kind, "jumprelu")
    assert batch.threshold is not None
    assert batch.threshold.shape == ()
    assert "threshold" not in dict(batch.named_parameters())
    assert "threshold" in batch.state_dict()
    assert dict(jumprelu.named_parameters())["threshold"].shape == (D_SAE,)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"selection": "best"}, "selection"),
        ({"selection": "batch", "k_max": 2}, "k_max"),
        ({"selection": "jumprelu", "k_max": D_SAE + 1}, "k_max"),
        ({"selection": "topk", "k_max": K + 1}, "k_max"),
        ({"selection": "jumprelu", "bandwidth": -1.0}, "bandwidth"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: given"):
        TopKSAE(D_IN, D_SAE, K, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_cannot_be_changed_later(kind: str) -> None:
    sae = made(kind)
    with pytest.raises(ValueError, match=r"^selection: given jumprelu"):
        sae.selection = "jumprelu"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", ["topk", "batch", "jumprelu"])
def test_a_saved_sae_comes_back_with_its_selection(kind, selection, tmp_path) -> None:
    sae = made(kind, selection)
    if sae.threshold is not None:
        with torch.no_grad():
            sae.threshold.fill_(0.25)
    sae.save_pretrained(tmp_path)
    back = load_sae(tmp_path)
    assert (back.selection, back.k_max) == (selection, sae.k_max)
    assert ("selection" in (tmp_path / CONFIG).read_text()) == (selection != "topk")
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
