"""A training step as a graph: captured once, replayed with the bits of a step that is launched operation by operation.

On a CPU a tape takes the place of a CUDA graph (`tape.py`). It shows that no number of a step is Python's, and that
nothing is read back: not that CUDA can capture it, which the tests marked gpu show.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import torch
from tape import REFUSED, tape
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from csae import SAE, Adam, ContextualSAE, TopKSAE
from csae.bench.predict import launches
from csae.config import TrainConfig
from csae.data.activations import Batch
from csae.dead_rows import pad
from csae.graphs import Graphs
from csae.step import _step, adam, step_graphs, sweeps_at, train_step
from csae.train import train

STEPS = 12
CONFIG = {"steps": STEPS, "lr": 1e-2, "batch_windows": 2, "precision": "bfloat16", "warmup": 0.3, "decay": 0.3}
SIZES = {"d_in": 12, "d_sae": 60, "k": 4, "k_aux": 6, "dead_after": 60}
HEADS = {"n_heads": 2, "d_head": 3, "d_value": 5, "d_memory": 8}
CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "contextual": {"arch": "contextual", "sweeps": 2},
    "past": {"arch": "contextual", "query": "past"},
    "transcoder": {"d_out": 8, "skip": True},
    "matryoshka": {"prefixes": (10, 30)},
    "jumprelu": {"selection": "jumprelu"},
    "jumprelu, contextual": {"arch": "contextual", "selection": "jumprelu"},
}


def make(arch: str = "topk", **options: Any) -> SAE:
    torch.manual_seed(0)
    if arch == "topk":
        return TopKSAE(**SIZES, **options)
    return ContextualSAE(**SIZES, **HEADS, **options)


def batch(step: int, sae: SAE, B: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(step)
    acts = torch.randn(B, 16, 12, generator=generator) + 0.5
    mask = torch.rand(B, 16, generator=generator) > 0.1
    documents = (torch.arange(16) > 9).long().expand(B, 16)
    target = torch.randn(B, 16, 8, generator=generator) if sae.is_transcoder else None
    return Batch(acts, mask, documents, None, target)


def written(sae: SAE, optimizer: Adam) -> list[Tensor]:
    states = [of for state in optimizer.state.values() for of in state.values()]
    return [*sae.parameters(), *sae.buffers(), *states, *(copy.rounded for copy in optimizer.copies._kept.values())]


class Run:
    """Steps of training, with graphs or without."""

    def __init__(self, sae: SAE, on: bool = True, names: list[str] | None = None, **changed: Any) -> None:
        self.sae, self.config = sae.train(), TrainConfig(**(CONFIG | changed))
        self.optimizer = adam(sae, self.config)
        self.graphs: Graphs | None = None
        self.captures = 0
        if on:
            on_tape = tape(lambda: written(sae, self.optimizer), names)

            def capture(function: Any) -> Any:
                self.captures += 1
                return on_tape(function)

            self.graphs = Graphs(torch.device("cpu"), capture)

    def step(self, step: int, dead: Tensor | None = None, B: int = 2) -> list[Tensor]:
        with self.optimizer.copies.used():
            how = step, self.config, dead, self.graphs
            losses, _ = train_step(self.sae, self.optimizer, batch(step, self.sae, B), *how)
        return [of.clone() for of in (losses.loss, losses.fvu, losses.aux, *losses.code)]


def assert_alike(one: Run, other: Run) -> None:
    for ours, theirs in zip(written(one.sae, one.optimizer), written(other.sae, other.optimizer), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(params=[False, True], ids=["cast", "copies"])
def _copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csae.rounded.kept", lambda table: request.param)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates that float32 has, as a graph takes them; and a capture at the second step of a kind.

    Fewer than 16 dead features are not padded: what is launched one by one takes them without padding.
    """
    monkeypatch.setattr("csae.graphs.CALLS", 1)
    monkeypatch.setattr("csae.dead_rows.LEAST", 1)
    monkeypatch.setattr("csae.step.learning_rate", lambda step, config: 2.0 ** round(-8 - step / 3))


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("how", [{}, {"lazy": True, "moments": "bfloat16"}], ids=["adam", "lazy"])
def test_the_bits_of_steps_without(options: dict[str, Any], how: dict[str, Any]) -> None:
    """Also where features die and come alive, which changes shapes, and so takes another graph."""
    ours, theirs = Run(make(**options), **how), Run(make(**options), on=False, **how)
    for step in range(STEPS):
        dead = torch.tensor([1, 5, 40]) if step >= 6 else torch.tensor([], dtype=torch.int64)
        found, wanted = ours.step(step, dead), theirs.step(step, dead)
        assert [torch.equal(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(wanted), step
        assert_alike(ours, theirs)
    assert ours.captures >= 2
    assert ours.graphs is not None
    assert not ours.graphs.refused


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("how", [{}, {"lazy": True, "moments": "bfloat16"}], ids=["adam", "lazy"])
def test_one_graph_for_any_number_of_dead_features(
    options: dict[str, Any], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one capacity, to the bits of steps without padding: both are dense products of all dead features."""
    monkeypatch.setattr("csae.dead_rows.LEAST", 4)
    run = Run(make(**options), decay=0.0, **how), Run(make(**options), on=False, decay=0.0, **how)
    for step in range(STEPS):
        dead = torch.tensor([1, 40, 5, 59])[: 1 + (step * 3) % 4]
        found, wanted = (one.step(step, dead) for one in run)
        assert [torch.equal(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(wanted), step
        assert_alike(*run)
    assert run[0].captures == 1


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_few_graphs_where_the_number_of_dead_features_changes_with_each_step(options: dict[str, Any]) -> None:
    """Those that one padding takes have the bits of its steps without a graph, whatever AuxK chooses from how many."""
    ours, theirs = Run(make(**options), decay=0.0), Run(make(**options), decay=0.0)
    assert theirs.graphs is not None
    theirs.graphs.refused = True
    for step in range(40):
        dead = torch.arange(60).roll(step)[: 21 + (step * 7) % 12]  # 24, 28 or 32 places
        found, wanted = ours.step(step % 9, dead), theirs.step(step % 9, dead)
        assert [torch.equal(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(wanted), step
        assert_alike(ours, theirs)
    assert theirs.captures == 0
    assert ours.captures == 3


def none() -> Tensor:
    return torch.tensor([], dtype=torch.int64)


def changed_in_place(sae: SAE) -> None:
    with torch.no_grad():
        sae.W_enc.mul_(0.5)


def loaded(sae: SAE) -> None:
    state = {name: of.clone() for name, of in sae.state_dict().items()}
    state["W_dec"] = state["W_dec"].flip(0)
    sae.load_state_dict(state)


def moved(sae: SAE) -> None:
    """To other memory, as `sae.to(device)` does."""
    sae.W_enc.data = sae.W_enc.data * 0.5


def of_other_k(sae: SAE) -> None:
    sae.k_aux = 2


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("change", [changed_in_place, loaded, moved, of_other_k])
@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_what_is_changed_between_steps_is_seen(change: Any, arch: str) -> None:
    ours, theirs = Run(make(arch)), Run(make(arch), on=False)
    for step in range(10):
        if step in (4, 5, 8):
            change(ours.sae)
            change(theirs.sae)
        dead = torch.tensor([1, 5, 40])
        ours.step(step, dead)
        theirs.step(step, dead)
        assert_alike(ours, theirs)


def test_a_batch_of_another_size_is_another_graph() -> None:
    ours, theirs = Run(make()), Run(make(), on=False)
    for step, B in enumerate([2, 2, 2, 1, 2, 1, 1, 2]):
        ours.step(step, none(), B)
        theirs.step(step, none(), B)
        assert_alike(ours, theirs)
    assert ours.captures == 2


def test_each_tensor_counts_its_writes() -> None:
    """What is made of weights and kept, a state of a stream for one, must see that they changed."""
    run = Run(make("contextual"))
    tensors = [run.sae.W_enc, run.sae.W_Q, run.sae.tokens_since_fired, run.optimizer.state[run.sae.W_enc]["exp_avg"]]
    for step in range(5):
        before = [of._version for of in tensors]
        run.step(step, none())
        assert all(of._version > version for of, version in zip(tensors, before, strict=True)), step


def test_few_graphs_are_kept() -> None:
    """Each holds memory. Of shapes that come once, none is captured."""
    run = Run(make())
    for n_dead in range(6):
        run.step(n_dead, torch.arange(n_dead))
    assert run.captures == 0
    for n_dead in range(1, 6):
        run.step(n_dead, torch.arange(n_dead))
        run.step(n_dead, torch.arange(n_dead))
    assert run.graphs is not None
    assert len(run.graphs._known) == 4


def test_a_capture_comes_after_some_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capacity for dead features may change with every line of metrics: then a capture would not pay."""
    monkeypatch.setattr("csae.graphs.CALLS", 3)
    run = Run(make())
    for step in range(8):
        run.step(step, torch.arange(step // 2))
    assert run.captures == 0
    counts = []
    for step in range(5):
        run.step(step, torch.arange(17 + step % 3))  # 20 places
        counts.append(run.captures)
    assert counts == [0, 0, 0, 1, 1]


def test_a_stop_within_a_capture_leaves_no_copy_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csae.rounded.kept", lambda table: True)
    run = Run(make())

    def capture(function: Any) -> Any:
        tape(lambda: written(run.sae, run.optimizer))(function)
        raise KeyboardInterrupt

    assert run.graphs is not None
    run.graphs._capture = capture
    run.step(0, none())
    run.step(1, none())
    with pytest.raises(KeyboardInterrupt):
        run.step(2, none())
    assert not run.optimizer.copies._kept


def test_steps_from_exact_codes_are_not_captured() -> None:
    run = Run(make("contextual"), exact_from=0.0)
    for step in range(4):
        run.step(step, none())
    assert run.captures == 0


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_captured_is_said_once_and_run(late: bool, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = Run(make()), Run(make(), on=False)

    def capture(function: Any) -> Any:
        if late:  # Python ran, and no kernel
            tape(lambda: written(ours.sae, ours.optimizer))(function)
        raise RuntimeError("CUDA error: operation not permitted\nand more")

    assert ours.graphs is not None
    ours.graphs._capture = capture
    for step in range(6):
        ours.step(step, none())
        theirs.step(step, none())
        assert_alike(ours, theirs)
    said = (
        "a step can't be captured as a CUDA graph (CUDA error: operation not permitted): its kernels are launched one"
    )
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith(said)] == [f"{said} by one"]


def test_learning_rates_are_numbers_again_after_a_step() -> None:
    """A saved optimizer holds no tensor of a graph."""
    run = Run(make())
    for step in range(4):
        run.step(step, none())
        assert all(isinstance(group["lr"], float) for group in run.optimizer.param_groups)


def test_training_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bits of training without, by padded dead features too, also after a stop."""
    captures: list[Any] = []

    def refused(sae: SAE) -> Graphs:
        graphs = Graphs(torch.device("cpu"), captures.append)
        graphs.refused = True
        return graphs

    def on_tape(sae: SAE) -> Graphs:
        def capture(function: Any) -> Any:
            captures.append(function)
            return tape(lambda: [*sae.state_dict().values(), *states(sae)])(function)

        return Graphs(torch.device("cpu"), capture)

    def states(sae: SAE) -> list[Tensor]:
        (own,) = (of for of in optimizers if of.sae is sae)
        return [of for state in own.state.values() for of in state.values()]

    optimizers: list[Adam] = []

    def noted(sae: SAE, config: TrainConfig) -> Adam:
        optimizers.append(adam(sae, config))
        return optimizers[-1]

    monkeypatch.setattr("csae.training.adam", noted)
    trained = []
    for number, graphs in enumerate((refused, on_tape)):
        assert not captures
        monkeypatch.setattr("csae.training.step_graphs", graphs)
        sae = tiny_runs.new_sae("topk")
        how = tiny_runs.config(precision="bfloat16", steps=14)
        train(sae, tiny_runs.Windows(), range(12), tmp_path / str(number), how)
        trained.append(sae)
    assert captures
    stopped = tiny_runs.stopped(tmp_path / "stopped", 6, tiny_runs.new_sae("topk"), precision="bfloat16", steps=14)
    again = tiny_runs.new_sae("topk")
    train(again, tiny_runs.Windows(), range(12), stopped, how)
    for other in (trained[1], again):
        assert tiny_runs.same(trained[0], other)


@pytest.mark.parametrize(
    ("device", "shard", "taken"), [("cuda:1", None, True), ("cuda:1", object(), False), ("cpu", None, False)]
)
def test_where_steps_are_captured(device: str, shard: Any, taken: bool) -> None:
    sae: Any = SimpleNamespace(W_dec=SimpleNamespace(device=torch.device(device)), shard=shard)
    graphs = step_graphs(sae)
    assert (graphs is not None) == taken
    assert graphs is None or graphs.device == torch.device(device)


def test_a_capture_is_on_the_device_and_leaves_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself torch captures on the current device, and keeps its stream current where a capture breaks off."""
    device, current = torch.device("cuda", 1), {"device": torch.device("cuda", 0), "stream": "stream of 0"}
    streams = {torch.device("cuda", n): f"stream of {n}" for n in (0, 1)}

    @contextmanager
    def on(what: str, to: Any) -> Iterator[None]:
        before = current[what]
        current[what] = to
        try:
            yield
        finally:
            current[what] = before

    class Captured:
        """As torch.cuda.graph, which leaves its stream current where the end of a capture raises."""

        def __init__(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> None:
            assert current["device"] == device
            assert (pool, stream, capture_error_mode) == ("the pool", "a stream of cuda:1", "thread_local")
            self.stream = stream

        def __enter__(self) -> None:
            current["stream"] = self.stream

        def __exit__(self, kind: Any, *_: Any) -> None:
            if kind is not None:
                raise RuntimeError("capture was invalidated")
            current["stream"] = streams[device]

    fakes = {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: "replayed"),
        "device": lambda to: on("device", to),
        "stream": lambda to: on("stream", to),
        "current_stream": lambda of: streams[of],
        "graph_pool_handle": lambda: "the pool",
        "Stream": lambda of: f"a stream of {of}",
        "graph": Captured,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = Graphs(device)
    replay, results = graphs._capture(lambda: current["stream"])
    assert (replay(), results) == ("replayed", "a stream of cuda:1")
    with pytest.raises(RuntimeError, match="invalidated"):
        graphs._capture(lambda: [][0])
    assert current == {"device": torch.device("cuda", 0), "stream": "stream of 0"}


class _Strict(launches._Recorder):
    """Also refuses what a capture does; it goes into the operators of csae, as the recorder does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in REFUSED:
            raise RuntimeError(f"a step takes {name}")
        return super().__torch_dispatch__(func, types, args, kwargs)


def run_without_numbers(
    options: dict[str, Any], n_dead: int, half: bool, monkeypatch: pytest.MonkeyPatch, padded: bool = False
) -> None:
    """Two steps by Triton's launchers, on tensors without numbers, the second in a mode that refuses what CUDA does."""
    monkeypatch.setattr("test_graphs.SIZES", {"d_in": 64, "d_sae": 4096, "k": 8, "k_aux": 8})
    monkeypatch.setattr("test_graphs.HEADS", {"n_heads": 2, "d_head": 16, "d_value": 16, "d_memory": 32})
    monkeypatch.setattr("csae.sae.check_dead", lambda *given: None)  # on CUDA the lookup checks
    options = options | ({"d_out": 32} if "d_out" in options else {})
    with FakeTensorMode(allow_non_fake_inputs=True):
        sae = make(**options)
        optimizer = Adam(sae)
        inputs = {"acts": torch.empty(2, 128, 64), "mask": torch.ones(2, 128, dtype=torch.bool)}
        inputs |= {"documents": torch.zeros(2, 128, dtype=torch.int64), "dead": torch.arange(n_dead)}
        if sae.is_transcoder:
            inputs["target"] = torch.empty(2, 128, 32)
        for group in optimizer.param_groups:
            group["lr"] = torch.empty(())
        for recorder in (launches._Recorder, _Strict):  # the first step keeps numbers that all take
            monkeypatch.setattr(launches, "_Recorder", recorder)
            if padded:  # by other numbers in each step
                inputs["dead"] = pad(torch.arange(n_dead - (recorder is _Strict)), 4096)
            with launches._recording() as found, optimizer.copies.used():
                _step(sae, optimizer, inputs, sweeps_at(5, TrainConfig(**CONFIG), sae), half, padded)
        assert any(isinstance(one, launches.Triton) for _, one in found.found.launches)


WITH_KERNELS = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="variants are recorded, not run")


# On a CPU the host reads the proof of a shared budget, so a tape takes none of it.
ON_CUDA = CASES | {
    "batch": {"selection": "batch"},
    "batch, contextual": {"arch": "contextual", "selection": "batch"},
    "batch, past": {"arch": "contextual", "query": "past", "selection": "batch"},
}


@WITH_KERNELS
@pytest.mark.parametrize(
    ("n_dead", "half"), [(0, True), (3, True), (400, True), (3, False)], ids=["dead=0", "dead=3", "dead=400", "float32"]
)
@pytest.mark.parametrize("options", ON_CUDA.values(), ids=ON_CUDA.keys())
def test_the_host_waits_for_nothing(
    options: dict[str, Any], n_dead: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_without_numbers(options, n_dead, half, monkeypatch)


@WITH_KERNELS
@pytest.mark.parametrize(
    ("n_dead", "half"), [(3, True), (400, True), (3, False)], ids=["dead=3", "dead=400", "float32"]
)
@pytest.mark.parametrize("options", ON_CUDA.values(), ids=ON_CUDA.keys())
def test_the_host_waits_for_nothing_with_padded_dead_features(
    options: dict[str, Any], n_dead: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_without_numbers(options, n_dead, half, monkeypatch, padded=True)


@WITH_KERNELS
def test_what_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(code: Any, mask: Tensor) -> Tensor:
        return torch.tensor(float(code.values.sum()))

    monkeypatch.setattr("csae.sae.least", read)
    with pytest.raises(DataDependentOutputException):
        run_without_numbers({"selection": "batch"}, 0, True, monkeypatch)
