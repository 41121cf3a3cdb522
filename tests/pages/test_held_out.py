"""Passages of held-out text, against the tokens of the source."""

from __future__ import annotations

import pytest
import torch

from csae.data.activations import ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.text import TokenWindows, tokenize
from csae.errors import UserError
from csae.pages.held_out import passages

LAYER, N_CTX = 2, 24


@pytest.fixture(scope="module")
def source(tiny_lm: LanguageModel) -> ModelActivations:
    documents = [
        "The mill in the village was slow. " * 12,
        "Water came down; nobody heard it! " * 12,
        "1 2 3 4 5 " * 40,
    ]
    return ModelActivations(tiny_lm, LAYER, tokenize(documents, tiny_lm.tokenizer, N_CTX))


def test_passages(source: ModelActivations) -> None:
    windows = range(1, source.n_windows)
    found = passages(source, windows, source.lm.tokenizer, 2)
    assert len(found) == 2
    acts, mask, _, tokens = source.read(windows)[:4]
    for passage in found:
        assert passage.pieces is not None
        text = "".join(passage.pieces)
        assert text == source.lm.tokenizer.decode(passage.tokens)
        assert "mill" in text or "Water" in text, "prose, not the numbers"
        row = next(row for row in range(len(tokens)) if torch.equal(tokens[row], passage.tokens))
        assert torch.equal(passage.acts, acts[row])
        assert torch.equal(passage.mask, mask[row])
    assert len({"mill" in "".join(passage.pieces or ()) for passage in found}) == 2, "each from another document"


def test_a_passage_ends_with_its_document(tiny_lm: LanguageModel) -> None:
    torch.manual_seed(0)
    windows = TokenWindows(torch.randint(5, 100, (2, 8)), torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2))
    source = ModelActivations(tiny_lm, LAYER, windows)
    found = passages(source, range(2), tiny_lm.tokenizer, 9)
    assert sorted(len(passage.tokens) for passage in found) == [2, 3, 3]


def test_activations_without_tokens(source: ModelActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    read = source.read
    monkeypatch.setattr(source, "read", lambda indices: read(indices)._replace(tokens=None))
    with pytest.raises(UserError, match="without token ids"):
        passages(source, range(2), source.lm.tokenizer, 1)
