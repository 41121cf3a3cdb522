"""Passages and examples of held-out text, against the source's tokens and the model's own output."""

from __future__ import annotations

import pytest
import torch

from csae import ContextualSAE
from csae.data.activations import ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.text import TokenWindows, tokenize
from csae.errors import UserError
from csae.pages.held_out import BEFORE, examples, passages

LAYER, N_CTX, K = 2, 24, 10


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


@torch.no_grad()
def test_examples(source: ModelActivations) -> None:
    torch.manual_seed(0)
    sae = ContextualSAE(source.lm.d_in, 64, K, n_heads=2, d_head=4, d_value=6).eval()
    windows = range(1, source.n_windows)
    acts, mask, documents, tokens = source.read(windows)[:4]
    sae.initialise(acts.mean(dim=(0, 1)), float(acts.std()))
    sae.W_O.mul_(5)
    code = sae(acts, mask, documents, exact=True).code
    found = examples(sae, source, windows, source.lm.tokenizer, [63, *range(5)])
    assert list(found) == ["63", "0", "1", "2", "3", "4"]
    for name, about in found.items():
        strength = (code.values * (code.indices == int(name))).sum(dim=-1).masked_fill(~mask, 0)  # [N, T]
        assert about["rate"] == pytest.approx(float((strength > 0).sum() / mask.sum()), abs=1e-5)
        best_by_window = strength.max(dim=1).values.sort(descending=True).values[:4]
        shown = [value for *_, value in about["examples"]]
        assert shown == pytest.approx([float(value) for value in best_by_window if value > 0], abs=0.006)
        if shown:
            row, t = divmod(int(strength.argmax()), N_CTX)
            before, here, after, _ = about["examples"][0]
            assert before + here + after == source.lm.tokenizer.decode(tokens[row, max(0, t - BEFORE) : t + 5])


def test_activations_without_tokens(source: ModelActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    read = source.read
    monkeypatch.setattr(source, "read", lambda indices: read(indices)._replace(tokens=None))
    with pytest.raises(UserError, match="without token ids"):
        passages(source, range(2), source.lm.tokenizer, 1)
