"""Whole steps of both SAEs on the Triton kernels: the ops and the recurrence find the functions that they call."""

from __future__ import annotations

import copy

import pytest
import torch
from triton_setup import DEVICE, needs_triton, random_normal

from csae import SAE, Adam, ContextualSAE, TopKSAE, contextual_sae
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
