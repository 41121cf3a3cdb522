"""Effects on the logits against the model's own, and where they are noise."""

from __future__ import annotations

import pytest
import torch

from csae import TopKSAE
from csae.data.language_model import LanguageModel
from csae.features.effects import (
    LISTED,
    Best,
    Effects,
    effects_of,
    noise_level,
    scores,
    similar,
    strongest_tokens,
    writes_to_stream,
)
from csae.trained_on import TrainedOn


@pytest.fixture(scope="module")
def effects(tiny_lm: LanguageModel) -> Effects:
    return effects_of(tiny_lm)


def test_scores_are_the_models_own(tiny_lm: LanguageModel, effects: Effects) -> None:
    torch.manual_seed(0)
    directions = 7 * torch.randn(300, tiny_lm.d_in)
    own = tiny_lm.logit_effects(directions)
    own = (own - own.mean(dim=1, keepdim=True)) / own.std(dim=1, keepdim=True)
    torch.testing.assert_close(scores(effects, directions), own, rtol=1e-4, atol=1e-4)
    some = torch.tensor([7, 3])
    torch.testing.assert_close(scores(effects, directions, some), own[:, some], rtol=1e-4, atol=1e-4)


def test_strongest_tokens(tiny_lm: LanguageModel, effects: Effects) -> None:
    torch.manual_seed(0)
    directions = torch.randn(3, tiny_lm.d_in)
    found = scores(effects, directions)
    for row, effect in enumerate(strongest_tokens(effects._replace(noise=0), tiny_lm.tokenizer, directions)):
        assert effect["up"][1::2] == pytest.approx(found[row].topk(LISTED).values.tolist(), abs=0.051)
        assert effect["down"][1::2] == pytest.approx((-(-found[row]).topk(LISTED).values).tolist(), abs=0.051)
        assert effect["up"][0] == tiny_lm.tokenizer.decode([int(found[row].argmax())])
    assert strongest_tokens(effects._replace(noise=99), tiny_lm.tokenizer, directions) == [{"up": [], "down": []}] * 3
    assert strongest_tokens(effects, tiny_lm.tokenizer, directions[:0]) == []


def test_random_directions_are_noise_and_that_of_a_few_tokens_is_not() -> None:
    torch.manual_seed(0)
    unembedding = torch.randn(256, 2000)
    unembedding -= unembedding.mean(dim=1, keepdim=True)
    effects = Effects(unembedding, unembedding @ unembedding.T / 1999, 0.0)
    effects = effects._replace(noise=noise_level(effects))
    assert effects.noise == noise_level(effects)

    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(f"<{token}>" for token in ids)

    random = strongest_tokens(effects, Tokenizer(), torch.randn(1000, 256))
    assert 0 < sum(bool(effect["up"]) for effect in random) < 40, "about 1 in 100 by chance"
    meant = unembedding[:, :5].sum(dim=1)[None]
    (effect,) = strongest_tokens(effects, Tokenizer(), meant)
    assert set(effect["up"][::2]) >= {f"<{token}>" for token in range(5)}
    assert effect["down"] == []


def test_best_and_similar(effects: Effects) -> None:
    torch.manual_seed(0)
    directions = torch.randn(700, len(effects.spread))
    tokens = torch.tensor([3, 200, 7])
    best = Best.of_none(3, torch.device("cpu"))
    for start in range(0, 700, 300):
        best = best.joined(scores(effects, directions[start : start + 300], tokens), start, 5)
    expected = scores(effects, directions)[:, tokens].T.topk(5)
    torch.testing.assert_close(best.scores, expected.values)
    assert torch.equal(best.rows, expected.indices)
    few = Best.of_none(3, torch.device("cpu")).joined(torch.randn(2, 3), 0, 5)
    assert few.scores.shape == (3, 2)

    cosines, rows = similar(directions, torch.tensor([5, 699]), 4)
    unit = torch.nn.functional.normalize(directions, dim=1)
    expected = (unit @ unit.T - 3 * torch.eye(700))[[5, 699]].topk(4)
    torch.testing.assert_close(cosines, expected.values)
    assert torch.equal(rows, expected.indices)
    assert similar(directions, torch.tensor([], dtype=torch.int64), 4)[1].shape == (0, 4)


@pytest.mark.parametrize(
    ("hook", "writes"),
    [(None, True), ("resid_post", True), ("resid.out:3", True), ("mlp.out:3", True), ("mlp.in:3", False)],
)
def test_which_features_write_to_the_stream(hook: str | None, writes: bool, tiny_lm: LanguageModel) -> None:
    sae = TopKSAE(tiny_lm.d_in, 8, 2)
    sae.trained_on = TrainedOn(hook=hook)
    assert writes_to_stream(sae, tiny_lm) == writes
    assert not writes_to_stream(TopKSAE(tiny_lm.d_in + 1, 8, 2), tiny_lm)
