"""Gradients in factors are the gradients that autograd gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csae import SAE, ContextualSAE, TopKSAE
from csae.factors import Factors
from csae.sae import Sweeps


def make(arch: str, **options: object) -> SAE:
    torch.manual_seed(0)
    sizes = {"d_in": 12, "d_sae": 50, "k": 4, "k_aux": 6}
    if arch == "topk":
        sae: SAE = TopKSAE(**sizes)
    else:
        sae = ContextualSAE(**sizes, n_heads=2, d_head=3, d_value=5, **options)  # type: ignore[arg-type]
    sae.initialise(torch.randn(12), 1.3)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
    return sae.double()


def batch(B: int = 3, T: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(B, T, 12, generator=generator, dtype=torch.float64) + 0.5
    mask = torch.rand(B, T, generator=generator) > 0.2
    documents = (torch.arange(T) > T // 2).long().expand(B, T)
    return acts, mask, documents


@pytest.mark.parametrize("dead", [None, [0, 3, 7, 20, 49]], ids=["alive", "dead"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("topk", {}),
        ("contextual", {"sweeps": 0}),
        ("contextual", {"sweeps": 1}),
        ("contextual", {"sweeps": 2}),
        ("contextual", {"sweeps": 2, "query": "past"}),
        ("contextual from exact codes", {"sweeps": 2, "query": "past"}),
        ("contextual from exact codes", {"sweeps": 1}),
        ("contextual", {"sweeps": 2, "k_mem": 3}),
    ],
)
def test_equal_to_autograd(arch: str, options: dict[str, object], masked: bool, dead: list[int] | None) -> None:
    sae = make(arch.split()[0], **options)
    sweeps = Sweeps(sae.sweeps, from_exact=True) if arch.endswith("exact codes") else None
    acts, mask, documents = batch()
    given = (acts, mask if masked else None, documents, None if dead is None else torch.tensor(dead), sweeps)
    expected = sae.loss(*given)
    expected.loss.backward()
    losses, gradients = sae.gradients(*given)
    for ours, theirs in zip(losses[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs.detach())
        assert not ours.requires_grad
    assert torch.equal(losses.code.indices, expected.code.indices)
    for name, parameter in sae.named_parameters():
        if parameter.grad is None:
            assert name not in gradients
            continue
        gradient = gradients[name]
        if isinstance(gradient, Factors):
            gradient = gradient.dense().view(parameter.shape)
        # Weights are kept in float32.
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6 * float(scale), msg=name)


@pytest.mark.parametrize("query", ["current", "past"])
def test_nothing_of_a_gradient_needs_one(query: str) -> None:
    """The memory's weights are the code's own values, which do."""
    torch.manual_seed(0)
    sae = ContextualSAE(8, 24, 3, n_heads=2, d_head=4, d_value=4, d_memory=8, query=query)
    _, gradients = sae.gradients(torch.randn(2, 6, 8))
    for name, of in gradients.items():
        tensors = (of.weights, of.rows) if isinstance(of, Factors) else (of,)
        assert not any(tensor.requires_grad for tensor in tensors), name


def test_tables_of_the_same_codes_share_one_sort() -> None:
    _, gradients = make("topk").gradients(*batch())
    W_enc, b_enc, W_dec = (gradients[name] for name in ("W_enc", "b_enc", "W_dec"))
    assert isinstance(W_enc, Factors)
    assert isinstance(b_enc, Factors)
    assert isinstance(W_dec, Factors)
    assert W_enc.pairs is b_enc.pairs is W_dec.pairs


def test_what_is_masked_or_not_positive_is_in_no_run() -> None:
    sae = make("topk")
    with torch.no_grad():
        sae.b_enc.fill_(-1.8)  # most pre-activations are negative
    acts, mask, _ = batch()
    losses, gradients = sae.gradients(acts, mask)
    W_dec = gradients["W_dec"]
    assert isinstance(W_dec, Factors)
    active = ((losses.code.values > 0) & mask.unsqueeze(-1)).sum()
    assert 0 < active < mask.sum() * sae.k
    assert W_dec.pairs.ends[-1] == active


def test_a_broken_token_is_seen() -> None:
    sae = make("topk")
    acts, _, _ = batch()
    acts[0, 0, 0] = torch.nan
    _, gradients = sae.gradients(acts)
    W_enc = gradients["W_enc"]
    assert isinstance(W_enc, Factors)
    assert W_enc.dense().isnan().any()


def test_nothing_of_a_tables_size_is_made() -> None:
    """The peak of what torch allocates while the gradients are made stays far below one table."""
    torch.manual_seed(0)
    sae = TopKSAE(d_in=64, d_sae=20_000, k=4)  # a table is 5 MB
    acts = torch.randn(1, 4, 64)
    sae.gradients(acts)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _, gradients = sae.gradients(acts)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 64 * 20_000 * 4 / 4
    for name in ("W_enc", "W_dec"):
        factors = gradients[name]
        assert isinstance(factors, Factors)
        assert factors.weights.numel() == 4 * 4
        assert factors.rows.shape == (4, 64)
