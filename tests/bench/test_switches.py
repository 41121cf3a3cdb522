from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from given_windows import identity_sae
from torch import Tensor

from csae import ContextualSAE
from csae.attribution import attribute
from csae.bench.evidence.switches import START, information, measure
from csae.data.activations import Batch

R, T = 12, 36  # tokens a region, tokens a window
D = 10


class Given:
    """A source of windows that are given; position 0 is out of the mask."""

    def __init__(self, acts: Tensor) -> None:
        self.acts = acts
        self.n_windows, self.n_ctx, self.d_in = acts.shape

    def read(self, window_indices: Sequence[int]) -> Batch:
        acts = self.acts[torch.as_tensor(window_indices)]
        mask = torch.ones(acts.shape[:2], dtype=torch.bool)
        mask[:, 0] = False
        return Batch(acts, mask, torch.zeros(acts.shape[:2], dtype=torch.int64), None)

    def describe(self) -> dict[str, Any]:
        return {}


def layout(n: int, n_languages: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Regions, languages and offsets [n, T]; the languages take turns."""
    regions = (torch.arange(T) // R).expand(n, T)
    languages = (regions + torch.arange(n)[:, None]) % n_languages
    return regions, languages, (torch.arange(T) % R).expand(n, T)


def known_acts(languages: Tensor, offset: Tensor) -> Tensor:
    """Feature 0 is on all through language 0; 1 fires once in language 1, at offset 3; 2 at even offsets of 2.

    Feature 3 fires at each offset 5. Feature 4 fires at one position of every window: no mark.
    """
    acts = torch.zeros(*languages.shape, D)
    acts[..., 0] = (languages == 0).float()
    acts[..., 1] = ((languages == 1) & (offset == 3)).float()
    acts[..., 2] = ((languages == 2) & (offset % 2 == 0)).float()
    acts[..., 3] = (offset == 5).float()
    acts[:, 20, 4] = 1.0
    return acts


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    regions, languages, offset = layout(12)
    source = Given(known_acts(languages, offset))
    sae = identity_sae(D, 3)
    result = measure(sae, source, range(12), regions, languages, ["x", "y", "z"], batch_windows=4)
    assert sae.training
    return json.loads(json.dumps(result))


def mark(result: dict[str, Any], language: str, criterion: str) -> dict[str, Any]:
    (found,) = (m for m in result["marks"] if (m["language"], m["criterion"]) == (language, criterion))
    return found


@pytest.mark.parametrize("criterion", ["region", "start"])
def test_marks_are_found_where_they_were_put(known: dict[str, Any], criterion: str) -> None:
    for feature, language in enumerate("xyz"):
        found = mark(known, language, criterion)
        assert found["feature"] == feature
        third = math.log2(3) - 2 / 3  # the entropy of a third: nothing is left to say
        assert found["bits"] == pytest.approx(third)
        assert (found["recall"], found["false_alarms"], found["auc"]) == (1, 0, 1)
        assert found["active_elsewhere"] == 0


def test_where_marks_fire(known: dict[str, Any]) -> None:
    x, y, z = (mark(known, language, "region") for language in "xyz")
    assert x["rate_by_offset"] == [1] * R
    assert x["first_by_offset"] == [1] + [0] * (R - 1)
    assert (x["active_share"], x["flicker"], x["median_first"]) == (1, 0, 0)
    assert y["rate_by_offset"] == y["first_by_offset"] == [float(offset == 3) for offset in range(R)]
    assert y["median_first"] == 3
    # On and off once a region of 11 pairs; position 0 of a window is not seen, so a first region has 10.
    pairs = {(w, r): R - 1 - (r == 0) for w in range(6, 12) for r in range(3) if (w + r) % 3 == 1}
    assert y["flicker"] == pytest.approx(100 * 2 * len(pairs) / sum(pairs.values()))
    assert y["active_share"] == pytest.approx(len(pairs) / sum(n + 1 for n in pairs.values()))
    assert z["rate_by_offset"] == [1.0, 0.0] * (R // 2)
    assert z["flicker"] == pytest.approx(100)


def test_how_often_a_mark_fires_again(known: dict[str, Any]) -> None:
    x, y, z = (mark(known, language, "region") for language in "xyz")
    assert [found["at_once"] for found in (x, y, z)] == [1, 1, 1]
    assert [found["at_once_elsewhere"] for found in (x, y, z)] == [0, 0, 0]
    assert [found["again"] for found in (x, y, z)] == [R - 1, 0, R // 2 - 1]


def test_a_mark_that_comes_late_is_not_there_at_once() -> None:
    regions, languages, offset = layout(12)
    acts = torch.zeros(12, T, D)
    acts[..., 5] = ((languages == 1) & (offset >= START)).float()
    acts[..., 6] = ((languages == 2) & (offset % 9 == 0)).float()
    acts[::2, :, 6] += ((languages[::2] == 0) & (offset[::2] == 0)).float()
    result = measure(identity_sae(D, 2), Given(acts), range(12), regions, languages, list("xyz"))
    late, early = mark(result, "y", "region"), mark(result, "z", "region")
    assert (late["feature"], late["recall"], late["at_once"], late["again"]) == (5, 1, 0, None)
    assert (early["feature"], early["at_once"], early["again"]) == (6, 1, 1)
    after = [(w, r) for w in range(6, 12) for r in (1, 2) if (w + r) % 3 != 2]
    there = [w % 2 == 0 and (w + r) % 3 == 0 for w, r in after]
    assert early["at_once_elsewhere"] == pytest.approx(sum(there) / len(there))


def test_means_over_languages(known: dict[str, Any]) -> None:
    mean = known["mean_marks"]["region"]
    x, y, z = (mark(known, language, "region") for language in "xyz")
    assert mean["flicker"] == pytest.approx((0 + y["flicker"] + z["flicker"]) / 3)
    assert mean["rate_by_offset"][3] == pytest.approx((1 + 1 + 0) / 3)
    assert mean["rate_start"] == pytest.approx((8 + 1 + 4) / 3 / START)
    assert mean["rate_later"] == pytest.approx((4 + 0 + 2) / 3 / (R - START))
    assert mean["bits"] == pytest.approx(x["bits"])


def test_flicker_of_all_features(known: dict[str, Any]) -> None:
    _, languages, offset = layout(12)
    on = known_acts(languages, offset)[6:] > 0
    changes = active = onsets = 0
    for window in on:
        for t in range(2, T):  # position 0 is not seen
            if t % R:
                changes += int((window[t] != window[t - 1]).sum())
                onsets += int((window[t] & ~window[t - 1]).sum())
                active += int(window[t].sum())
    assert known["flicker"]["changes_per_active"] == pytest.approx(changes / active)
    assert known["flicker"]["mean_run"] == pytest.approx(active / onsets)


def test_readable_and_energy(known: dict[str, Any]) -> None:
    assert known["error"] == pytest.approx([0] * R, abs=1e-9)
    assert known["energy"]["acts"] == pytest.approx(known["energy"]["code"])
    readable = known["readable"]
    assert set(readable) == {"acts", "code", "chance"}
    assert readable["acts"] == readable["code"]
    # At even offsets each position shows its language; at odd ones all but language 0 look alike.
    assert [readable["code"]["by_offset"][o] for o in (0, 2, 4, 6)] == [1, 1, 1, 1]
    assert 0.6 < readable["code"]["by_offset"][7] < 0.7
    assert known["carried"] is None


def test_chosen_on_one_half_and_measured_on_the_other() -> None:
    """A feature that marks a language in the first half only is chosen, and found wanting."""
    regions, languages, _ = layout(12)
    acts = torch.zeros(12, T, D)
    acts[:6, :, 5] = (languages[:6] == 1).float()
    result = measure(identity_sae(D, 2), Given(acts), range(12), regions, languages, list("xyz"))
    found = mark(result, "y", "position")
    assert found["feature"] == 5
    assert found["bits"] > 0.9
    assert (found["recall"], found["auc"]) == (0, 0.5)


def test_information_against_its_definition() -> None:
    units = torch.tensor([7, 4, 9])
    fired = torch.tensor([[7, 0, 0], [3, 4, 1], [0, 0, 0], [7, 4, 9], [1, 2, 8]])
    bits = information(fired, units)
    n = int(units.sum())
    for f in range(5):
        for language in range(3):
            a, b = int(fired[f, language]), int(units[language])
            rest_a, rest_b = int(fired[f].sum()) - a, n - b
            joint = {(1, 1): a / n, (0, 1): (b - a) / n, (1, 0): rest_a / n, (0, 0): (rest_b - rest_a) / n}
            expected = sum(
                p * math.log2(p / (joint[i, 0] + joint[i, 1]) / (joint[0, j] + joint[1, j]))
                for (i, j), p in joint.items()
                if p
            )
            if a / b <= rest_a / rest_b:
                expected = 0.0
            assert float(bits[f, language]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("query", ["current", "past"])
def test_carried_against_brute_force(query: str) -> None:
    torch.manual_seed(0)
    regions, languages, _ = layout(8)
    acts = torch.randn(8, T, D) + 2 * torch.randn(3, D)[languages]
    sae = ContextualSAE(D, 24, 3, n_heads=2, d_head=4, d_value=5, query=query)
    with torch.no_grad():
        sae.W_O.mul_(5)
    source = Given(acts)
    result = measure(sae, source, range(8), regions, languages, list("xyz"), attributed_windows=2)
    json.dumps(result, allow_nan=False)
    carried = result["carried"]
    assert carried["windows"] == 2
    assert set(result["readable"]) == {"acts", "code", "carried", "chance"}
    sums: dict[tuple[Any, ...], list[float]] = {}

    def add(name: Any, t: int, value: float) -> None:
        sums.setdefault((name, t % R), []).append(value)

    sae.eval()
    for w in (4, 5):
        batch = source.read([w])
        found = attribute(sae, batch.acts[0], batch.mask[0])
        share, (values, indices) = found.share, found.output.code
        for t in range(R, T):
            began = t - t % R
            add("from_region", t, float(share[t, began:t].sum()))
            add("from_before", t, float(share[t, :began].sum()))
            add("from_start", t, float(share[t, began : min(t, began + START)].sum()))
            add("even_from_start", t, min(t % R, START) / (t - 1))
            for number, m in enumerate(result["marks"]):
                if "xyz"[int(languages[w, t])] != m["language"]:
                    continue
                slots = (indices == m["feature"]) & (values > 0)
                fired = [j for j in range(began, t) if slots[j].any()]
                if fired:
                    add((number, "share_by_offset"), t, float(sum(share[t, j][slots[j]].sum() for j in fired)))
                    add((number, "first_by_offset"), t, float(share[t, fired[0]][slots[fired[0]]].sum()))
                    others = (values[fired[0]] > 0) & ~slots[fired[0]]
                    add((number, "other_by_offset"), t, float(share[t, fired[0]][others].mean()))
    for o in range(R):
        for name in ("from_region", "from_before", "from_start", "even_from_start"):
            given = sums[name, o]
            assert carried[name][o] == pytest.approx(sum(given) / len(given), abs=1e-5), (name, o)
        for number, m in enumerate(carried["marks"]):
            for name in ("share_by_offset", "first_by_offset", "other_by_offset"):
                mean = sums.get(((number, name), o))
                expected = None if mean is None else pytest.approx(sum(mean) / len(mean), abs=1e-5)
                assert m[name][o] == expected, (m["language"], m["criterion"], name, o)


def test_readable_tells_the_parts_apart() -> None:
    """Where the look-back writes nothing, c shows no language and the code shows it all."""
    torch.manual_seed(0)
    regions, languages, _ = layout(24)
    acts = 0.1 * torch.randn(24, T, D) + 3 * torch.eye(3, D)[languages]
    sae = ContextualSAE(D, D, 3, n_heads=1, d_head=2, d_value=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
        sae.W_O.zero_()
    result = measure(sae, Given(acts), range(24), regions, languages, list("xyz"))
    assert result["readable"]["code"]["accuracy"] == 1
    assert result["readable"]["carried"]["accuracy"] <= result["readable"]["chance"] + 1e-6
    assert result["energy"]["carried"] == [0] * R
    assert result["carried"]["from_start"] == [None] * R


def test_bad_input() -> None:
    regions, languages, offset = layout(4)
    source = Given(known_acts(languages, offset))
    with pytest.raises(ValueError, match=r"regions: given shape \[3, 36\]; needed \[n, T\] = \[4, 36\]"):
        measure(identity_sae(D, 2), source, range(4), regions[:3], languages, ["x", "y", "z"])
    with pytest.raises(ValueError, match="windows: given 2; needed 4 or more"):
        measure(identity_sae(D, 2), source, range(2), regions[:2], languages[:2], ["x", "y", "z"])
