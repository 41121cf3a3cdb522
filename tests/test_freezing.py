"""A frozen parameter (requires_grad=False) gets no gradient and doesn't change; an optimizer refuses a changed SAE."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from csae import SAE, Adam, ContextualSAE, TopKSAE
from csae.config import TrainConfig
from csae.data.activations import Batch
from csae.errors import Stopped, UserError
from csae.factors import Factors
from csae.train import train

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "W_mem", "W_Q", "W_K", "W_V", "W_O", "gain", "slope", "null")
DEAD = torch.tensor([0, 3, 7, 20, 49])


def topk() -> SAE:
    torch.manual_seed(0)
    sae = TopKSAE(12, 50, 4, k_aux=6)
    sae.initialise(torch.randn(12), 1.3)
    return sae


def contextual(query: str = "current", sweeps: int = 2) -> SAE:
    torch.manual_seed(0)
    sae = ContextualSAE(12, 50, 4, n_heads=2, d_head=3, d_value=5, query=query, sweeps=sweeps, k_aux=6)
    sae.initialise(torch.randn(12), 1.3)
    return sae


MAKE: dict[str, Callable[[], SAE]] = {"topk": topk, "current": contextual, "past": lambda: contextual("past")}


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 9, 12, generator=generator) + 0.5, torch.rand(3, 9, generator=generator) > 0.2


def freeze(sae: SAE, *names: str) -> SAE:
    for name in names:
        sae.get_parameter(name).requires_grad_(False)
    return sae


def frozen_sets(kind: str) -> list[tuple[str, ...]]:
    names = NAMES[:4] if kind == "topk" else NAMES
    alone = [(name,) for name in names]
    all_but_one = [tuple(other for other in names if other != name) for name in names]
    return [
        *alone,
        *all_but_one,
        names[:2],
        names[2:4],
        tuple(name for name in names if name not in ("W_mem", "b_dec")),
    ]


class Windows:
    """12 windows of 9 positions."""

    n_windows, n_ctx, d_in = 12, 9, 12
    acts = torch.randn(12, 9, 12, generator=torch.Generator().manual_seed(0))

    def read(self, indices):
        acts = self.acts[list(indices)]
        return Batch(acts, torch.ones(acts.shape[:2], dtype=torch.bool), torch.zeros(acts.shape[:2]).long(), None)

    def describe(self):
        return {"made": "in a test"}


CASES = [(kind, names) for kind in MAKE for names in frozen_sets(kind)]
CASES = [(kind, names) for kind, names in CASES if len(names) < (4 if kind == "topk" else 12)]


@pytest.mark.parametrize("dead", [None, DEAD], ids=["alive", "dead"])
@pytest.mark.parametrize(("kind", "names"), CASES, ids=lambda of: of if isinstance(of, str) else "+".join(of))
def test_gradients_are_those_of_autograd_without_the_frozen(kind: str, names: tuple[str, ...], dead: Tensor) -> None:
    sae = freeze(MAKE[kind](), *names)
    acts, mask = batch()
    sae.loss(acts, mask, None, dead).loss.backward()
    _, gradients = sae.gradients(acts, mask, None, dead)
    wanted = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    assert not gradients.keys() & set(names)
    for name, right in wanted.items():
        found = gradients[name]
        found = found.dense().view(right.shape) if isinstance(found, Factors) else found
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()), msg=name)


@pytest.mark.parametrize("lazy", [False, True], ids=["adam", "lazy"])
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "factors"])
@pytest.mark.parametrize(("kind", "names"), CASES, ids=lambda of: of if isinstance(of, str) else "+".join(of))
def test_adam_leaves_the_frozen_as_they_are(kind: str, names: tuple[str, ...], fused: bool, lazy: bool) -> None:
    sae = MAKE[kind]()
    with torch.no_grad():
        sae.W_dec.mul_(2)  # normalised, it would be another
    optimizer = Adam(sae, lr=1e-2, lazy=lazy)
    acts, mask = batch()
    sae.loss(acts, mask).loss.backward()
    freeze(sae, *names)  # what is frozen has a gradient
    before = copy.deepcopy(sae)
    for _ in range(2):
        if fused:
            optimizer.update(sae.gradients(acts, mask)[1])
        else:
            optimizer.step()
    sae.remove_parallel_gradient()
    sae.normalise_decoder()
    for name, parameter in sae.named_parameters():
        if name in names:
            assert torch.equal(parameter, before.get_parameter(name)), name
            assert optimizer.state[parameter]["step"] == 0
            assert not optimizer.state[parameter]["exp_avg"].any()
        else:
            assert not torch.equal(parameter, before.get_parameter(name)), name


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "factors"])
def test_thawed_it_goes_on_as_torchs_adam_does(name: str, fused: bool) -> None:
    sae, other = topk(), topk()
    optimizer, theirs = Adam(sae, lr=1e-3, eps=1e-8), torch.optim.Adam(other.parameters(), lr=1e-3)
    for step in range(6):
        for of in (sae, other):
            of.get_parameter(name).requires_grad_(not 1 <= step < 4)
            of.zero_grad()
        acts, mask = batch(step)
        if fused:
            optimizer.update(sae.gradients(acts, mask)[1])
        else:
            sae.loss(acts, mask).loss.backward()
            optimizer.step()
        other.loss(acts, mask).loss.backward()
        other.remove_parallel_gradient()
        theirs.step()
        other.normalise_decoder()
    for of, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(of), rtol=1e-4, atol=2e-5, msg=of)
        assert optimizer.state[parameter]["step"] == (3 if of == name else 6)


def test_all_frozen_is_refused_in_one_line(tmp_path) -> None:
    sae = topk().requires_grad_(False)
    with pytest.raises(ValueError, match="sae: all of its parameters are frozen; needed one with requires_grad=True"):
        sae.gradients(batch()[0])
    with pytest.raises(UserError, match="sae: all of its parameters are frozen"):
        train(sae, Windows(), range(12), tmp_path / "run", TrainConfig(steps=2, batch_windows=2))


def test_gradients_under_no_grad_and_in_inference_mode() -> None:
    sae, (acts, mask) = topk(), batch()
    wanted = sae.gradients(acts, mask)[1]["b_dec"]
    with torch.no_grad():
        assert torch.equal(sae.gradients(acts, mask)[1]["b_dec"], wanted)
    with torch.inference_mode():
        made = acts + 0
        with pytest.raises(RuntimeError, match="gradients: called under torch"):
            sae.gradients(acts, mask)
    assert torch.equal(sae.gradients(made, mask)[1]["b_dec"], wanted)


@pytest.mark.parametrize("kind", ["topk", "past"])
def test_a_run_with_frozen_parameters_goes_on_to_the_same_bits(kind: str, tmp_path, monkeypatch) -> None:
    windows = Windows()
    config = TrainConfig(steps=8, batch_windows=2, checkpoint_every=3)

    def made() -> SAE:
        return freeze(MAKE[kind](), "W_dec", "b_enc")

    whole = made()
    train(whole, windows, range(12), tmp_path / "whole", config)
    assert torch.equal(whole.W_dec, made().W_dec)
    from csae import training as module

    done, step = [], module.train_step

    def stopping(*given, **named):
        done.append(1)
        if len(done) == 5:
            raise Stopped("enough")
        return step(*given, **named)

    monkeypatch.setattr(module, "train_step", stopping)
    with pytest.raises(Stopped):
        train(made(), windows, range(12), tmp_path / "cut", config)
    with pytest.raises(UserError, match=r"holds another run \(frozen: "):
        train(freeze(made().requires_grad_(True), "W_enc"), windows, range(12), tmp_path / "cut", config)
    again = made()
    train(again, windows, range(12), tmp_path / "cut", config)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_tied_tables_are_one_parameter_for_autograd_and_refused_in_factors() -> None:
    sae = topk()
    sae.W_enc = sae.W_dec
    with pytest.raises(ValueError, match="is another name of a parameter"):
        sae.gradients(batch()[0])
    optimizer, before = Adam(sae), sae.W_dec.detach().clone()
    sae.loss(batch()[0]).loss.backward()
    optimizer.step()
    assert sae.W_enc is sae.W_dec
    assert not torch.equal(sae.W_dec, before)


def test_a_parameter_that_is_made_of_another_is_refused() -> None:
    sae = topk()
    nn.utils.parametrize.register_parametrization(sae, "W_dec", nn.Identity())
    with pytest.raises(ValueError, match="sae: W_dec is computed from something else; needed a parameter"):
        sae.gradients(batch()[0])


def replaced(sae: SAE) -> None:
    sae.W_dec = nn.Parameter(sae.W_dec.detach().clone())


@pytest.mark.parametrize("way", ["step", "update"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (replaced, ValueError, "sae: its W_dec is not the one that the optimizer was made for"),
        (lambda sae: sae.half(), TypeError, "sae: given .* in torch.float16; needed torch.float32"),
        (lambda sae: sae.double(), TypeError, "sae: given .* in torch.float64; needed torch.float32"),
    ],
    ids=["replaced", "half", "double"],
)
def test_an_sae_that_changed_under_its_optimizer(
    way: str, change: Callable[[SAE], object], error: type[Exception], words: str
) -> None:
    sae, (acts, mask) = topk(), batch()
    optimizer = Adam(sae)
    optimizer.update(sae.gradients(acts, mask)[1])
    change(sae)
    if way == "update":
        gradients = sae.gradients(acts, mask)[1]
        with pytest.raises(error, match=words):
            optimizer.update(gradients)
    else:
        sae.loss(acts, mask).loss.backward()
        with pytest.raises(error, match=words):
            optimizer.step()


def test_gradients_of_a_copy_are_refused_and_copies_of_both_go_on() -> None:
    sae, (acts, mask) = topk(), batch()
    optimizer = Adam(sae)
    optimizer.update(sae.gradients(acts, mask)[1])
    other, others_optimizer = copy.deepcopy((sae, optimizer))
    with pytest.raises(ValueError, match="gradients: of another SAE than the optimizer was made for"):
        optimizer.update(other.gradients(acts, mask)[1])
    before = sae.W_dec.detach().clone()
    others_optimizer.update(other.gradients(acts, mask)[1])
    assert torch.equal(sae.W_dec, before)
    optimizer.update(sae.gradients(acts, mask)[1])
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_gradients_of_what_the_optimizer_does_not_know() -> None:
    sae = topk()
    with pytest.raises(ValueError, match="gradients: given one of W_other; needed those of"):
        Adam(sae).update({"W_other": torch.zeros(2)})
