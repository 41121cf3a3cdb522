"""Code lengths against closed forms and brute force; FVU and bits of each kind of SAE against a real receiver."""

from __future__ import annotations

import math

import pytest
import torch
from given_windows import GivenWindows
from torch import Tensor

from csae import SAE, Code, ContextualSAE, Output, TopKSAE
from csae.bench.evidence import bits
from csae.bench.evidence.bits import Sent, account, channel_for, code_lengths, index_bits, log2_choose, value_bits
from csae.errors import UserError

N, T, D, F, K = 24, 16, 12, 30, 4
FIT, SCORE = range(12), range(12, 24)


@pytest.fixture
def source() -> GivenWindows:
    torch.manual_seed(0)
    mask = torch.rand(N, T) > 0.2
    mask[:, 0] = False
    documents = torch.randint(0, 2, (N, T)).sort(dim=1).values
    return GivenWindows(3 + torch.randn(N, T, D) * torch.linspace(0.5, 2, D), mask, documents)


def make(kind: str) -> SAE:
    torch.manual_seed(1)
    if kind == "topk":
        sae: SAE = TopKSAE(D, F, K)
    else:
        sae = ContextualSAE(D, F, K, n_heads=2, d_head=4, d_value=6, query=kind)
        with torch.no_grad():
            sae.W_O.mul_(5)
    sae.initialise(torch.full((D,), 2.9), 1.3)
    return sae.eval()


class Padded(TopKSAE):
    """Like a BatchTopK SAE: codes wider than what is active, padded with zeros at feature 0, by batch."""

    def encode(self, acts: Tensor) -> Code:
        values, indices = super().encode(acts)
        padding = (0, len(acts) % 7)
        return Code(torch.nn.functional.pad(values, padding), torch.nn.functional.pad(indices, padding))


def test_code_lengths() -> None:
    lengths = code_lengths(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2, 5]))
    expected = [math.log2(4.5 / 1.5), math.log2(4.5 / 2.5), math.log2(9) + 1, math.log2(9) + 5]
    assert lengths.tolist() == pytest.approx(expected)
    # In context: what is certain in one is not in the other.
    seen, contexts = torch.tensor([0] * 1000 + [0, 1] * 500), torch.tensor([0] * 1000 + [1] * 1000)
    lengths = code_lengths(seen, torch.tensor([0, 0]), contexts, torch.tensor([0, 1]))
    assert lengths.tolist() == pytest.approx([0, 1], abs=3e-3)
    uniform = torch.arange(8).repeat(5000)
    assert code_lengths(uniform, uniform).mean() == pytest.approx(3, abs=1e-3)
    assert code_lengths(uniform[:0], torch.tensor([0])).tolist() == [1.0], "nothing seen: 1 for 0, then how much larger"


def drawn(rates: Tensor, n: int) -> Sent:
    """Codes whose features fire by their rates, as wide as there are features."""
    active = torch.rand(n, len(rates)) < rates
    return Sent(active.long(), torch.arange(len(rates)).expand(n, -1))


def test_index_bits() -> None:
    torch.manual_seed(0)
    rates = torch.tensor([0.5, 0.1, 0.02, 0.9, 0.0])
    seen, coming = drawn(rates, 20_000), drawn(rates, 20_000)
    entropy = sum(-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in (0.5, 0.1, 0.02, 0.9))
    assert index_bits(seen, coming, 5) / 20_000 == pytest.approx(entropy, rel=0.01)
    few = Sent(coming.levels[:3], coming.indices[:3])
    by_hand = 0.0
    for f in range(5):
        p = (int(seen.levels[:, f].sum()) + 0.5) / 20_001
        for t in range(3):
            by_hand -= math.log2(p if few.levels[t, f] else 1 - p)
    assert index_bits(seen, few, 5) == pytest.approx(by_hand)


def test_value_bits_by_loudness() -> None:
    # A feature at levels 1 and 2, another at 100 and 101, either at even odds: one bit each.
    levels = torch.tensor([[1, 100], [2, 101], [1, 101], [2, 100]] * 5000)
    code = Sent(levels, torch.tensor([3, 7]).expand_as(levels))
    assert value_bits(code, code, 9) / levels.numel() == pytest.approx(1, abs=0.02)


def test_what_is_always_the_same_costs_nothing() -> None:
    levels = torch.tensor([[7, 2, 0]]).repeat(20_000, 1)
    code = Sent(levels, torch.tensor([3, 1, 8]).expand_as(levels))
    assert index_bits(code, code, 10) / 20_000 < 0.001
    assert value_bits(code, code, 10) / 20_000 < 0.01


def test_log2_choose() -> None:
    assert log2_choose(40, torch.tensor([0, 1, 7, 40])).tolist() == pytest.approx(
        [math.log2(math.comb(40, m)) for m in (0, 1, 7, 40)], abs=1e-9
    )


def test_channel() -> None:
    torch.manual_seed(0)
    spread = torch.tensor([4.0, 1.0, 0.25]).sqrt()
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    c = 5 + torch.randn(40_000, 3) * spread @ turn
    channel = channel_for(c)
    assert channel.bits(0.5) == pytest.approx((3 + 1 + 0) / 2, rel=0.02)
    error = (channel.receive(c, 0.5) - c).square().sum(dim=1).mean()
    assert error == pytest.approx(0.5 + 0.5 + 0.25, rel=0.02)


def receiver_fvu(sae: SAE, source: GivenWindows, step: float) -> float:
    windows = bits.encode(sae, source, SCORE)
    code = bits.rounded(windows.output.code, step)
    x, x_hat = (y[windows.batch.mask].double() for y in (windows.batch.acts, sae.decode(code)))  # type: ignore[operator]
    return float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())


@torch.no_grad()
def test_an_sae_by_token(source: GivenWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make("topk")
    found = account(sae, source, FIT, SCORE)
    assert found["fvu"] == pytest.approx(receiver_fvu(sae, source, 1e-6), rel=1e-6)
    assert found["fvu_quantised"] == pytest.approx(receiver_fvu(sae, source, found["step"]))
    steps = [2 ** (e / 2) for e in range(8, -30, -1)]
    assert found["step"] == pytest.approx(next(s for s in steps if receiver_fvu(sae, source, s) <= 1.01 * found["fvu"]))
    assert found["tokens"] == int(source.mask[12:].sum())
    assert found["bits_side"] == 0
    assert found["bits_per_token"] == pytest.approx(found["bits_indices"] + found["bits_values"])
    assert found["l0"] == pytest.approx(K, abs=0.3)
    assert found["bits_indices_uniform"] == pytest.approx(math.log2(math.comb(F, K)), abs=1.5)
    # Batches of 9 and 3 windows, with codes of two widths.
    monkeypatch.setattr(bits, "BATCH_WINDOWS", 9)
    found = account(sae, source, FIT, SCORE)
    padded = Padded(D, F, K)
    padded.load_state_dict(sae.state_dict())
    assert account(padded, source, FIT, SCORE) == {**found, "arch": padded.arch}


@torch.no_grad()
def test_past_is_rebuilt_from_rounded_codes_alone(source: GivenWindows) -> None:
    sae = make("past")
    assert isinstance(sae, ContextualSAE)
    found = account(sae, source, FIT, SCORE)
    assert found["fvu"] < found["fvu_quantised"] <= 1.01 * found["fvu"]
    assert found["bits_side"] == 0
    windows = bits.encode(sae, source, SCORE)
    assert windows.output.c.abs().max() > 0.5
    code = bits.encoded(sae, windows, found["step"])
    levels = code.values / found["step"]
    torch.testing.assert_close(levels, levels.round())
    x_hat = sae.decode(code, mask=windows.batch.mask, documents=windows.batch.documents)
    x, x_hat = (y[windows.batch.mask].double() for y in (windows.batch.acts, x_hat))
    assert found["fvu_quantised"] == pytest.approx(
        float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()), rel=1e-6
    )


@torch.no_grad()
def test_the_code_of_past_is_found_with_the_receivers_c(source: GivenWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "SWEEPS", T)  # as many as positions: then the recurrence is solved
    sae = make("past")
    assert isinstance(sae, ContextualSAE)
    windows = bits.encode(sae, source, SCORE)
    code = bits.encoded(sae, windows, 0.5)
    c = sae.decode(code, None, *windows.batch[1:3]) - sae.decode(code, torch.zeros_like(windows.batch.acts))
    again = bits.rounded(bits.encode_less(sae, windows.batch, c), 0.5)
    torch.testing.assert_close(again, code)


def test_current_pays_for_c(source: GivenWindows) -> None:
    # Each window has a direction of its own, which a short training learns to carry.
    source.acts += 4 * torch.randn(N, 1, D)
    source.documents[:] = 0
    sae = make("current")
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        sae.loss(source.acts[FIT], source.mask[FIT], source.documents[FIT]).loss.backward()
        optimizer.step()
    found = account(sae, source, FIT, SCORE)
    assert found["fvu"] < found["fvu_quantised"] <= 1.01 * found["fvu"]
    assert found["bits_side"] > 0
    assert 0 < found["bits_side_entropy"] < 2 * math.log2(T), "two heads; T - 1 positions and the null at most"
    assert found["bits_per_token"] == pytest.approx(found["bits_indices"] + found["bits_values"] + found["bits_side"])
    with torch.no_grad():
        fit, windows = bits.encode(sae, source, FIT), bits.encode(sae, source, SCORE)
        channel = channel_for(fit.output.c[fit.batch.mask])
        level = bits.coarsest_level(sae, [windows], found["step"], channel, 1.01 * found["fvu"])
        assert channel.bits(level) == pytest.approx(found["bits_side"])
        # The receiver has rounded values and a c with noise; the encoder has seen the same.
        c = channel.receive(windows.output.c, level)
        x_hat = sae.decode(bits.rounded(bits.encode_less(sae, windows.batch, c), found["step"]), c)
        x, x_hat = (y[windows.batch.mask].double() for y in (windows.batch.acts, x_hat))
        fvu = float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())
        assert found["fvu_quantised"] == pytest.approx(fvu, rel=1e-6)
        coarser = bits.receive(sae, [windows], found["step"], channel, level * 2)[1]
        assert coarser > 1.01 * found["fvu"]
        sae.get_parameter("W_O").zero_()
    assert account(sae, source, FIT, SCORE)["bits_side"] == 0, "nothing is carried"


@torch.no_grad()
def test_a_look_back_that_carries_nothing_costs_what_topk_costs(source: GivenWindows) -> None:
    topk, past = make("topk"), make("past")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        past.get_parameter(name).copy_(topk.get_parameter(name))
    past.get_parameter("W_O").zero_()
    by_token, contextual = (account(sae, source, FIT, SCORE) for sae in (topk, past))
    for name in ("step", "bits_indices", "bits_values", "bits_per_token", "fvu_quantised"):
        assert contextual[name] == pytest.approx(by_token[name], rel=1e-5), name


def test_errors(source: GivenWindows) -> None:
    with pytest.raises(UserError, match="windows_fit, windows_score: they share windows"):
        account(make("topk"), source, range(3), range(2, 5))
    source.mask[SCORE] = False
    with pytest.raises(UserError, match="leaves out every position"):
        account(make("topk"), source, FIT, SCORE)

    class Carrying(TopKSAE):
        def forward(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Output:
            return super().forward(acts)._replace(c=torch.ones_like(acts))

    with pytest.raises(ValueError, match="given a Carrying that carries something"):
        account(Carrying(D, F, K), source, FIT, SCORE)
