"""What is said about a passage, against the model's own output."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from csae import ContextualSAE
from csae.data.activations import ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.text import TokenWindows, tokenize
from csae.errors import UserError
from csae.passages import BEFORE, NEW_SHOWN, explain

LAYER, N_CTX, K = 2, 24, 10


@pytest.fixture(scope="module")
def explained(tiny_lm: LanguageModel) -> tuple[dict[str, Any], ContextualSAE, ModelActivations]:
    torch.manual_seed(0)
    documents = [
        "The mill in the village was slow. " * 12,
        "Water came down; nobody heard it! " * 12,
        "1 2 3 4 5 " * 40,
    ]
    source = ModelActivations(tiny_lm, LAYER, tokenize(documents, tiny_lm.tokenizer, N_CTX))
    sae = ContextualSAE(tiny_lm.d_in, 64, K, n_heads=2, d_head=4, d_value=6).eval()
    acts = source.read(range(source.n_windows)).acts
    sae.initialise(acts.mean(dim=(0, 1)), float(acts.std()))
    with torch.no_grad():
        sae.W_O.mul_(5)
    found = explain(sae, source, range(1, source.n_windows), tiny_lm.tokenizer, 2)
    return json.loads(json.dumps(found, allow_nan=False)), sae, source


def test_passages(explained: tuple[dict[str, Any], ContextualSAE, ModelActivations]) -> None:
    found, sae, source = explained
    assert len(found["passages"]) == 2
    for passage in found["passages"]:
        acts, mask, documents, tokens = source.read([passage["window"]])
        out = sae(acts, mask, documents, exact=True)
        x_hat, c, values, indices = out.x_hat[0], out.c[0], out.code.values[0], out.code.indices[0]
        assert "".join(token["text"] for token in passage["tokens"]) == source.lm.tokenizer.decode(tokens[0])
        assert len(set(documents[0].tolist())) == 1, "windows without a boundary were there"
        b = (sae.b_dec * sae.scale).detach()
        for t, token in enumerate(passage["tokens"]):
            assert token["counted"] == bool(mask[0, t])
            assert token["l0"] == int((values[t] > 0).sum())
            if not token["counted"]:
                assert token["new"] == token["sources"] == []
                continue
            carried = float(c[t] @ (x_hat[t] - b) / (x_hat[t] - b).square().sum())
            missed = float((acts[0, t] - x_hat[t]).square().sum() / (acts[0, t] - b).square().sum())
            assert token["carried"] == pytest.approx(carried, abs=1e-3)
            assert token["missed"] == pytest.approx(missed, abs=1e-3)
            active = [[int(f), float(v)] for f, v in zip(indices[t], values[t], strict=True) if v > 0][:NEW_SHOWN]
            assert [feature for feature, _ in token["new"]] == [feature for feature, _ in active]
            assert [value for _, value in token["new"]] == pytest.approx([value for _, value in active], abs=0.006)
            assert all(j < t and share > 0 for j, share, _ in token["sources"])
            shares = [share for _, share, _ in token["sources"]]
            assert shares == sorted(shares, reverse=True)
            for j, _, parts in token["sources"]:
                assert {feature for feature, _ in parts} <= set(indices[j].tolist())
    last = found["passages"][0]["tokens"][-1]
    assert sum(share for _, share, _ in last["sources"]) > 0.3


def test_features(explained: tuple[dict[str, Any], ContextualSAE, ModelActivations]) -> None:
    found, sae, source = explained
    windows = range(1, source.n_windows)
    acts, mask, documents, tokens = source.read(windows)
    code = sae(acts, mask, documents, exact=True).code
    mentioned = {feature for p in found["passages"] for token in p["tokens"] for feature, _ in token["new"]}
    assert mentioned <= {int(feature) for feature in found["features"]}
    for name in list(found["features"])[:5]:
        about = found["features"][name]
        strength = (code.values * (code.indices == int(name))).sum(dim=-1).masked_fill(~mask, 0)  # [N, T]
        assert about["rate"] == pytest.approx(float((strength > 0).sum() / mask.sum()), abs=1e-5)
        best_by_window = strength.max(dim=1).values.sort(descending=True).values[:4]
        shown = [value for *_, value in about["examples"]]
        assert shown == pytest.approx([float(value) for value in best_by_window if value > 0], abs=0.006)
        row, t = divmod(int(strength.argmax()), N_CTX)
        before, here, after, _ = about["examples"][0]
        text = source.lm.tokenizer.decode(tokens[row, max(0, t - BEFORE) : t + 5])
        assert before + here + after == text


def test_boundaries_and_missing_tokens(tiny_lm: LanguageModel) -> None:
    torch.manual_seed(0)
    windows = TokenWindows(torch.randint(5, 100, (2, 8)), torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2))
    source = ModelActivations(tiny_lm, LAYER, windows)
    sae = ContextualSAE(tiny_lm.d_in, 20, 3, n_heads=2).eval()
    found = explain(sae, source, range(2), tiny_lm.tokenizer, 1)
    tokens = found["passages"][0]["tokens"]
    assert [t for t, token in enumerate(tokens) if token["starts"]] == [3, 6]
    assert tokens[3]["sources"] == tokens[6]["sources"] == []
    assert {j for j, _, _ in tokens[5]["sources"]} <= {3, 4}

    read = source.read
    source.read = lambda indices: read(indices)._replace(tokens=None)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="without token ids"):
        explain(sae, source, range(2), tiny_lm.tokenizer, 1)
