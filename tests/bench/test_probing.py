from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from given_windows import GivenWindows, identity_sae
from torch import Tensor

from csae import ContextualSAE
from csae.attribution import attribute
from csae.bench.evidence import labels, probing
from csae.bench.evidence.texts import Switching, one_document_each

N, T, D = 8, 24, 10


def source(acts: Tensor) -> GivenWindows:
    mask = torch.ones(acts.shape[:2], dtype=torch.bool)
    mask[:, 0] = False
    return GivenWindows(acts, mask, torch.zeros(acts.shape[:2], dtype=torch.int64))


def f1(said: Tensor, holds: Tensor, counts: Tensor) -> float:
    right = (said & holds & counts).sum()
    return float(2 * right / ((said & counts).sum() + (holds & counts).sum()))


def test_a_feature_that_is_the_label_and_five_that_share_it() -> None:
    which = torch.arange(N * T).reshape(N, T) % 12
    acts = torch.zeros(N, T, D)
    acts[..., 0] = (which >= 8).float()  # the label itself, and
    for feature in range(5):  # five parts of another
        acts[..., 1 + feature] = (which == feature).float()
    given = {"from eight": (which >= 8).to(torch.int8), "below five": (which < 5).to(torch.int8)}
    above, below = probing.measure(identity_sae(D, 4), source(acts), range(N), given)
    assert above["f1"] == {"1": 1.0, "5": 1.0}
    assert below["f1"]["5"] == 1.0
    assert below["f1"]["1"] == pytest.approx(2 * 2 / (2 + 9))  # two of nine in a window, position 0 out
    share = float(below["share"])
    assert share == pytest.approx(9 / 23)
    assert below["always"] == pytest.approx(2 * share / (1 + share))
    assert below["part"] == "new"


def test_chosen_on_one_half_and_measured_on_the_other() -> None:
    acts = torch.zeros(N, T, D)
    label = torch.zeros(N, T, dtype=torch.int8)
    label[:, ::3] = 1
    acts[: N // 2, ::3, 0] = 1.0  # a feature that has the label in the first half only
    acts[N // 2 :, 1::3, 0] = 1.0
    (found,) = probing.measure(identity_sae(D, 2), source(acts), range(N), {"third": label})
    assert found["f1"] == {"1": 0.0, "5": 0.0}


def test_a_level_below_which_a_feature_does_not_count() -> None:
    acts = torch.zeros(N, T, D)
    acts[..., 0] = torch.where(torch.arange(T) % 4 == 0, 8.0, 1.0)  # large where the label is, small elsewhere
    label = (torch.arange(T) % 4 == 0).to(torch.int8).expand(N, T)
    (found,) = probing.measure(identity_sae(D, 2), source(acts), range(N), {"fourth": label})
    assert found["f1"]["1"] == 1.0


def test_unknown_positions_and_masked_ones_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(N, T, D, generator=generator)
    label = torch.randint(-1, 2, (N, T), generator=generator, dtype=torch.int8)
    (found,) = probing.measure(identity_sae(D, 3), source(acts), range(N), {"any": label})
    counts = torch.ones(N, T, dtype=torch.bool)
    counts[:, 0] = False
    counts &= label >= 0
    half = counts[N // 2 :]
    assert found["share"] == pytest.approx(float((label == 1)[N // 2 :][half].double().mean()))


@pytest.mark.parametrize("seed", range(3))
def test_greedy_choice_against_all_of_it_written_out(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(9, 50, generator=generator) < 0.2  # [items, positions]
    counts, holds = torch.rand(50, generator=generator) < 0.8, torch.rand(50, generator=generator) < 0.4
    items, positions = fires.nonzero(as_tuple=True)
    found = probing.best(probing.Firings(positions, items, 9), counts, holds, 3)
    said, score = torch.zeros(50, dtype=torch.bool), 0.0
    expected: list[int] = []
    for _ in range(3):
        scores = [f1(said | fires[item], holds, counts) for item in range(9)]
        item = max(range(9), key=lambda i: scores[i])
        if scores[item] <= score:
            break
        expected.append(item)
        said, score = said | fires[item], scores[item]
    assert found == expected
    assert probing.f1_of(probing.Firings(positions, items, 9), found, counts, holds) == pytest.approx(score)


def test_what_is_carried_is_what_attribution_says() -> None:
    torch.manual_seed(0)
    sae = ContextualSAE(D, 32, k=4, query="past").eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    acts = torch.randn(4, T, D)
    given = source(acts)
    what = [attribute(sae, acts[n], given.mask[n], given.documents[n]) for n in range(4)]
    share = torch.zeros(4, T, 32)
    for n, one in enumerate(what):
        share[n][:, one.features] = one.share_by_feature(0, T)
    carried = share > 0.1
    feature = int(carried.sum(dim=(0, 1)).argmax())
    assert carried[..., feature].any()
    label = carried[..., feature].to(torch.int8)
    found = {of["part"]: of for of in probing.measure(sae, given, range(4), {"carried": label})}
    assert set(found) == {"new", "carried", "both"}
    assert found["carried"]["f1"]["1"] == 1.0
    assert found["both"]["f1"]["1"] == 1.0


def test_labels_of_another_shape_are_refused() -> None:
    acts = torch.randn(N, T, D)
    with pytest.raises(ValueError, match="labels: any has shape"):
        probing.measure(identity_sae(D, 2), source(acts), range(N), {"any": torch.zeros(N, T + 1, dtype=torch.int8)})
    with pytest.raises(ValueError, match="windows: given 1"):
        probing.measure(identity_sae(D, 2), source(acts), range(1), {})


class Characters:
    """A tokenizer with a token for every two characters of a text."""

    def __init__(self, text: str) -> None:
        self.pieces = [text[i : i + 2] for i in range(0, len(text), 2)]

    @property
    def tokens(self) -> Tensor:
        return torch.arange(len(self.pieces), dtype=torch.int32)[None]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.pieces[token] for token in tokens)


def test_labels_of_words() -> None:
    text = "Left out. The old dog runs, in Rome. It sleeps.\n\nNew start"
    tagged = {"The": "AT0", "old": "AJ0", "dog": "NN1", "runs": "VVZ", "in": "PRP", "Rome": "NP0", "It": "PNP"}
    asked = []

    def tag(words: Sequence[str]) -> list[str]:
        asked.append(list(words))
        return [tagged.get(word, "XX0") for word in words]

    tokenizer = Characters(text)
    found = labels.of_words(tokenizer.tokens, tokenizer, tag)
    sentences = [["Left", "out"], ["The", "old", "dog", "runs", "in", "Rome"], ["It", "sleeps"], ["New", "start"]]
    assert asked == sentences
    for name, word in {"noun": "dog", "verb": "runs", "name": "Rome", "preposition": "in", "adjective": "old"}.items():
        start = text.index(f" {word}") + 1
        touched = set(range(start // 2, (start + len(word) - 1) // 2 + 1))
        said = set((found[name][0] == 1).nonzero().flatten().tolist())
        # A token of two characters may hold the end of the word before, and then has that word's label.
        assert said <= touched, name
        assert said, name
    start = found["sentence start"][0]
    assert start[: text.index("The") // 2].max() == -1  # nobody knows where that sentence began
    for word, expected in {"The": 1, "dog": 0, "Rome": 0, "sleeps": 1, "New": 1}.items():
        assert start[(text.index(word) + 1) // 2] == expected, word


def test_labels_of_switches() -> None:
    languages = torch.tensor([[0, 0, 1, 1], [2, 2, 0, 0]])
    windows = one_document_each(torch.zeros(2, 4, dtype=torch.int32))
    held = Switching(windows, torch.zeros(2, 4, dtype=torch.int64), languages, ["de", "en", "fr"])
    found = labels.of_switches(held)
    assert {name: label.tolist() for name, label in found.items()} == {
        "de": [[1, 1, 0, 0], [0, 0, 1, 1]],
        "en": [[0, 0, 1, 1], [0, 0, 0, 0]],
        "fr": [[0, 0, 0, 0], [1, 1, 0, 0]],
    }
    two = Switching(windows, held.regions, languages.clamp_max(1), ["prose", "code"])
    assert list(labels.of_switches(two)) == ["code"]


def test_pythons_own_code() -> None:
    sources = labels.python_code()
    assert len(sources) > 100
    assert any("def " in source for source in sources)
    assert not any(line.lstrip().startswith("#") for source in sources for line in source.splitlines())


def test_the_tagger() -> None:
    pytest.importorskip("HanTa", reason="the package HanTa is not installed")
    tag = labels.hanta()
    assert list(tag(["The", "dog", "sleeps"]))[1].startswith("NN")
