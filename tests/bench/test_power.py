"""What the look-back depends on: figures against brute force, and in cases where they are known."""

from __future__ import annotations

import json

import pytest
import torch
from given_windows import GivenWindows

from csae import ContextualSAE, TopKSAE
from csae.attribution import attribute
from csae.bench.evidence import power
from csae.bench.evidence.power import measure, pairs_and_distances, shuffled
from csae.errors import UserError

B, T, D, F, K = 3, 16, 12, 30, 3


@pytest.fixture
def source() -> GivenWindows:
    torch.manual_seed(0)
    mask = torch.rand(B, T) > 0.15
    mask[:, 0] = False
    documents = torch.zeros(B, T, dtype=torch.int64)
    documents[1, 6:] = 4
    return GivenWindows(torch.randn(B, T, D), mask, documents)


def make(query: str) -> ContextualSAE:
    torch.manual_seed(1)
    sae = ContextualSAE(D, F, K, n_heads=2, d_head=4, d_value=5, query=query)
    with torch.no_grad():
        sae.W_O.mul_(5)
    return sae.eval()


def test_shuffled() -> None:
    documents = torch.tensor([[0] * 20 + [1] * 20 + [0] * 20, [3] * 60])
    order = shuffled(documents, 50, seed=0)
    assert order.sort(dim=1).values.tolist() == [list(range(60))] * 2
    assert torch.equal(order[:, 50:], torch.arange(50, 60).expand(2, -1))
    assert sorted(order[0, 20:40].tolist()) == list(range(20, 40)), "within a run"
    assert (order[:, :50] != torch.arange(50)).float().mean() > 0.8
    assert not torch.equal(order, shuffled(documents, 50, seed=1))


@pytest.mark.parametrize("query", ["current", "past"])
@torch.no_grad()
def test_pairs_and_distances_by_brute_force(query: str, source: GivenWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "PARTS_AT", T)  # everywhere
    sae, batch = make(query), source.read(range(B))
    found = [attribute(sae, *window) for window in zip(*batch[:3], strict=True)]
    needed, available, left_over, against = [], [], [], []
    near = {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 16: 0.0}
    for one, mask in zip(found, source.mask, strict=True):
        for t in range(T):
            c = one.output.c[t]
            if not mask[t] or not c.any():
                continue
            parts = [(t - j, part) for j, slots in enumerate(one.parts(t)) for part in slots if part.any()]
            shares = sorted(((float(part @ c / (c @ c)), d, part) for d, part in parts), key=lambda x: -x[0])
            chosen, total = torch.zeros(D), 0.0
            count = 0
            while total < 0.9 and count < len(shares):
                share, _, part = shares[count]
                chosen, total, count = chosen + part, total + share, count + 1
            needed.append(count)
            available.append(len(parts))
            left_over.append(float((c - chosen).square().sum() / (c @ c)))
            against.append(-sum(min(share, 0) for share, _, _ in shares))
            positive = sum(max(share, 0) for share, _, _ in shares)
            for reach in near:
                near[reach] += sum(max(share, 0) for share, d, _ in shares if d <= reach) / positive
    result = pairs_and_distances(found, batch)
    n, of = torch.tensor(needed, dtype=torch.float64), torch.tensor(available, dtype=torch.float64)
    assert len(n) > 20
    assert result["pairs"]["needed"]["mean"] == pytest.approx(float(n.mean()))
    assert result["pairs"]["needed"]["median"] == pytest.approx(float(n.quantile(0.5)))
    assert result["pairs"]["needed"]["three_quarters"] == pytest.approx(float(n.quantile(0.75)))
    assert result["pairs"]["available"]["mean"] == pytest.approx(float(of.mean()))
    assert result["pairs"]["needed_of_available"]["mean"] == pytest.approx(float((n / of).mean()))
    assert result["pairs"]["left_over"] == pytest.approx(sum(left_over) / len(n), rel=1e-4, abs=1e-6)
    assert result["pairs"]["against"] == pytest.approx(sum(against) / len(n), rel=1e-4, abs=1e-6)
    assert result["parts_positions"] == len(n)
    assert result["parts_error"] < 1e-5
    assert result["share_error"] < 1e-5
    within = result["distance"]["within"]
    assert within == pytest.approx({str(reach): share / len(n) for reach, share in near.items()}, rel=1e-4)
    median = result["distance"]["median"]
    assert within.get(str(median), 1) >= 0.5
    assert all(share < 0.5 for reach, share in within.items() if int(reach) < median)


@torch.no_grad()
def test_an_attribution_that_misses_a_part_is_noticed(source: GivenWindows) -> None:
    sae, batch = make("current"), source.read(range(B))
    found = [attribute(sae, *window) for window in zip(*batch[:3], strict=True)]
    for one in found:
        one.output = one.output._replace(c=one.output.c * 1.1)
    assert pairs_and_distances(found, batch)["parts_error"] == pytest.approx(1 / 11, rel=1e-3)


@pytest.mark.parametrize("query", ["current", "past"])
@torch.no_grad()
def test_measure(query: str, source: GivenWindows) -> None:
    sae = make(query).train()
    found = measure(sae, source, range(B))
    assert sae.training
    json.dumps(found)
    x = source.acts[source.mask].double()
    variance = (x - x.mean(dim=0)).square().sum()
    x_hat = sae(source.acts, source.mask, source.documents, exact=True).x_hat[source.mask]
    assert found["fvu"] == pytest.approx(float((x - x_hat).square().sum() / variance))
    topk = TopKSAE(D, F, K)
    topk.load_state_dict({name: sae.state_dict()[name] for name in topk.state_dict()})
    alone = float((x - topk(source.acts).x_hat[source.mask]).square().sum() / variance)
    assert found["look_back"]["0"] == pytest.approx(alone, rel=1e-5)
    assert found["c"]["zero"] == pytest.approx(alone, rel=1e-5)
    for right in (found["look_back"]["16"], found["look_back"]["256"], found["c"]["own"], found["read"]["own"]):
        assert right == pytest.approx(found["fvu"], rel=1e-5)
    for wrong in (found["look_back"]["1"], found["c"]["other window"], *list(found["read"].values())[1:]):
        assert wrong != pytest.approx(found["fvu"], rel=1e-4)
    assert len({round(fvu, 9) for fvu in found["far"].values()}) == 4


@torch.no_grad()
def test_one_position_back(source: GivenWindows) -> None:
    """Cut to one position: each reads the code before it, which did the same."""
    sae = make("current")
    source.mask[:], source.documents[:] = True, 0
    x_hats, before = [], None
    for t in range(T):
        state = sae.initial_state(B)
        if before is not None:  # a memory of one row: what the last position left
            state = before
        output, after = sae.stream(source.acts[:, t], state)
        x_hats.append(output.x_hat)
        row = (after.position - 1) % after.memory.shape[1]
        before = sae.initial_state(B)._replace(position=1)
        before.memory[:, 0], before.takes_part[:, 0] = after.memory[:, row], after.takes_part[:, row]
    batch = source.read(range(B))
    assert power.cut(sae, batch)["1"] == pytest.approx(power.fvu(batch, torch.stack(x_hats, dim=1)), rel=1e-5)


@torch.no_grad()
def test_the_order_of_a_memory_is_told_by_the_slope_alone(source: GivenWindows) -> None:
    sae = make("current")
    sae.slope.zero_()
    reads = power.wrong_reads(sae, source.read(range(B)), seed=0)
    assert reads["shuffled"] == pytest.approx(reads["own"], rel=1e-5)
    assert reads["other window"] != pytest.approx(reads["own"], rel=1e-3)


@torch.no_grad()
def test_the_memory_of_an_equal_window_is_the_right_one(source: GivenWindows) -> None:
    same = GivenWindows(
        source.acts[:1].repeat(2, 1, 1), source.mask[:1].repeat(2, 1), source.documents[:1].repeat(2, 1)
    )
    found = measure(make("past"), same, range(2))
    for name in ("c", "read", "far"):
        assert found[name]["other window"] == pytest.approx(found[name]["own"], rel=1e-5), name


@torch.no_grad()
def test_a_memory_of_nothing(source: GivenWindows) -> None:
    sae = make("current")
    sae.W_O.zero_()
    batch = source.read(range(B))
    for fvus in (power.cut(sae, batch), power.wrong_reads(sae, batch, 0)):
        assert list(fvus.values()) == pytest.approx([power.fvu(batch, sae(*batch[:3]).x_hat)] * len(fvus), rel=1e-5)
    with pytest.raises(UserError, match="nothing is carried at any position"):
        measure(sae, source, range(B))


def test_errors(source: GivenWindows) -> None:
    with pytest.raises(TypeError, match="sae: given a TopKSAE; needed a ContextualSAE"):
        measure(TopKSAE(D, F, K), source, range(B))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="windows: given 1; needed at least 2"):
        measure(make("past"), source, range(1))
