"""Each architecture of tests/architectures.py has the blocks, width and vocabulary that it promises."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, D_IN, MISSING, N_LAYERS, VOCABULARY


def test_there_are_enough() -> None:
    assert len(ARCHITECTURES) >= 20
    assert not set(ARCHITECTURES) & set(MISSING)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MISSING])
def test_a_tiny_model_of_each(name: str) -> None:
    if name in MISSING:
        pytest.skip(MISSING[name])
    model, again = ARCHITECTURES[name](), ARCHITECTURES[name]()
    config = model.config.get_text_config()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (D_IN, N_LAYERS, VOCABULARY)
    ids = torch.randint(3, 300, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, again(input_ids=ids).logits), "the weights change"
    assert logits.shape == (2, 128, VOCABULARY)
    assert logits.isfinite().all()
    assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
