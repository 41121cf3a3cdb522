"""The SAEs with each selection: the reference's codes and gradients, streaming, calibration, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import Windows, config, lines, same, stopped, timeless
from torch import Tensor

from csae import ContextualSAE, TopKSAE, reference
from csae.checkpoint import load_sae
from csae.data.activations import Batch
from csae.errors import UserError
from csae.evaluate import evaluate
from csae.factors import Factors
from csae.kernels import cpu
from csae.kernels.cpu import library
from csae.look_back import LookBack
from csae.recurrence import State
from csae.sae import SAE, Sweeps
from csae.train import train

D_IN, D_SAE, K, B, T = 10, 40, 4, 3, 21
SELECTIONS = ("topk", "batch", "jumprelu")
# arch, query, sweeps
FORMS = [("topk", "", 0), ("contextual", "current", 2), ("contextual", "past", 2)]


def make(arch: str, selection: str, query: str = "", **options: object) -> SAE:
    torch.manual_seed(0)
    if arch == "topk":
        sae: SAE = TopKSAE(D_IN, D_SAE, K, selection=selection, **options)
    else:
        sizes = {"n_heads": 2, "d_head": 3, "d_value": 5, "d_memory": 7}
        sae = ContextualSAE(D_IN, D_SAE, K, query=query, selection=selection, **sizes, **options)
    sae.initialise(torch.randn(D_IN), 1.7)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        if arch == "contextual":  # a look-back that matters
            sae.W_O.mul_(5)
            sae.W_mem.mul_(3)
            sae.null.sub_(1)
        if sae.threshold is not None:
            sae.threshold.copy_(0.8 + 0.3 * torch.rand_like(sae.threshold))
    return sae.eval()


def batch(seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts = 2 * torch.randn(B, T, D_IN, generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.15
    documents = torch.randint(0, 2, (B, T), generator=generator).cumsum(1) // 5
    return acts, mask, documents


def of_reference(sae: SAE, training: bool) -> int | reference.Selection:
    if sae.selection == "topk":
        return K
    shared = sae.selection == "batch" and training
    return reference.Selection(K, sae.k_max, None if shared else sae.threshold)


def expected(
    sae: SAE, acts: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: int | None
) -> reference.Encoded:
    """What the reference makes of it in training, by sweeps, or in use."""
    x, k = acts / sae.scale, of_reference(sae, sweeps is not None)
    if isinstance(sae, TopKSAE):
        return reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k, mask)
    assert isinstance(sae, ContextualSAE)
    weights = reference.ContextualWeights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, *LookBack.of(sae))
    if sweeps is None:
        return reference.contextual_exact(x, weights, k, sae.query, mask, documents)
    return reference.contextual_sweeps(x, weights, k, sae.query, sweeps, mask, documents)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("arch", "query", "sweeps"), FORMS)
def test_in_use_the_reference_is_met(arch: str, query: str, sweeps: int, selection: str) -> None:
    sae = make(arch, selection, query).double()
    acts, mask, documents = (of.double() if of.is_floating_point() else of for of in batch())
    found, wanted = sae(acts, mask, documents), expected(sae, acts, mask, documents, None)
    torch.testing.assert_close(found.x_hat, wanted.x_hat * sae.scale)
    torch.testing.assert_close(found.code.values, wanted.values)
    active = wanted.values > 0
    assert torch.equal(found.code.indices[active], wanted.indices[active])
    counts = active[mask].sum(dim=-1)
    assert (counts.min() < counts.max()) == (selection != "topk")


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("selection", ["topk", "batch"])
@pytest.mark.parametrize(("arch", "query", "sweeps"), FORMS)
def test_in_training_the_reference_is_met(arch: str, query: str, sweeps: int, selection: str, masked: bool) -> None:
    """The code, the loss, and its gradient by each parameter, by autograd and in factors."""
    sae = make(arch, selection, query).double()
    acts, mask, documents = (of.double() if of.is_floating_point() else of for of in batch())
    given = (acts, mask if masked else None, documents)
    wanted = expected(sae, *given, sweeps)
    weight = mask.double() if masked else torch.ones(B, T, dtype=torch.float64)
    x = acts / sae.scale
    mean = (x * weight.unsqueeze(-1)).flatten(0, 1).sum(0) / weight.sum()
    fvu = ((x - wanted.x_hat).square().sum(-1) * weight).sum() / ((x - mean).square().sum(-1) * weight).sum()
    gradients = dict(zip(dict(sae.named_parameters()), torch.autograd.grad(fvu, list(sae.parameters())), strict=True))
    how = {"sweeps": Sweeps(sweeps)} if arch == "contextual" else {}
    losses = sae.loss(*given, **how)
    torch.testing.assert_close(losses.fvu, fvu)
    active = (wanted.values > 0) & (weight > 0).unsqueeze(-1)
    torch.testing.assert_close(losses.code.values[active], wanted.values[active])
    assert torch.equal(losses.code.indices[active], wanted.indices[active])
    if selection == "batch":
        assert active.sum() == K * weight.sum()
    losses.loss.backward()
    _, found = sae.gradients(*given, **how)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
        ours = found[name].dense().view(parameter.shape) if isinstance(found[name], Factors) else found[name]
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(ours, gradients[name], rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("query", ["current", "past"])
@pytest.mark.parametrize("cuts", [[1] * T, [5, 1, 9, 6]], ids=["single", "uneven"])
def test_a_stream_has_the_bits_of_whole_windows(query: str, cuts: list[int], selection: str) -> None:
    sae = make("contextual", selection, query)
    assert isinstance(sae, ContextualSAE)
    given = batch()
    whole = sae(*given)
    state, outputs = sae.initial_state(B), []
    for part in zip(*(of.split(cuts, dim=1) for of in given), strict=True):
        output, state = sae.stream(part[0], state, *part[1:])
        outputs.append(output)
    for ours, wanted in (
        (torch.cat([one.code.values for one in outputs], dim=1), whole.code.values),
        (torch.cat([one.code.indices for one in outputs], dim=1), whole.code.indices),
        (torch.cat([one.c for one in outputs], dim=1), whole.c),
        (torch.cat([one.x_hat for one in outputs], dim=1), whole.x_hat),
    ):
        assert torch.equal(ours, wanted)


@pytest.mark.skipif(not cpu.available(), reason="the native library was not built")
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_stream_has_these_bits_where_the_encoder_makes_its_table(
    selection: str, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 256th token brings the table, whose values differ in the last bit, wherever a chunk begins or ends."""
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: True)
    with torch.inference_mode(inference):
        torch.manual_seed(0)
        sizes = {"n_heads": 2, "d_head": 3, "d_value": 5, "d_memory": 7}
        sae = ContextualSAE(130, 1300, 4, selection=selection, k_max=None, **sizes).eval()
        if sae.threshold is not None:
            sae.threshold.data.fill_(2.5)
        n = 140
        acts = torch.randn(2, n, 130)
        whole = sae(acts)
    for cuts in ([1] * n, [50, 50, 40], [128, 12], [127, 13], [129, 11]):
        state, outputs = sae.initial_state(2), []
        for part in acts.split(cuts, dim=1):
            output, state = sae.stream(part, state)
            outputs.append(output)
        assert torch.equal(torch.cat([one.code.values for one in outputs], dim=1), whole.code.values), cuts
        assert torch.equal(torch.cat([one.x_hat for one in outputs], dim=1), whole.x_hat), cuts


def test_a_state_is_of_one_threshold() -> None:
    sae = make("contextual", "batch", "current")
    assert isinstance(sae, ContextualSAE)
    acts = batch()[0]
    state: State = sae.initial_state(B)
    sae.stream(acts, state)
    with torch.no_grad():
        sae.threshold.add_(0.1)
    with pytest.raises(ValueError, match="state: given one from before the weights changed"):
        sae.stream(acts, state)


@pytest.mark.parametrize("selection", ["batch", "jumprelu"])
@pytest.mark.parametrize(("arch", "query"), [form[:2] for form in FORMS])
def test_calibrated_a_token_has_k_features_on_average(arch: str, query: str, selection: str) -> None:
    sae = make(arch, selection, query)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(2):
        acts = 2 * torch.randn(8, 64, D_IN, generator=generator)
        mask = torch.rand(8, 64, generator=generator) > 0.1
        batches.append(Batch(acts, mask, torch.zeros(8, 64, dtype=torch.int64), None))
    for start in (0.0, 0.3, 5.0):
        with torch.no_grad():
            sae.threshold.fill_(start)
        l0 = sae.calibrate(batches)
        codes = [sae.code_in_use(*of[:3]).values[of.mask] for of in batches]
        assert l0 == pytest.approx(float((torch.cat(codes) > 0).sum(dim=-1).double().mean()))
        assert l0 == pytest.approx(K, rel=0.003)


def test_what_cannot_be_calibrated_is_said() -> None:
    acts, mask, documents = batch()
    with pytest.raises(UserError, match="calibrate: given an SAE with selection"):
        make("topk", "topk").calibrate([Batch(acts, mask, documents, None)])
    with pytest.raises(UserError, match="calibrate: the mask leaves out every position"):
        make("topk", "batch").calibrate([Batch(acts, mask & False, documents, None)])


@pytest.mark.parametrize("selection", ["batch", "jumprelu"])
@pytest.mark.parametrize(("arch", "query"), [form[:2] for form in FORMS])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_sample(arch: str, query: str, selection: str, number: float) -> None:
    acts, mask, documents = batch()
    acts[1, T - 1, 3], mask[1, T - 1] = number, True  # the last position: no other code depends on it
    sae = make(arch, selection, query)
    before = sae.threshold.clone()
    with pytest.raises(UserError, match=rf"calibrate: the codes of 1 of {int(mask.sum())} tokens of the sample hold"):
        sae.calibrate([Batch(acts, mask, documents, None)])
    assert torch.equal(sae.threshold, before)
    mask[1, T - 1] = False
    assert sae.calibrate([Batch(acts, mask, documents, None)]) == pytest.approx(K, rel=0.02)
    with torch.no_grad():
        sae.threshold.fill_(float("nan"))
    with pytest.raises(UserError, match="calibrate: threshold holds NaN or Inf"):
        sae.calibrate([Batch(acts, mask, documents, None)])


def test_fewer_features_than_k_are_all_taken() -> None:
    sae = make("topk", "batch")
    with torch.no_grad():
        sae.b_enc.fill_(-3)
    acts, mask, documents = batch()
    assert sae.calibrate([Batch(acts, mask, documents, None)]) < K
    assert (sae.encode(acts).values > 0).sum() == ((acts / sae.scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc > 0).sum()


def test_the_threshold_of_a_batch_is_kept_in_float32() -> None:
    sae = make("topk", "batch")
    before = sae.threshold.clone()
    sae.bfloat16()
    assert sae.W_enc.dtype == torch.bfloat16
    assert torch.equal(sae.threshold, before)
    assert sae.encode(batch()[0]).values.dtype == torch.bfloat16
    assert make("topk", "batch").double().threshold.dtype == torch.float64


def test_in_training_mode_a_batch_shares_its_budget() -> None:
    sae = make("topk", "batch").train()
    acts, mask, documents = batch()
    code = sae(acts, mask, documents).code
    assert (code.values > 0).sum() == K * mask.sum()
    sae.track(code, mask)
    assert sae.threshold == code.values[code.values > 0].min()


def new_sae(arch: str, selection: str) -> SAE:
    torch.manual_seed(0)
    sizes = {"n_heads": 2, "d_head": 3, "d_value": 3} if arch == "contextual" else {}
    kind = ContextualSAE if arch == "contextual" else TopKSAE
    sae = kind(6, 12, 2, dead_after=50, selection=selection, **sizes)
    sae.initialise(torch.zeros(6), 1.5)
    return sae


TRAINED = ["batch", "jumprelu"]


@pytest.mark.parametrize("selection", TRAINED)
@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_a_run_ends_with_the_same_bits_however_often_it_is_stopped(arch: str, selection: str, tmp_path: Path) -> None:
    make_sae: Callable[[], SAE] = lambda: new_sae(arch, selection)  # noqa: E731
    whole = make_sae()
    train(whole, Windows(), range(12), tmp_path / "whole", config())
    stopped(tmp_path / "run", at=5, sae=make_sae())
    stopped(tmp_path / "run", at=4, sae=make_sae())
    again = make_sae()
    train(again, Windows(), range(12), tmp_path / "run", config())
    assert same(whole, again)
    assert list(map(timeless, lines(tmp_path / "run"))) == list(map(timeless, lines(tmp_path / "whole")))
    assert same(whole, load_sae(tmp_path / "run"))


@pytest.mark.parametrize("selection", TRAINED)
@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_trained_it_has_k_features_on_average(arch: str, selection: str, tmp_path: Path) -> None:
    sae, source = new_sae(arch, selection), Windows()
    before = evaluate(sae, source, range(12))
    train(sae, source, range(12), tmp_path, config(steps=60))
    after = evaluate(sae, source, range(12))
    assert after["fvu"] < 0.5 * before["fvu"]
    # 72 tokens: one feature more is 0.7%.
    assert after["l0"] == pytest.approx(2, rel=0.02)
    assert after["selection"] == selection


def test_a_k_that_is_not_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sae = TopKSAE(6, 12, 12, selection="batch")
    sae.initialise(torch.zeros(6), 1.5)
    train(sae, Windows(), range(12), tmp_path / "all", config())
    l0 = evaluate(sae, Windows(), range(12))["l0"]
    assert l0 < 11
    said = f"{tmp_path / 'all'}: {l0:.3g} features a token in use, where k is 12: no threshold comes nearer"
    assert said in capsys.readouterr().err
    train(new_sae("topk", "batch"), Windows(), range(12), tmp_path / "two", config())
    assert "in use" not in capsys.readouterr().err


@pytest.mark.parametrize("selection", SELECTIONS)
def test_it_is_said_that_a_threshold_is_set(selection: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(new_sae("topk", selection), Windows(), range(12), tmp_path, config())
    assert ("setting the threshold on" in capsys.readouterr().err) == (selection != "topk")


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("arch", "query", "sweeps"), [("topk", "", 0), ("contextual", "past", 0)])
def test_thresholds_get_the_straight_through_gradient(arch: str, query: str, sweeps: int, masked: bool) -> None:
    sae = make(arch, "jumprelu", query, k_max=D_SAE).double()  # the derivation knows no limit
    sae.bandwidth = 0.4
    acts, mask, documents = (of.double() if of.is_floating_point() else of for of in batch())
    weight = mask.double() if masked else torch.ones(B, T, dtype=torch.float64)
    x = acts / sae.scale
    pre_acts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    active = ((pre_acts > sae.threshold) & (pre_acts > 0)).double().detach().requires_grad_()
    feature_acts = (pre_acts * active).detach().requires_grad_()
    x_hat = feature_acts @ sae.W_dec + sae.b_dec
    mean = (x * weight.unsqueeze(-1)).flatten(0, 1).sum(0) / weight.sum()
    fvu = ((x - x_hat).square().sum(-1) * weight).sum() / ((x - mean).square().sum(-1) * weight).sum()
    l0 = (active.sum(-1) * weight).sum() / weight.sum()
    loss = fvu + sae.l0_coef * (l0 / K - 1).square()
    d_acts, d_active = torch.autograd.grad(loss, [feature_acts, active])
    wanted = reference.threshold_gradient(
        pre_acts.flatten(0, 1), sae.threshold, sae.bandwidth, d_acts.flatten(0, 1), d_active.flatten(0, 1)
    )
    given = (acts, mask if masked else None, documents)
    how = {"sweeps": Sweeps(sweeps)} if arch == "contextual" else {}
    losses = sae.loss(*given, **how)
    torch.testing.assert_close(losses.loss, loss)
    losses.loss.backward()
    torch.testing.assert_close(sae.threshold.grad, wanted)
    assert (wanted != 0).sum() > 10
    _, found = sae.gradients(*given, **how)
    torch.testing.assert_close(found["threshold"].dense().squeeze(1), wanted)


@pytest.mark.parametrize("query", ["current", "past"])
def test_jumprelu_by_sweeps_has_the_same_gradients_in_factors(query: str) -> None:
    sae = make("contextual", "jumprelu", query).double()
    sae.bandwidth = 0.3
    acts, mask, documents = (of.double() if of.is_floating_point() else of for of in batch())
    sae.loss(acts, mask, documents, sweeps=Sweeps(2)).loss.backward()
    _, found = sae.gradients(acts, mask, documents, sweeps=Sweeps(2))
    for name, parameter in sae.named_parameters():
        ours = found[name].dense().view(parameter.shape) if isinstance(found[name], Factors) else found[name]
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6 * scale, msg=name)
