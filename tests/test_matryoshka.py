"""Matryoshka prefixes: the loss is the reference's, its gradients autograd's, from one decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import csae
from csae import SAE, ContextualSAE, TopKSAE, reference
from csae.factors import Factors, Trace
from csae.forward_pass import Pass
from csae.matryoshka import by_group
from csae.sae import Sweeps

PREFIXES = (3, 11, 12, 40)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {}),
    ("topk", {"d_out": 7, "skip": True}),
    ("contextual", {"sweeps": 0}),
    ("contextual", {"sweeps": 2}),
    ("contextual", {"sweeps": 2, "query": "past", "k_mem": 3}),
    ("contextual", {"sweeps": 1, "d_out": 7, "skip": True}),
]


def make(arch: str, prefixes: tuple[int, ...] = PREFIXES, **options: Any) -> SAE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_in": 12, "d_sae": 50, "k": 4, "k_aux": 6, "prefixes": prefixes}
    kind: Any = TopKSAE if arch == "topk" else ContextualSAE
    if arch == "contextual":
        sizes |= {"n_heads": 2, "d_head": 3, "d_value": 5}
    sae: SAE = kind(**sizes, **options)
    if sae.is_transcoder:
        sae.initialise(torch.randn(12), 1.3, torch.randn(sae.d_out), 0.7)
    else:
        sae.initialise(torch.randn(12), 1.3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("b_enc", "W_skip", "W_I"):
                parameter.normal_(std=0.3)
    return sae.double()


def batch(sae: SAE, B: int = 3, T: int = 17) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(width: int) -> Tensor:
        return torch.randn(B, T, width, generator=generator, dtype=torch.float64) + 0.5

    given = {"acts": normal(sae.d_in), "mask": torch.rand(B, T, generator=generator) > 0.2}
    given["documents"] = (torch.arange(T) > T // 2).long().expand(B, T)
    return given | ({"target": normal(sae.d_out)} if sae.is_transcoder else {})


def dense(gradient: Tensor | Factors, like: Tensor) -> Tensor:
    return gradient.dense().view(like.shape) if isinstance(gradient, Factors) else gradient


def definition(sae: SAE, given: dict[str, Any]) -> Tensor:
    """The loss by reference.py, differentiable by the parameters."""
    x, mask = given["acts"] / sae.scale, given["mask"]
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    y = x if sae.mean is None else (given["target"] / sae.out_scale).masked_fill(~mask.unsqueeze(-1), 0)
    if isinstance(sae, ContextualSAE):
        names = reference.ContextualWeights._fields
        weights = reference.ContextualWeights(**{name: getattr(sae, name) for name in names})
        bounds = mask, given["documents"], sae.k_mem
        out = reference.contextual_sweeps(x, weights, sae.k, sae.query, sae.sweeps, *bounds)
    elif sae.mean is None:
        out = reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
    else:
        weights_of_one = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.W_skip
        out = reference.topk_transcoder(x, sae.mean, *weights_of_one, sae.k)
    return reference.matryoshka_fvus(y, out, sae.W_dec, sae.prefixes, mask).mean()


@pytest.mark.parametrize(("arch", "options"), KINDS)
def test_the_loss_and_its_gradients_are_the_references(arch: str, options: dict[str, Any]) -> None:
    sae = make(arch, **options)
    given = batch(sae)
    expected = definition(sae, given)
    named = {name: parameter for name, parameter in sae.named_parameters() if parameter.requires_grad}
    wanted = torch.autograd.grad(expected, list(named.values()), allow_unused=True)
    losses = sae.loss(**given)
    torch.testing.assert_close(losses.loss, expected, rtol=1e-12, atol=0)
    by_autograd = torch.autograd.grad(losses.loss, list(named.values()), allow_unused=True)
    in_factors, gradients = sae.gradients(**given)
    torch.testing.assert_close(in_factors.loss, expected.detach(), rtol=1e-12, atol=0)
    for (name, parameter), right, one in zip(named.items(), wanted, by_autograd, strict=True):
        if right is None:
            assert name not in gradients
            continue
        scale = float(right.abs().max())
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-12 * scale, msg=name)
        # Weights of pairs are kept in float32.
        other = dense(gradients[name], parameter)
        torch.testing.assert_close(other, right, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize(("arch", "options"), KINDS)
def test_dead_features_and_exact_codes(arch: str, options: dict[str, Any]) -> None:
    sae = make(arch, **options)
    given = batch(sae) | {"dead": torch.tensor([0, 3, 7, 20, 49])}
    if arch == "contextual":
        given["sweeps"] = Sweeps(options["sweeps"], from_exact=True)
    sae.loss(**given).loss.backward()
    _, gradients = sae.gradients(**given)
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(
                dense(gradients[name], parameter), parameter.grad, rtol=1e-5, atol=1e-6 * scale, msg=name
            )


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_without_prefixes_and_in_use_nothing_changes(arch: str) -> None:
    sae, plain = make(arch), make(arch, prefixes=())
    given = batch(sae)
    with torch.no_grad():
        losses, without = sae.loss(**given), plain.loss(**given)
    assert float(losses.fvu) == pytest.approx(float(without.loss), rel=1e-12)
    assert float(losses.loss) != pytest.approx(float(without.loss), rel=1e-3)
    for one, other in zip(sae.eval()(given["acts"]), plain.eval()(given["acts"]), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)


def test_a_step_is_that_of_dense_gradients() -> None:
    steps = []
    for in_factors in (True, False):
        sae = make("topk").float()
        given = {name: of.float() if of.is_floating_point() else of for name, of in batch(sae).items()}
        optimizer = csae.Adam(sae, lr=1e-2)
        for _ in range(3):
            if in_factors:
                optimizer.update(sae.gradients(**given)[1])
            else:
                optimizer.zero_grad()
                sae.loss(**given).loss.backward()
                optimizer.step()
        steps.append(sae)
    for one, other in zip(*(sae.parameters() for sae in steps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_loss_is_one_graph_of_a_compiler() -> None:
    sae = make("topk")
    given = batch(sae)
    loss = torch.compile(lambda acts: sae.loss(acts, given["mask"]).loss, fullgraph=True, backend="aot_eager")
    expected = sae.loss(given["acts"], given["mask"]).loss
    (wanted,) = torch.autograd.grad(expected, [sae.W_dec])
    (found,) = torch.autograd.grad(loss(given["acts"]), [sae.W_dec])
    torch.testing.assert_close(found, wanted)


def test_windows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pre-activations are kept, a batch may run in parts: the same loss and gradients."""
    sae = make("contextual", sweeps=2, query="past")
    given = batch(sae)
    whole, expected = sae.gradients(**given)
    monkeypatch.setattr("csae.contextual_sae.ContextualSAE._windows_to_keep", lambda *_: 2)
    parts, gradients = sae.gradients(**given)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)
    for name, parameter in sae.named_parameters():
        right = dense(expected[name], parameter)
        scale = float(right.abs().max())
        torch.testing.assert_close(dense(gradients[name], parameter), right, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_one_decode_gathers_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second gather: over all groups, the slots before the last non-zero value are those of the code."""
    import csae.forward_pass

    seen: list[tuple[Tensor, Tensor]] = []

    def watched(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        seen.append((values, indices))
        return decode(values, indices, table)

    decode = csae.forward_pass.sparse_decode
    monkeypatch.setattr(csae.forward_pass, "sparse_decode", watched)
    sae = make("topk")
    given = batch(sae)
    code = sae.loss(**given).code
    assert len(seen) == 1
    values, _ = seen[0]
    places = torch.arange(1, values.shape[-1] + 1)
    lengths = torch.where(values != 0, places, 0).amax(dim=-1)
    assert lengths.sum() == (code.values > 0).sum()


def test_by_group_keeps_the_order_and_all_of_the_code() -> None:
    values = torch.tensor([[5.0, 4.0, 3.0, 2.0, 0.0], [float("nan")] * 5])
    indices = torch.tensor([[40, 2, 41, 11, 0], [0, 1, 2, 3, 4]])
    of_groups, features = by_group(values, indices, (3, 11, 12))
    assert of_groups[0].tolist() == [[4, 0, 0, 0, 0], [0] * 5, [2, 0, 0, 0, 0], [5, 3, 0, 0, 0]]
    assert features[0].tolist() == [[2, 0, 0, 0, 0], [0] * 5, [11, 0, 0, 0, 0], [40, 41, 0, 0, 0]]
    assert of_groups[1].isnan().sum() == 5


def test_the_passes_of_the_model_keep_no_groups() -> None:
    sae = make("topk")
    assert Pass(sae, training=False).prefixes == ()
    assert Trace(sae, ()).prefixes == ()
    assert Trace(sae, ("W_dec",)).prefixes == PREFIXES


def test_saved_and_loaded(tmp_path: Path) -> None:
    sae = make("contextual").float()
    sae.save_pretrained(tmp_path)
    again = ContextualSAE.from_pretrained(tmp_path)
    assert again.prefixes == PREFIXES
    assert again.config == sae.config
    assert again.config["prefixes"] == list(PREFIXES)
    assert "prefixes" not in make("contextual", prefixes=()).config
    again.prefixes = (1, 2)
    assert again.config["prefixes"] == [1, 2]


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        ((4, 4), "ascending"),
        ((8, 4), "ascending"),
        ((0, 4), "from 1 to d_sae - 1 = 49"),
        ((4, 50), "from 1 to d_sae - 1 = 49"),
        ((4, 8.0), "whole numbers"),
        ((True, 8), "whole numbers"),
        ("4,8", "a tuple"),
        (4, "a tuple"),
    ],
)
def test_other_prefixes_are_refused(prefixes: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^prefixes: given .*{said}"):
        make("topk", prefixes=prefixes)


@pytest.mark.parametrize(("arch", "options"), [("topk", {}), ("contextual", {"sweeps": 1, "query": "past"})])
def test_a_shared_budget(arch: str, options: dict[str, Any]) -> None:
    sae = make(arch, selection="batch", **options)
    given = batch(sae)
    losses, gradients = sae.gradients(**given)
    expected = sae.loss(**given)
    x = (given["acts"] / sae.scale).masked_fill(~given["mask"].unsqueeze(-1), 0)
    lengths = (expected.code.values > 0).sum(dim=-1)
    assert lengths.min() < lengths.max()
    if arch == "topk":
        x_hat = reference.sparse_decode(*expected.code, sae.W_dec) + sae.b_dec
        out = reference.Encoded(x_hat, *expected.code, torch.zeros_like(x), torch.zeros_like(x))
        fvus = reference.matryoshka_fvus(x, out, sae.W_dec, sae.prefixes, given["mask"])
        torch.testing.assert_close(expected.loss, fvus.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.loss, expected.loss.detach(), rtol=1e-12, atol=0)
    expected.loss.backward()
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            found = dense(gradients[name], parameter)
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6 * scale, msg=name)


def test_thresholds_get_the_straight_through_gradient_of_all_prefixes() -> None:
    """A pre-activation near its threshold counts for the prefixes that hold its feature, and for no others."""
    sae = make("topk", selection="jumprelu", k_max=50)
    sae.bandwidth = 0.4
    assert sae.threshold is not None
    with torch.no_grad():
        sae.threshold.copy_(torch.rand(sae.d_sae, dtype=torch.float64))
    acts, mask = batch(sae)["acts"], batch(sae)["mask"]
    x = acts / sae.scale
    pre_acts = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    active = ((pre_acts > sae.threshold) & (pre_acts > 0)).double().detach().requires_grad_()
    feature_acts = (pre_acts * active).detach().requires_grad_()
    spread = (x[mask] - x[mask].mean(dim=0)).square().sum()
    loss = sae.l0_coef * (active[mask].sum(dim=-1).mean() / sae.k - 1).square()
    for prefix in (*sae.prefixes, sae.d_sae):
        x_hat = feature_acts[..., :prefix] @ sae.W_dec[:prefix] + sae.b_dec
        loss = loss + (x - x_hat)[mask].square().sum() / spread / (len(sae.prefixes) + 1)
    d_acts, d_active = torch.autograd.grad(loss, [feature_acts, active])
    flat = (of.flatten(0, 1) for of in (d_acts, d_active))
    wanted = reference.threshold_gradient(pre_acts.flatten(0, 1), sae.threshold.detach(), sae.bandwidth, *flat)
    losses = sae.loss(acts, mask)
    torch.testing.assert_close(losses.loss, loss)
    losses.loss.backward()
    torch.testing.assert_close(sae.threshold.grad, wanted)
    assert (wanted != 0).sum() > 10
    _, gradients = sae.gradients(acts, mask)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        found = dense(gradients[name], parameter)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6 * scale, msg=name)
