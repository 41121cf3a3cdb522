"""Every public method of both SAEs, and a training step, give the same under torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from csae import SAE, Adam, Code, ContextualSAE, TopKSAE
from csae.factors import Factors
from csae.ops import lookback_attention, sparse_decode, topk_encode
from csae.ops.heads import unit_heads
from csae.ops.topk_encode import with_encode_gradient

T = 6


def make(kind: str, **options: Any) -> SAE:
    torch.manual_seed(0)
    if kind == "topk":
        sae: SAE = TopKSAE(8, 24, 3, k_aux=4, dead_after=20)
    else:
        sizes = {"n_heads": 2, "d_head": 4, "d_value": 4, "d_memory": 8, "sweeps": 1} | options
        sae = ContextualSAE(8, 24, 3, query=kind, k_aux=4, dead_after=20, **sizes)
        with torch.no_grad():
            sae.W_O.mul_(20)
    sae.initialise(torch.randn(8), 1.7)
    return sae


def windows(B: int, seed: int = 0, T: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts = 2 * torch.randn(B, T, 8, generator=generator)
    return acts, torch.rand(B, T, generator=generator) > 0.2, torch.arange(T).expand(B, T) // 4


def dense(gradients: dict[str, Any]) -> dict[str, Tensor]:
    return {name: of.dense().flatten() if isinstance(of, Factors) else of.flatten() for name, of in gradients.items()}


Method = Callable[[SAE, int], Any]
DEAD = torch.tensor([1, 4, 9])


def stepped(sae: ContextualSAE, B: int) -> Any:
    acts, mask, documents = windows(B)
    state, codes = sae.initial_state(B), []
    for t in range(T):
        code, state = sae.step(acts[:, t], state, mask[:, t], documents[:, t])
        codes.append(code)
    return codes, state.memory


def streamed(sae: ContextualSAE, B: int) -> Any:
    acts, mask, documents = windows(B)
    first, state = sae.stream(acts[:, :2], sae.initial_state(B, 4), mask[:, :2], documents[:, :2])
    second, state = sae.stream(acts[:, 2:], state, mask[:, 2:], documents[:, 2:])
    return first, second, state.position


def backward(sae: SAE, B: int) -> Any:
    losses = sae.loss(*windows(B), DEAD)
    losses.loss.backward()
    sae.remove_parallel_gradient()
    return losses, {name: parameter.grad for name, parameter in sae.named_parameters()}


def tracked(sae: SAE, B: int) -> Any:
    acts, mask, documents = windows(B)
    sae.track(sae(acts, mask, documents).code, mask)
    return sae.dead_features(), sae.tokens_since_fired


def prepared(sae: SAE, B: int) -> Any:
    sae.initialise(windows(B)[0].mean((0, 1)), 2.0)
    sae.normalise_decoder()
    return sae.state_dict()


def by_our_adam(sae: SAE, B: int) -> Any:
    optimizer = Adam(sae, lr=1e-2, eps=1e-4)
    found = []
    for step in range(2):
        losses, gradients = sae.gradients(*windows(B, step), DEAD)
        optimizer.update(gradients)
        found.append(losses.loss)
    return found, sae.state_dict()


def by_torchs_adam(sae: SAE, B: int) -> Any:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)
    for step in range(2):
        sae.loss(*windows(B, step), DEAD).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sae.state_dict()


def decoded(sae: SAE, B: int) -> Any:
    out = sae(*windows(B))
    return sae.decode(out.code) if isinstance(sae, TopKSAE) or sae.query == "past" else sae.decode(out.code, out.c)


BOTH: dict[str, Method] = {
    "forward": lambda sae, B: sae(*windows(B)),
    "forward without bounds": lambda sae, B: sae(windows(B)[0]),
    "encode": lambda sae, B: sae.encode(windows(B)[0]),
    "decode": decoded,
    "loss": lambda sae, B: sae.loss(*windows(B), DEAD),
    "gradients": lambda sae, B: dense(sae.gradients(*windows(B), DEAD)[1]),
    "backward": backward,
    "track": tracked,
    "prepare": prepared,
    "our Adam": by_our_adam,
    "torch's Adam": by_torchs_adam,
}
ONE: dict[str, Method] = {
    "sweeps": lambda sae, B: sae(*windows(B), exact=False),
    "exact": lambda sae, B: sae(*windows(B), exact=True),
    "step": stepped,
    "stream": streamed,
    "bound of c": lambda sae, B: sae.c_bound(),
}
METHODS = [(kind, name) for kind in ("topk", "current", "past") for name in (BOTH if kind == "topk" else BOTH | ONE)]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(kind: str, name: str, backend: str, dynamic: bool | None, batches: list[int], training: bool) -> None:
    method = (BOTH | ONE)[name]
    compiled = torch.compile(method, backend=backend, dynamic=dynamic)
    for B in batches:
        sae = make(kind).train(training)
        wanted, found = method(copy.deepcopy(sae), B), compiled(sae, B)
        flat = [torch.utils._pytree.tree_leaves(of) for of in (found, wanted)]
        for got, want in zip(*flat, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("topk", "loss"), *((kind, "forward") for kind in ("current", "past"))])
def test_traced(kind: str, name: str) -> None:
    check(kind, name, "eager", None, [1, 2, 3], training=False)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_compiled(kind: str, name: str) -> None:
    batches = [1, 2, 3] if name in ("forward", "encode", "loss") else [2, 3]  # one is a graph of its own
    check(kind, name, "eager", True, batches, training=False)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dynamic"), [("eager", None), ("aot_eager", True), ("aot_eager", False)])
@pytest.mark.parametrize("kind", ["topk", "current", "past"])
def test_compiled_in_training(kind: str, backend: str, dynamic: bool | None) -> None:
    check(kind, "forward", backend, dynamic, [1, 2, 3], training=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_compiled_by_inductor(kind: str, name: str) -> None:
    check(kind, name, "inductor", False, [2], training=name in ("forward", "backward"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "sweeps", "step", "loss"])
@pytest.mark.parametrize("kind", ["current", "past"])
def test_compiled_by_inductor_for_any_shape(kind: str, name: str) -> None:
    batches = [3, 1, 2] if name == "loss" else [3, 2]  # one is a compilation of its own
    check(kind, name, "inductor", True, batches, training=False)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["topk", "current", "past"])
def test_a_compiled_sae_is_one_graph(kind: str, backend: str) -> None:
    sae = make(kind).eval()
    compiled = torch.compile(sae, backend=backend, fullgraph=True)
    for B in (1, 2, 3):
        acts, mask, documents = windows(B)
        for given in ((acts,), (acts, mask), (acts, mask, documents)):
            found, wanted = compiled(*given), sae(*given)
            for got, want in zip(*map(torch.utils._pytree.tree_leaves, (found, wanted)), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            if kind == "past":  # the code still knows what it was encoded with
                torch.testing.assert_close(sae.decode(found.code), wanted.x_hat, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "sweeps"])
@pytest.mark.parametrize("kind", ["topk", "current", "past"])
def test_a_traced_graph_has_no_numbers_of_the_trace(kind: str, exact: bool, mode: str) -> None:
    sae = make(kind).eval()
    how = {} if kind == "topk" else {"exact": exact}

    def run(acts: Tensor, mask: Tensor) -> Any:
        return tuple(sae(acts, mask, **how))

    graph = make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(*windows(2)[:2])
    for given in (windows(2)[:2], windows(2, seed=5)[:2]):
        found, wanted = graph(*given), run(*given)
        for got, want in zip(*map(torch.utils._pytree.tree_leaves, (found, wanted)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("kind", ["topk", "current", "past"])
def test_exported(kind: str, strict: bool) -> None:
    sae = make(kind).eval()
    B = torch.export.Dim("B", min=1, max=64)
    program = torch.export.export(sae, (windows(3)[0],), dynamic_shapes={"acts": {0: B}}, strict=strict)
    for batch in (3, 2, 5):
        acts = windows(batch, seed=7)[0]
        found, wanted = program.module()(acts), sae(acts)
        for got, want in zip(*map(torch.utils._pytree.tree_leaves, (found, wanted)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_gradients_with_a_frozen_parameter(frozen: str) -> None:
    def run(sae: SAE) -> Any:
        return dense(sae.gradients(*windows(2), DEAD)[1])

    sae = make("topk")
    sae.get_parameter(frozen).requires_grad_(False)
    wanted, found = run(sae), torch.compile(run, backend="eager")(sae)
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        torch.testing.assert_close(found[name], right)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "sweeps"])
@pytest.mark.parametrize("kind", ["topk", "current", "past"])
def test_forward_mode_is_refused(kind: str, exact: bool, compiled: bool) -> None:
    """An operator has no such derivative, and none would be taken for zero."""
    sae = make(kind).eval()
    how = {} if kind == "topk" else {"exact": exact}
    acts = windows(2)[0]
    for function in (lambda acts: sae(acts, **how).x_hat, lambda acts: sae.loss(acts).loss):

        def derivative(acts: Tensor, function: Any = function) -> Any:
            return torch.func.jvp(function, (acts,), (torch.ones_like(acts),))

        with pytest.raises(Exception, match="given a tensor with a tangent"):
            (torch.compile(derivative, backend="eager") if compiled else derivative)(acts)
    with torch.autograd.forward_ad.dual_level():  # without one it is as always
        assert torch.equal(sae(acts, **how).x_hat, make(kind).eval()(acts, **how).x_hat)


def test_forward_mode_of_the_ops_is_refused() -> None:
    x, W = torch.randn(4, 8), torch.randn(24, 8)
    indices = torch.arange(3).expand(4, 3)
    heads, two = torch.randn(1, 4, 2, 3), torch.zeros(2)
    ops: list[tuple[Callable[[Tensor], Any], Tensor]] = [
        (lambda of: topk_encode(of, W, W[:, 0], 3), x),
        (lambda of: topk_encode(x, of, W[:, 0], 3), W),
        (lambda of: sparse_decode(x[:, :3], indices, of), W),
        (lambda of: lookback_attention(heads, heads, heads, of, two), two),
        (unit_heads, heads),
        (lambda of: with_encode_gradient(of, W, W[:, 0], x[:, :3], indices), x),
    ]
    for op, given in ops:
        with pytest.raises(NotImplementedError, match="given a tensor with a tangent"):
            torch.func.jacfwd(lambda of, op=op: torch.utils._pytree.tree_leaves(op(of))[0])(given)


def test_a_state_that_is_refused_is_refused_under_the_compiler() -> None:
    sae, other = make("current").eval(), make("past").eval()
    step = torch.compile(sae.step, backend="eager")
    with pytest.raises(ValueError, match="state: given one of other weights"):
        step(windows(2)[0], other.initial_state(2))
    with pytest.raises(ValueError, match="this code doesn't know"):
        torch.compile(other.decode, backend="eager")(Code(*other.encode(windows(2)[0])))
