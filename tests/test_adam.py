"""`csae.Adam` does torch's steps, from factors as from dense gradients, and keeps the decoder's rows at unit norm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from csae import SAE, Adam, ContextualSAE, TopKSAE
from csae.ops import sparse_decode, topk_encode

STEPS = 50


def topk() -> SAE:
    torch.manual_seed(0)
    return TopKSAE(d_in=12, d_sae=60, k=4)


def contextual() -> SAE:
    torch.manual_seed(0)
    return ContextualSAE(d_in=12, d_sae=60, k=4, n_heads=2, d_head=3, d_value=5)


def batches(n: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 16, 12, generator=generator) + 0.5 for _ in range(n)]


def by_torch(sae: SAE, look_back_lr: float = 0.5) -> None:
    """The same training with torch's Adam, the projections as steps of their own."""
    look_back = [p for name, p in sae.named_parameters() if name in sae.look_back]
    others = [p for name, p in sae.named_parameters() if name not in sae.look_back]
    groups = [{"params": others}, {"params": look_back, "lr": 1e-3 * look_back_lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=1e-3)
    for acts in batches():
        optimizer.zero_grad()
        sae.loss(acts).loss.backward()
        sae.remove_parallel_gradient()
        optimizer.step()
        sae.normalise_decoder()


def assert_same(sae: SAE, other: SAE, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    for (name, ours), theirs in zip(sae.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", [topk, contextual])
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "factors"])
def test_the_steps_of_torch(make: Callable[[], SAE], fused: bool) -> None:
    sae, other = make(), make()
    before = copy.deepcopy(sae)
    optimizer = Adam(sae, lr=1e-3, eps=1e-8)
    for acts in batches():
        if fused:
            optimizer.update(sae.gradients(acts)[1])
        else:
            optimizer.zero_grad()
            sae.loss(acts).loss.backward()
            optimizer.step()
    by_torch(other)
    assert_same(sae, other)
    assert (sae.W_enc - before.W_enc).abs().max() > 10e-3  # 50 steps of 1e-3 went somewhere
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(60))


@pytest.mark.parametrize("fused", [False, True], ids=["dense", "factors"])
def test_lazy_is_sparse_adam(fused: bool) -> None:
    """Against torch.optim.SparseAdam on sparse gradients of the encoder, whose rows are not normalised."""
    sae, other = topk(), topk()
    optimizer = Adam(sae, lr=1e-3, eps=1e-8, lazy=True)
    W_enc = other.W_enc.detach().clone().requires_grad_()
    theirs = torch.optim.SparseAdam([W_enc], lr=1e-3)
    for acts in batches():
        # The rest of the model is as ours is, so that only the encoder's optimizer is compared.
        x = acts - sae.b_dec.detach()
        dense = W_enc.detach().requires_grad_()
        values, indices = topk_encode(x, dense, sae.b_enc.detach(), sae.k)
        x_hat = sparse_decode(values, indices, sae.W_dec.detach()) + sae.b_dec.detach()
        loss = (acts - x_hat).square().sum() / (acts - acts.flatten(0, 1).mean(0)).square().sum()
        loss.backward()
        active = indices[values > 0].unique()
        assert 0 < active.numel() < sae.d_sae
        assert dense.grad is not None
        W_enc.grad = torch.sparse_coo_tensor(active[None], dense.grad[active], W_enc.shape, check_invariants=True)
        theirs.step()
        if fused:
            optimizer.update(sae.gradients(acts)[1])
        else:
            optimizer.zero_grad()
            sae.loss(acts).loss.backward()
            optimizer.step()
    torch.testing.assert_close(sae.W_enc.detach(), W_enc.detach(), rtol=1e-4, atol=2e-5)


def test_lazy_leaves_what_did_not_fire() -> None:
    sae = topk()
    optimizer = Adam(sae, lazy=True)
    optimizer.update(sae.gradients(batches(1)[0])[1])
    before = copy.deepcopy(sae)
    losses, gradients = sae.gradients(torch.randn(1, 2, 12))
    optimizer.update(gradients)
    fired = torch.zeros(60, dtype=torch.bool)
    fired[losses.code.indices[losses.code.values > 0]] = True
    assert 0 < fired.sum() < 60
    for name in ("W_enc", "b_enc", "W_dec"):
        moved = getattr(sae, name) != getattr(before, name)
        moved = moved.any(dim=1) if moved.dim() == 2 else moved
        assert torch.equal(moved, fired), name


def test_moments_in_bfloat16() -> None:
    sae, other = topk(), topk()
    optimizer = Adam(sae, lr=1e-3, moments=torch.bfloat16)
    assert optimizer.state[sae.W_enc]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[sae.b_dec]["exp_avg"].dtype == torch.float32
    for acts in batches():
        optimizer.update(sae.gradients(acts)[1])
    by_torch(other)
    acts = torch.cat(batches(10))
    ours, theirs, untrained = (of.loss(acts).fvu.item() for of in (sae, other, topk()))
    assert theirs < untrained
    assert abs(ours - theirs) < 0.05 * (untrained - theirs)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_state_goes_through_a_state_dict(moments: torch.dtype) -> None:
    sae, other = topk(), topk()
    first, second = Adam(sae, moments=moments), Adam(other, moments=moments)
    data = batches(6)
    for acts in data[:3]:
        first.update(sae.gradients(acts)[1])
    other.load_state_dict(sae.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for acts in data[3:]:
        first.update(sae.gradients(acts)[1])
        second.update(other.gradients(acts)[1])
    for ours, theirs in zip(sae.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.state[other.W_dec]["exp_avg"].dtype == moments


def test_a_state_from_another_device_is_moved_whole() -> None:
    """`step` too: by its device the kernels of a step are chosen. The other device is meta, which is everywhere."""
    saved = Adam(topk()).state_dict()
    optimizer = Adam(topk().to("meta"))
    optimizer.load_state_dict(copy.deepcopy(saved))
    for state in optimizer.state.values():
        assert {name: tensor.device.type for name, tensor in state.items()} == dict.fromkeys(state, "meta")


def test_groups_have_their_own_rate_and_schedulers_work() -> None:
    sae = contextual()
    optimizer = Adam(sae, lr=1e-2, look_back_lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    sae.loss(batches(1)[0]).loss.backward()
    optimizer.step()
    schedule.step()
    before = copy.deepcopy(sae)
    optimizer.update(sae.gradients(batches(1)[0])[1])
    for name in ("W_enc", "W_Q", "b_dec"):
        assert torch.equal(getattr(sae, name), getattr(before, name))


def test_a_parameter_without_a_gradient_stays() -> None:
    sae = topk()
    before = sae.b_dec.detach().clone()
    sae.loss(batches(1)[0]).loss.backward()
    sae.b_dec.grad = None
    Adam(sae).step()
    assert torch.equal(sae.b_dec, before)
    assert not torch.equal(sae.W_enc, topk().W_enc)


def test_gradients_may_lie_otherwise() -> None:
    results = []
    for transposed in (False, True):
        sae = contextual()
        gradients = sae.gradients(batches(1)[0])[1]
        for name in ("W_Q", "W_O"):
            gradient = gradients[name]
            assert isinstance(gradient, Tensor)
            if transposed:
                gradients[name] = gradient.T.contiguous().T
        Adam(sae).update(gradients)
        results.append(sae)
    for name in ("W_Q", "W_O"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr: given -1"),
        ({"lr": float("nan")}, ValueError, "lr: given nan"),
        ({"look_back_lr": float("inf")}, ValueError, "look_back_lr: given inf"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas: given"),
        ({"moments": torch.float16}, ValueError, "moments: given torch.float16"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Adam(topk(), **arguments)  # type: ignore[arg-type]


def test_takes_an_sae_only() -> None:
    with pytest.raises(TypeError, match="sae: given a list"):
        Adam(list(topk().parameters()))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("make", [topk, contextual])
def test_a_whole_step_compiles(make: Callable[[], SAE]) -> None:
    """Loss, gradients, optimizer and tracking in one graph, and the same as eager."""
    import torch._dynamo

    sae, other = make(), make()
    ours, theirs = Adam(sae, lr=torch.tensor(1e-3)), Adam(other, lr=1e-3)

    def step(acts: Tensor, mask: Tensor) -> Tensor:
        losses, gradients = sae.gradients(acts, mask)
        ours.update(gradients)
        sae.track(losses.code, mask)
        return losses.loss

    with torch._dynamo.config.patch(trace_autograd_ops=True):  # autograd.grad in the graph
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for number, acts in enumerate(batches(8)):
            mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(number)) > 0.1
            loss = compiled(acts, mask)
            losses, gradients = other.gradients(acts, mask)
            theirs.update(gradients)
            other.track(losses.code, mask)
            torch.testing.assert_close(loss, losses.loss)
            if number == 3:
                ours.param_groups[0]["lr"].fill_(5e-4)  # no new graph
                theirs.param_groups[0]["lr"] = 5e-4
    assert_same(sae, other)
    assert torch.equal(sae.tokens_since_fired, other.tokens_since_fired)


@pytest.mark.parametrize(
    ("name", "gradient", "error"),
    [
        ("W_enc", torch.zeros(6, 15), ValueError),
        ("b_dec", torch.zeros(7), ValueError),
        ("b_dec", torch.zeros(1), ValueError),
        ("b_enc", torch.zeros(15, 1), ValueError),
        ("b_dec", torch.zeros(6, dtype=torch.float64), TypeError),
        ("W_enc", torch.zeros(15, 6, dtype=torch.float64), TypeError),
    ],
    ids=["transposed", "longer", "shorter", "column", "float64", "table in float64"],
)
def test_a_gradient_of_another_shape_or_dtype_is_refused(name, gradient, error):
    sae = TopKSAE(6, 15, 3)
    with pytest.raises(error, match=f"gradients: given {name} "):
        Adam(sae).update({name: gradient})


def test_every_parameter_counts_its_steps_as_writes() -> None:
    """The state of a stream sees by them that weights changed. torch's own fused kernel counts none."""
    sae = contextual()
    optimizer = Adam(sae)
    versions = {name: parameter._version for name, parameter in sae.named_parameters()}
    optimizer.update(sae.gradients(batches(1)[0])[1])
    assert all(parameter._version > versions[name] for name, parameter in sae.named_parameters())
