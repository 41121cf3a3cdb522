"""Windows of known features: what they are made of, and the measures on codes and SAEs whose figures are known."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from csae import ContextualSAE, TopKSAE
from csae.bench.evidence import synthetic
from csae.bench.evidence.synthetic import Windows
from csae.config import TrainConfig
from csae.sae import Code
from csae.train import train

N_CTX, LENGTH = 24, 6
SIZES = {"n_ctx": N_CTX, "d_in": 20, "n_region": 6, "n_token": 10, "region_on": 2, "token_on": 3}


def windows(noise: float = 0.0, length: int = LENGTH, n: int = 40, seed: int = 0) -> Windows:
    return Windows(length, n, seed, noise=noise, **SIZES)


def orthogonal(source: Windows) -> Windows:
    """The same windows, of features at right angles."""
    torch.manual_seed(11)
    basis = torch.linalg.qr(torch.randn(source.d_in, source.d_in)).Q
    source.region_directions, source.token_directions = basis[:16].split([6, 10])
    return source


def oracle(source: Windows, k: int) -> TopKSAE:
    """The per-token SAE that has a feature for each of the data's; two of its 18 are of nothing there."""
    sae = TopKSAE(20, 18, k)
    with torch.no_grad():
        sae.W_dec[:16] = torch.cat([source.region_directions, source.token_directions])
        sae.W_dec[16:] = 0
        sae.W_enc.copy_(sae.W_dec)
    return sae.eval()


def test_a_window_is_what_it_is_said_to_be_made_of():
    source = windows()
    batch, truth = source.draw(range(40))
    assert truth.starts.tolist() == [0, 6, 12, 18]
    region = truth.region[:, torch.arange(N_CTX) // LENGTH]  # [B, T, n_region]
    expected = region @ source.region_directions + truth.token @ source.token_directions
    torch.testing.assert_close(batch.acts, expected)
    for magnitudes, on, between in ((truth.region, 2, (1.5, 2.5)), (truth.token, 3, (0.5, 1.5))):
        assert ((magnitudes > 0).sum(dim=-1) == on).all()
        positive = magnitudes[magnitudes > 0]
        assert between[0] <= positive.min() < positive.max() <= between[1]
        assert ((magnitudes > 0).flatten(0, 1).sum(dim=0) > 0).all()
    assert not ((truth.region[:, 1:] > 0) & (truth.region[:, :-1] > 0)).any()
    assert batch.mask.all()
    assert (batch.documents == 0).all()
    for directions in (source.region_directions, source.token_directions):
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(len(directions)))


def test_noise_is_as_large_as_it_is_said_to_be():
    quiet, noisy = (windows(noise).read(range(40)).acts for noise in (0.0, 0.3))
    assert float((noisy - quiet).std()) == pytest.approx(0.3, rel=0.02)


def test_windows_come_from_the_seed_and_their_number_alone():
    together = windows(0.1).read([3, 7]).acts
    assert torch.equal(together[1], windows(0.1).read([7]).acts[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, windows(0.1, seed=1).read([3, 7]).acts)
    assert torch.equal(windows().region_directions, windows(length=4).region_directions)
    assert not torch.equal(windows().region_directions, windows(seed=1).region_directions)


@pytest.mark.parametrize(
    ("given", "argument"),
    [({"region_length": 5}, "region_length"), ({"region_on": 4}, "region_on"), ({"token_on": 0}, "token_on")],
)
def test_sizes_that_do_not_fit_are_named(given, argument):
    with pytest.raises(ValueError, match=argument):
        Windows(**({"region_length": LENGTH, "n_windows": 4} | SIZES | given))


def test_a_per_token_oracle_pays_for_a_region_at_every_position():
    source = orthogonal(windows())
    found = synthetic.figures(oracle(source, k=5), source, range(40))
    assert found["fires_per_region"] == pytest.approx(LENGTH)
    assert found["versions_per_region"] == pytest.approx(LENGTH)
    assert found["fires_at"] == [1.0] * LENGTH
    assert found["fires_share"] == found["found"] == found["found_at_start"] == found["token_found"] == 1
    assert found["fires_off"] == found["token_off"] == 0
    for name in ("region_cosine", "region_cosine_min", "token_cosine"):
        assert found[name] == pytest.approx(1, abs=1e-5), name
    assert found["fvu"] == pytest.approx(0, abs=1e-9)
    assert "carried" not in found


def test_the_least_of_what_is_on_is_left_out_where_k_is_short():
    source = orthogonal(windows())
    _, truth = source.draw(range(40))
    region = truth.region[:, torch.arange(N_CTX) // LENGTH]
    both = torch.cat([region, truth.token], dim=-1)
    kept = torch.zeros_like(both).scatter_(-1, both.topk(3).indices, 1)
    found = synthetic.figures(oracle(source, k=3), source, range(40))
    assert found["fires_share"] == pytest.approx(float(kept[..., :6][region > 0].mean()))
    assert found["token_found"] == pytest.approx(float(kept[..., 6:][truth.token > 0].mean()))


def test_firings_of_codes_that_show_a_region_once():
    source = orthogonal(windows())
    _, truth = source.draw(range(40))
    rows = torch.cat([source.region_directions, source.token_directions])

    def code_at(places: list[int]) -> Code:
        """The region's features at these positions of each region, and token features everywhere."""
        shown = torch.zeros(40, N_CTX, 6)
        for place in places:
            shown[:, truth.starts + place] = truth.region
        values, indices = torch.cat([shown, truth.token], dim=-1).topk(5)
        return Code(values, indices)

    once = synthetic.firings(code_at([0]), rows, source, truth)
    assert once["fires_per_region"] == once["found"] == once["found_at_start"] == 1
    assert once["fires_at"] == [1.0, 0, 0, 0, 0, 0]
    assert once["fires_off"] == 0
    later = synthetic.firings(code_at([2, 5]), rows, source, truth)
    assert (later["fires_per_region"], later["found"], later["found_at_start"]) == (2, 1, 0)
    assert later["fires_share"] == pytest.approx(2 / LENGTH)
    assert later["token_found"] == 1
    never = synthetic.firings(code_at([]), rows, source, truth)
    assert (never["fires_per_region"], never["found"]) == (0, 0)


def test_a_feature_that_was_on_before_in_its_window_is_told_apart():
    source = orthogonal(windows())
    _, truth = source.draw(range(40))
    rows = torch.cat([source.region_directions, source.token_directions])
    shown, expected = torch.zeros(40, N_CTX, 6), 0
    for window in range(40):
        seen: set[int] = set()
        for region, start in enumerate(truth.starts.tolist()):
            for feature in set(truth.region[window, region].nonzero().flatten().tolist()) - seen:
                shown[window, start + 1, feature] = 1
                expected += 1
            seen |= set(truth.region[window, region].nonzero().flatten().tolist())
    found = synthetic.firings(Code(*shown.topk(2)), rows, source, truth)
    assert (found["regions"], found["regions_first"]) == (40 * 4 * 2, expected)
    assert found["fires_per_region"] == pytest.approx(expected / 320)
    assert found["first"]["fires_per_region"] == found["first"]["found"] == 1
    assert found["first"]["found_at_start"] == 0


def test_a_feature_that_is_split_is_counted_together():
    source = orthogonal(windows())
    _, truth = source.draw(range(4))
    like = torch.nn.functional.normalize(source.region_directions + 0.5 * source.token_directions[:6], dim=1)
    rows = torch.cat([source.region_directions, like])  # 6 features and a version of each
    shown = torch.zeros(4, N_CTX, 12)
    shown[:, truth.starts, :6] = truth.region
    shown[:, truth.starts + 1, 6:] = truth.region
    found = synthetic.firings(Code(*shown.topk(4)), rows, source, truth)
    assert (found["fires_per_region"], found["versions_per_region"]) == (1, 2)


def test_firing_where_the_feature_is_off_is_counted():
    source = orthogonal(windows())
    _, truth = source.draw(range(4))
    rows = torch.cat([source.region_directions, source.token_directions])
    everywhere = Code(torch.ones(4, N_CTX, 1), torch.zeros(4, N_CTX, 1, dtype=torch.int64))  # feature 0
    found = synthetic.firings(everywhere, rows, source, truth)
    off = truth.region == 0  # [B, R, 6]
    assert found["fires_off"] == pytest.approx(float(off[..., 0].sum() / off.sum()))


def test_what_is_carried_is_what_c_holds_where_there_is_one_past_position():
    source = orthogonal(Windows(2, 8, 0, n_ctx=2, d_in=20, n_region=6, n_token=10, region_on=1, token_on=1, noise=0.0))
    torch.manual_seed(2)
    sae = ContextualSAE(20, 16, 1, n_heads=2, d_head=4, d_value=5).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([source.region_directions, source.token_directions]))
        sae.W_enc.copy_(sae.W_dec)
        sae.W_enc[6:] *= 2  # so that a token feature is what fires in some windows
        sae.W_O.mul_(3)
    batch, truth = source.draw(range(8))
    out = sae(batch.acts, batch.mask, batch.documents)
    sums = torch.zeros(3)
    for window in range(8):
        feature = int(truth.region[window, 0].argmax())
        along = out.c[window, 1].detach() @ source.region_directions[feature] / truth.region[window, 0, feature]
        fired = int(out.code.indices[window, 0, 0])  # k = 1: all of c is its
        sums += along * torch.tensor([1, fired == feature, fired >= 6])
    assert (sums != 0).all()
    found = synthetic._carried(sae, source, range(8), sae.W_dec.detach())
    assert found["carried_regions"] == 8
    for at, name in enumerate(("carried", "carried_by_match", "carried_by_token_features")):
        assert found[name] == pytest.approx(float(sums[at]) / 8, abs=1e-6), name
    assert found["carried_by_match_at_start"] == found["carried_by_match"]


def test_the_package_trains_on_them(tmp_path):
    source = windows(0.02)
    torch.manual_seed(3)
    sae = TopKSAE(20, 24, 4)
    train(sae, source, range(36), tmp_path / "run", TrainConfig(steps=60, batch_windows=4, lr=1e-2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.7 * lines[0]["fvu"]


def test_a_run_is_json_and_the_same_again(monkeypatch):
    monkeypatch.setattr(synthetic, "HELD_OUT", 2)
    monkeypatch.setattr(synthetic, "ATTRIBUTED", 1)
    monkeypatch.setattr(synthetic, "BATCH_WINDOWS", 2)
    seen = []

    def progress(iterable, description, total=None):
        seen.append(description)
        return iterable

    cases = [synthetic.Case(64, query, seed=3, d_in=32) for query in (None, "current", "past")]
    first, again = ([synthetic.run(case, 2, progress) for case in cases] for _ in "ab")
    json.dumps(first)
    assert seen[:3] == [case.name for case in cases]
    assert [(run["arch"], run["query"], run["region_length"], run["seed"], run["d_in"]) for run in first] == [
        ("topk", None, 64, 3, 32),
        ("contextual", "current", 64, 3, 32),
        ("contextual", "past", 64, 3, 32),
    ]
    assert len({(run["k"], run["d_sae"], run["tokens"]) for run in first}) == 1
    assert len(first[1]["with_sweeps"]["fires_at"]) == 64
    timed = ("train_seconds", "tokens_per_s", "tokens_per_s_sweeps")
    first, again = ([{name: run[name] for name in run if name not in timed} for run in runs] for runs in (first, again))
    assert first == again


def test_the_cases():
    """Everything at each length; at one of them seeds, and crowded features."""
    cases = synthetic.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {(case.region_length, case.query) for case in cases} == set(
        product(synthetic.REGION_LENGTHS, (None, "current", "past"))
    )
    at_one = [case for case in cases if case.region_length == synthetic.LENGTH]
    assert {(case.query, case.seed) for case in at_one} == {*product((None, "past"), synthetic.SEEDS), ("current", 0)}
    assert {(case.query, case.d_in) for case in cases if case.d_in != synthetic.D_IN} == {
        (None, synthetic.CROWDED),
        ("past", synthetic.CROWDED),
    }
    assert synthetic.cases((16,)) == [synthetic.Case(16, query) for query in (None, "current", "past")]
