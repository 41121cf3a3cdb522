"""Whole steps of both SAEs on the Triton kernels: the ops and the recurrence find the functions that they call."""

from __future__ import annotations

import copy

import pytest
import torch
from triton_setup import DEVICE, needs_triton, random_normal

from csae import SAE, Adam, ContextualSAE, TopKSAE, contextual_sae, reference
from csae.look_back import LookBack
from csae.ops import backend

pytestmark = needs_triton


def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take the Triton kernels wherever the tensors are: in the interpreter they are on the CPU."""
    monkeypatch.setattr(backend, "place", lambda op, *_: "triton" if op in backend.ON_TRITON else "portable")


def on_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "place", lambda *_: "portable")


def make(arch: str) -> SAE:
    torch.manual_seed(0)
    if arch == "topk":
        return TopKSAE(24, 40, 3, k_aux=4).to(DEVICE)
    query = "past" if arch == "past" else "current"
    return ContextualSAE(24, 40, 3, n_heads=2, d_head=4, d_value=8, query=query, sweeps=1, k_aux=4).to(DEVICE)


@pytest.mark.parametrize("arch", ["topk", "current", "past", "narrow"])
def test_a_step_and_an_exact_run(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if arch == "narrow":
        monkeypatch.setattr(contextual_sae, "NARROW", 1)
    acts, mask = random_normal(2, 5, 24), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    mask[0, 3] = False
    dead = torch.tensor([1, 7, 30], device=DEVICE)
    found = []
    for place in (on_triton, on_portable):
        place(monkeypatch)
        sae = make(arch)
        optimizer = Adam(sae, lr=1e-2, eps=1e-4)
        losses, gradients = sae.gradients(acts, mask, None, dead)
        optimizer.update(gradients)
        stepped = copy.deepcopy(sae.state_dict())
        sae.zero_grad()
        sae.loss(acts, mask, None, dead).loss.backward()
        optimizer.step()
        found.append((losses.loss, stepped, sae.state_dict(), sae.eval()(acts, mask)))
    (loss, stepped, twice, out), (loss_of, stepped_of, twice_of, out_of) = found
    torch.testing.assert_close(loss, loss_of)
    for name in stepped:
        torch.testing.assert_close(stepped[name], stepped_of[name], rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(twice[name], twice_of[name], rtol=1e-3, atol=1e-4, msg=name)
    assert torch.equal(out.code.indices, out_of.code.indices)
    torch.testing.assert_close(out.x_hat, out_of.x_hat, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["topk", "batch", "jumprelu"])
@pytest.mark.parametrize("query", ["current", "past"])
def test_the_recurrence_is_the_reference_s(query: str, selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64: codes, what is carried, and the reconstruction; cut in two, after a masked position."""
    on_triton(monkeypatch)
    torch.manual_seed(1)
    sae = ContextualSAE(
        24, 70, 4, n_heads=2, d_head=4, d_value=8, query=query, selection=selection, k_mem=3
    ).to(DEVICE).eval()  # fmt: skip
    for of, factor in ((sae.W_O, 5.0), (sae.W_mem, 3.0), (sae.gain, 2.0)):  # a look-back that matters
        of.mul_(factor)
    if sae.threshold is not None:
        sae.threshold.copy_(0.5 + 0.3 * torch.rand_like(sae.threshold))
    acts, mask = random_normal(2, 9, 24), torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0, 3] = mask[1, 0] = False
    documents = torch.tensor([[0] * 9, [0] * 4 + [1] * 5], device=DEVICE)
    state, parts = sae.initial_state(2), []
    for part in zip(*(of.split([4, 5], 1) for of in (acts, mask, documents)), strict=True):
        out, state = sae.stream(part[0], state, *part[1:])
        parts.append(out)
    values, indices, x_hat, c = (
        torch.cat([of(out) for out in parts], 1)
        for of in (lambda o: o.code.values, lambda o: o.code.indices, lambda o: o.x_hat, lambda o: o.c)
    )
    wide = copy.deepcopy(sae).double()
    weights = reference.ContextualWeights(wide.W_enc, wide.b_enc, wide.W_dec, wide.b_dec, *LookBack.of(wide))
    k = sae.k if selection == "topk" else reference.Selection(sae.k, sae.k_max, wide.threshold)
    wanted = reference.contextual_exact(acts.double() / wide.scale, weights, k, query, mask, documents, 3)
    assert wanted.c.norm() > 0.1 * wanted.x_hat.norm()
    on = wanted.values > 0
    assert torch.equal(values > 0, on)
    assert torch.equal(indices[on], wanted.indices[on])
    for found, want in ((values, wanted.values), (c / sae.scale, wanted.c), (x_hat / sae.scale, wanted.x_hat)):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
