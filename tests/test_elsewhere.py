"""An SAE at another place than it was trained on: spliced and viewed only where that is asked for."""

from __future__ import annotations

import pytest
import torch

from csae import TopKSAE, splice
from csae.data.language_model import LanguageModel
from csae.pages.view import read_windows, view
from csae.trained_on import RESIDUAL, TrainedOn

TEXT = "The sluice at the lower mill was opened on the third morning."


@pytest.fixture
def sae(tiny_lm: LanguageModel) -> TopKSAE:
    torch.manual_seed(0)
    sae = TopKSAE(tiny_lm.d_in, 32, 4).eval()
    sae.trained_on = TrainedOn.of({"model": tiny_lm.name, "layer": 2})
    return sae


def test_splicing(sae: TopKSAE, tiny_lm: LanguageModel) -> None:
    ids = torch.arange(3, 15)[None]
    for model in (tiny_lm, tiny_lm.model):
        for layer, elsewhere in ((2, False), (1, True)):
            with splice(model, layer, sae, elsewhere=elsewhere) as spliced:
                tiny_lm.model(input_ids=ids)
            assert spliced.output is not None
        with (
            pytest.raises(ValueError, match=r"trained on layer 2 of .*, and this is layer 1 of .*elsewhere=True"),
            splice(model, 1, sae),
        ):
            pass
    sae.trained_on = TrainedOn("org/another", 2, RESIDUAL)
    with pytest.raises(ValueError, match=r"trained on layer 2 of org/another .*and this is"), splice(tiny_lm, 2, sae):
        pass


def test_a_model_that_was_made_by_hand_has_no_name_to_compare(sae: TopKSAE, tiny_lm: LanguageModel) -> None:
    by_hand = type(tiny_lm.model)(tiny_lm.model.config).eval()
    by_hand.name_or_path = ""
    with splice(by_hand, 2, sae) as spliced:
        by_hand(input_ids=torch.arange(3, 15)[None])
    assert spliced.output is not None


def test_viewing(sae: TopKSAE, tiny_lm: LanguageModel) -> None:
    windows, _ = read_windows(tiny_lm, 2, TEXT, 16)
    assert view(sae, windows, tiny_lm)["tokens"]
    sae.trained_on = TrainedOn("org/another", 2, RESIDUAL)
    with pytest.raises(ValueError, match=r"trained on layer 2 of org/another .*and this is"):
        view(sae, windows, tiny_lm)
    assert view(sae, windows, tiny_lm, elsewhere=True)["tokens"]
