"""Gradients in factors are the gradients that autograd gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csae import SAE, ContextualSAE, TopKSAE
from csae.factors import Factors, Trace
from csae.look_back import LookBack
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_left_is_rounded_once(dtype: torch.dtype) -> None:
    """Under autocast, to the bits of a difference in float32 that is cast; and so is its gradient."""
    x, d_left = torch.randn(2, 5, 12), torch.randn(2, 5, 12).to(dtype)
    sae = make("contextual").float()
    for of in (dtype, torch.float32):
        suppressed = torch.randn(2, 5, 12).to(of).requires_grad_()
        with torch.autocast("cpu", dtype):
            left = Trace(sae, []).left(x, suppressed)
            wanted = (x - suppressed).to(dtype)
        assert left.dtype == dtype
        assert torch.equal(left, wanted)
        pair = (torch.autograd.grad(one, suppressed, d_left)[0] for one in (left, wanted))
        assert torch.equal(*pair)
        assert torch.equal(Trace(sae, []).left(x, suppressed), x - suppressed)  # without autocast


@pytest.mark.parametrize("options", [{}, {"d_out": 8}], ids=["autoencoder", "transcoder"])
def test_maps_cast_together(options: dict[str, object]) -> None:
    """To the bits of casts one by one, also where one is frozen or has no part in a loss."""
    torch.manual_seed(0)
    sae = ContextualSAE(12, 50, 4, n_heads=2, d_head=3, d_value=5, **options)  # type: ignore[arg-type]
    plain = LookBack.of(sae)
    plain.W_K.requires_grad_(False)
    assert plain.under_autocast() is plain
    with torch.autocast("cpu", torch.bfloat16):
        cast = plain.under_autocast()
    maps = [name for name in ("W_Q", "W_K", "W_V", "W_O", "W_I") if getattr(plain, name) is not None]
    for name in plain._fields:
        one, other = getattr(cast, name), getattr(plain, name)
        assert one is other if name not in maps else torch.equal(one, other.bfloat16()), name
    loss = sum(getattr(cast, name).float().square().sum() for name in maps if name != "W_V")
    asked = [getattr(plain, name) for name in maps if name != "W_K"]
    found = torch.autograd.grad(loss, asked, allow_unused=True)
    for parameter, gradient in zip(asked, found, strict=True):
        if parameter is plain.W_V:
            assert gradient is None
        else:
            assert torch.equal(gradient, 2 * parameter.bfloat16().float())


def test_a_shift_of_zero_gets_its_gradient() -> None:
    look_back = LookBack.of(make("contextual"))
    query, shift = torch.randn(3, 7, 12).double(), torch.zeros(12).double().requires_grad_()
    d_queries = torch.randn(3, 7, 2, 3).double()
    asked = [shift, look_back.W_Q, look_back.gain]
    found = torch.autograd.grad(look_back.queries(query, shift), asked, d_queries)
    wanted = torch.autograd.grad(look_back.queries(query + shift), asked, d_queries)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert torch.equal(look_back.queries(query, shift), look_back.queries(query))
