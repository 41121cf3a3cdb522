"""Every op, forward and backward, and the optimizer's step, captured in a CUDA graph and replayed on other numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from csae import ContextualSAE, TopKSAE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def assert_replays(step: Callable[..., list[Tensor]], inputs: list[Tensor], others: list[Tensor]) -> None:
    """A graph of step(*inputs), replayed with the numbers of `others` there, gives the bits that step(*others) does."""
    wanted = [tensor.clone() for tensor in step(*others)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, and warms up the allocator
        for _ in range(2):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*inputs)
    with torch.no_grad():
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
    for tensor in out:
        tensor.detach().fill_(torch.nan if tensor.is_floating_point() else -1)
    graph.replay()
    torch.cuda.synchronize()
    assert [bool(torch.equal(got, want)) for got, want in zip(out, wanted, strict=True)] == [True] * len(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), [(70, 40, 200, 5), (33, 64, 96, 96), (300, 128, 2048, 8)])
def test_topk_encode(n: int, d_in: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    from csae.ops import topk_encode

    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, W_enc, b_enc)]
        values, indices = topk_encode(*leaves, k)
        return [values, indices, *torch.autograd.grad(values, leaves, grad)]

    def tensors(seed: int) -> list[Tensor]:
        shapes = ((n, d_in), (d_sae, d_in), (d_sae,), (n, k))
        return [normal(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]

    assert_replays(step, tensors(0), tensors(10))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guesses", [(1.0, 2.0), (1.0, 1000.0), (1000.0, 1.0)], ids="{0[0]} then {0[1]}".format)
def test_batch_topk_encode(guesses: tuple[float, float], dtype: torch.dtype) -> None:
    """Each replay proves its own guess: one that is too high is searched again, whatever was captured."""
    from csae.ops import batch_topk_encode

    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, guess: Tensor) -> list[Tensor]:
        return list(batch_topk_encode(x, W_enc, b_enc, 4, 12, None, guess))

    def tensors(seed: int, guess: float) -> list[Tensor]:
        shapes = ((70, 40), (200, 40), (200,))
        given = [normal(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]
        return [*given, torch.tensor(guess, device="cuda")]

    assert_replays(step, tensors(0, guesses[0]), tensors(10, guesses[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_decode(dtype: torch.dtype) -> None:
    from csae.ops import sparse_decode

    def step(values: Tensor, indices: Tensor, W_dec: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (values, W_dec)]
        out = sparse_decode(leaves[0], indices, leaves[1])
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def tensors(seed: int, highest: int) -> list[Tensor]:
        values, W_dec, grad = (
            normal(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(((300, 8), (64, 40), (300, 40)))
        )
        indices = torch.randint(highest, (300, 8), generator=torch.Generator().manual_seed(seed)).cuda()
        return [values, indices, W_dec, grad]

    # Other runs of features than when it was captured: longer ones, and most features without any.
    assert_replays(step, tensors(0, 64), tensors(10, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lookback_attention(dtype: torch.dtype) -> None:
    from csae.ops import lookback_attention

    B, T, H, d_head, d_value = 2, 150, 2, 16, 24

    def step(*given: Tensor) -> list[Tensor]:
        *floats, mask, documents, grad = given
        leaves = [tensor.detach().requires_grad_() for tensor in floats]
        out = lookback_attention(*leaves, mask, documents)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def tensors(seed: int) -> list[Tensor]:
        shapes = ((B, T, H, d_head), (B, T, H, d_head), (B, T, H, d_value), (H,), (H,))
        floats = [normal(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]
        mask = normal(B, T, seed=seed + 5) > -1
        documents = (normal(B, T, seed=seed + 6) > 1.5).cumsum(1)
        return [*floats, mask, documents, normal(B, T, H, d_value, dtype=dtype, seed=seed + 7)]

    assert_replays(step, tensors(0), tensors(10))


@pytest.mark.parametrize("lazy", [False, True], ids=["exact", "lazy"])
@pytest.mark.parametrize("moments", DTYPES)
def test_adam_rows(moments: torch.dtype, lazy: bool) -> None:
    from csae.kernels.pairs import Table
    from csae.kernels.triton import feature_rows

    n, k, d, d_sae = 300, 8, 40, 64

    def step(features: Tensor, weights: Tensor, x: Tensor, hyper: Tensor, seed: Tensor, *state: Tensor) -> list[Tensor]:
        tokens = torch.arange(n, device="cuda").repeat_interleave(k)
        pairs = feature_rows.sort_pairs(features, tokens, d_sae)
        W, b = state[:3], state[3:]
        moved = [tensor.clone() for tensor in (*W, *b)]
        ones = torch.ones(n, 1, device="cuda")
        tables = [Table(*moved[:3], weights, x, True), Table(*moved[3:], weights, ones, False)]
        feature_rows.adam_rows(pairs, tables, hyper, seed, lazy)
        return [*moved, *feature_rows.feature_sums(pairs, [weights], [x])]

    def tensors(number: int, highest: int) -> list[Tensor]:
        features = torch.randint(highest, (n * k,), generator=torch.Generator().manual_seed(number)).cuda()
        hyper = torch.tensor([1e-3 * number, 1.5, 1e-8, 0.1, 0.999, 0.001], device="cuda")
        tables = []
        for width in (d, 1):
            param = torch.nn.functional.normalize(normal(d_sae, width, seed=number))
            first, second = (normal(d_sae, width, seed=number + i) for i in (1, 2))
            tables += [param, first.to(moments), second.square().to(moments)]
        weights, x = normal(n * k, seed=number + 3), normal(n, d, seed=number + 4)
        return [features, weights, x, hyper, torch.tensor([number], device="cuda"), *tables]

    assert_replays(step, tensors(1, d_sae), tensors(7, 3))


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("query", ["current", "past"])
def test_the_recurrence(query: str, device: str) -> None:
    """Captured once for each power of two of positions, and the same as on the CPU, also if another GPU is current."""
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("a single GPU")
    torch.manual_seed(0)
    sae = ContextualSAE(24, 96, 4, n_heads=2, d_head=8, d_value=8, query=query).eval()
    with torch.no_grad():
        sae.W_O.mul_(5)
    acts = torch.randn(3, 150, 24)
    documents = (torch.arange(150) // 60).expand(3, 150)
    expected = sae(acts, None, documents)
    found = sae.to(device)(acts.to(device), None, documents.to(device))
    torch.testing.assert_close(found.x_hat.cpu(), expected.x_hat, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("numbers", [[0] * 4 + [5] * 8, [0, 0, 0, *range(124, 133)]], ids=["few", "changing"])
@pytest.mark.parametrize("arch", ["topk", "current", "past"])
def test_a_training_step(arch: str, numbers: list[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole step as csae train captures it, also if another GPU is current, with features that die meanwhile.

    By products of dead features, and from 129 on by sparse ops. A graph takes any number of them within its capacity.
    """
    from csae.config import TrainConfig
    from csae.data.activations import Batch
    from csae.step import adam, step_graphs, train_step

    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("a single GPU")
    # Learning rates that float32 has, as a graph takes them.
    monkeypatch.setattr("csae.graphs.CALLS", 1)
    monkeypatch.setattr("csae.step.learning_rate", lambda step, config: 2.0 ** round(-8 - step / 3))
    config = TrainConfig(steps=12, lr=1e-2, batch_windows=2, precision="bfloat16", decay=0.4)
    after = []
    for captured in (True, False):
        torch.manual_seed(0)
        sizes = {"d_in": 64, "d_sae": 512, "k": 8, "k_aux": 16}
        heads = {"n_heads": 2, "d_head": 16, "d_value": 16, "d_memory": 32, "sweeps": 2}
        sae = TopKSAE(**sizes) if arch == "topk" else ContextualSAE(**sizes, **heads, query=arch)
        optimizer = adam(sae.to(device).train(), config)
        graphs = step_graphs(sae)
        assert graphs is not None
        graphs.refused = not captured  # dead features are padded, but each kernel is launched by itself
        captures, losses = [], []

        def capture(step: Callable[[], object], of=graphs._capture, noted=captures) -> object:
            noted.append(step)
            return of(step)

        monkeypatch.setattr(graphs, "_capture", capture)
        for step in range(config.steps):
            acts = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(step))
            mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(step)) > 0.1
            batch = Batch(acts, mask, torch.zeros(2, 64, dtype=torch.int64), None)
            dead = torch.arange(numbers[step], device=device)
            with optimizer.copies.used():
                found, _ = train_step(sae, optimizer, batch, step, config, dead, graphs)
            losses.append(found.loss.item())
        # With no dead features, with two capacities, and these with one sweep less.
        assert len(captures) <= 5
        assert bool(captures) == captured, "nothing was captured"
        states = [of for state in optimizer.state.values() for of in state.values()]
        after.append((losses, [of.cpu() for of in (*sae.state_dict().values(), *states)]))
    assert after[0][0] == after[1][0]
    assert all(torch.equal(one, two) for one, two in zip(after[0][1], after[1][1], strict=True))
