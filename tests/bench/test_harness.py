"""The list of cases, the check before timing, and the results of a run. No peers are needed."""

import dataclasses
import json
import time
from typing import Any

import pytest
import torch

from csae import SAE
from csae.bench import harness, ours, plain
from csae.bench.cases import BACKWARD, CASES, ENCODE, FORWARD_BACKWARD, LOOK_BACK, TOPK_STEP
from csae.bench.data import CHECK, DTYPES, SHAPES, Built, Data, Shape, Skip
from csae.bench.measure import Ceilings, Clock
from csae.errors import UserError
from csae.graphs import CALLS, Graphs

CPU = torch.device("cpu")
TINY = Shape("tiny", 32, 16, 64, 4, T=16, heads=2, d_head=16, d_value=16)
COMPILED = "PyTorch dense, compiled"
PEERS = ("sparsify", "SAELens", "dictionary_learning")
SECONDS_OF_PEERS = (*PEERS, *(f"{name}, patched" for name in PEERS), "SAELens, sparse activations")
CEILINGS = Ceilings(1e10, 1e9)


def without(case, *names, **more):
    """The case without these implementations, and with more."""
    rest = {name: build for name, build in case.implementations.items() if name not in names}
    return dataclasses.replace(case, implementations=rest | more)


def quick(case):
    return without(case, COMPILED, *SECONDS_OF_PEERS)


@pytest.fixture
def no_peaks(monkeypatch):
    """Memory is measured in another process, which takes seconds."""
    monkeypatch.setattr(harness, "_peaks", lambda case, data, names: dict.fromkeys(names, 1))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_implementation_passes_the_gate_or_says_why_it_was_not_run(case):
    passed, skipped = harness.check(quick(case), Data(TINY, torch.float32, CPU))
    assert "csae" in passed
    assert not [reason for reason in skipped.values() if "differs" in reason], skipped
    for name, reason in skipped.items():
        assert "CUDA" in reason or "CPU" in reason, (name, reason)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gate_is_fair_in_bfloat16(case):
    _, skipped = harness.check(quick(case), Data(TINY, torch.bfloat16, CPU))
    assert not [reason for reason in skipped.values() if "differs" in reason], skipped


def wrong_encode(data):
    """Keeps the smallest of the chosen features a little too active."""
    right = ENCODE.implementations["csae"](data)

    def outputs():
        found = right.outputs()
        found["values"][:, -1] *= 1.01
        return found

    return Built(right.run, outputs)


def wrong_backward(data):
    """Forgets the decoder's gradient of one token in eight."""

    def autoencode(x, W_enc, b_enc, W_dec, k):
        x_hat = ours.autoencode(x, W_enc, b_enc, W_dec, k)
        lost = torch.arange(x.shape[0]) % 8 == 0
        return torch.where(lost[:, None], x_hat.detach(), x_hat)

    return plain.forward_backward(autoencode)(data)


def wrong_step(data):
    """Takes the gradient of another loss: of half of the tokens only."""

    def autoencode(x, W_enc, b_enc, W_dec, k):
        x_hat = plain.dense_autoencode(x, W_enc, b_enc, W_dec, k)
        half = torch.arange(x.shape[0]) % 2 == 0
        return torch.where(half[:, None], x_hat.detach(), x_hat)

    return plain.step(autoencode)(data)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [(ENCODE, wrong_encode), (FORWARD_BACKWARD, wrong_backward), (TOPK_STEP, wrong_step)],
    ids=["code", "gradient", "step"],
)
def test_a_wrong_implementation_is_not_timed(case, wrong, no_peaks):
    names = [name for name in case.implementations if name != "csae"]
    spoilt = without(case, *names, wrong=wrong)
    results = harness.measure(spoilt, Data(TINY, torch.float32, CPU), 1, Clock(CPU))
    right, other = results
    assert "median_ms" in right
    assert other["impl"] == "wrong"
    assert other["skipped"].startswith("differs from the reference")
    assert "median_ms" not in other


def test_what_is_wrong_at_full_size_only_is_not_timed():
    def wrong(data):
        return (wrong_encode if data.shape == TINY else ENCODE.implementations["csae"])(data)

    passed, skipped = harness.check(without(ENCODE, COMPILED, wrong=wrong), Data(TINY, torch.float32, CPU))
    assert "wrong" not in passed
    assert skipped["wrong"].startswith("differs from csae at full size")


def test_why_something_was_skipped_is_in_the_results(no_peaks):
    def absent(data):
        raise Skip("the moon is full")

    def broken(data):
        raise RuntimeError("first line\nsecond line")

    def breaks_later(data):
        right = ENCODE.implementations["csae"](data)
        return right._replace(run=lambda: 1 // 0)

    spoilt = without(ENCODE, COMPILED, absent=absent, broken=broken, breaks_later=breaks_later)
    results = harness.measure(spoilt, Data(TINY, torch.float32, CPU), 1, Clock(CPU))
    said = {result["impl"]: result.get("skipped") for result in results}
    assert said["absent"] == "the moon is full"
    assert said["broken"] == "RuntimeError: first line"
    assert said["breaks_later"].startswith("ZeroDivisionError")
    assert said["csae"] is None


def test_what_takes_too_long_to_build_is_left_out(monkeypatch):
    monkeypatch.setattr(harness, "SECONDS_TO_BUILD", 0.2)
    names = [name for name in ENCODE.implementations if name != "csae"]
    passed, skipped = harness.check(
        without(ENCODE, *names, slow=lambda data: time.sleep(5)), Data(TINY, torch.float32, CPU)
    )
    assert list(passed) == ["csae"]
    assert "not compiled and checked in" in skipped["slow"]


def test_flex_attention_is_skipped_on_a_cpu_with_the_reason():
    _, skipped = harness.check(LOOK_BACK, Data(TINY, torch.float32, CPU))
    assert "no backward pass on a CPU" in skipped["FlexAttention, compiled"]


def test_a_run_gives_what_the_json_promises(monkeypatch, no_peaks):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(CASES, ENCODE.name, quick(ENCODE))
    monkeypatch.setattr(harness, "ceilings", lambda *_: CEILINGS)
    said = []
    report = harness.run(["tiny"], ["topk_encode", "sparse_decode"], device="cpu", rounds=3, say=said.append)
    report = json.loads(json.dumps(report))
    assert len(said) == 2
    assert isinstance(report["device"], str)
    assert report["versions"]["torch"] == torch.__version__
    assert report["ceilings"] == {"dtype": "float32", "operations_per_s": 1e10, "bytes_per_s": 1e9}
    for result in report["results"]:
        assert result["shape"] == TINY.as_json()
        assert result["dtype"] == "float32"
        if "skipped" in result:
            assert set(result) == {"case", "shape", "dtype", "impl", "skipped"}
            continue
        assert result["median_ms"] > 0
        assert result["spread_ms"] >= 0
        assert result["peak_bytes"] == 1
        assert result["share_of_floor"] == pytest.approx(result["floor_ms"] / result["median_ms"])
    by_name = {(r["case"], r["impl"]): r for r in report["results"]}
    mm, own = by_name[ENCODE.name, "mm"], by_name[ENCODE.name, "csae"]
    assert own["ratio_to_ours"] == 1
    assert mm["ratio_to_ours"] == pytest.approx(mm["median_ms"] / own["median_ms"])
    moved = 4 * (32 * 16 + 64 * 16) + 12 * 32 * 4  # x and W_enc read, the code written: more than the operations
    assert mm["floor_ms"] == pytest.approx(moved / 1e9 * 1000)


def test_rounds_are_interleaved():
    turns = []

    def build(name):
        return lambda data: Built(lambda: turns.append(name), dict)

    times, walls, failed = harness._times(
        {name: build(name) for name in "ab"}, Data(TINY, torch.float32, CPU), 3, Clock(CPU)
    )
    assert "".join(turns[-4:]) == "abab"
    assert [len(taken) for taken in times.values()] == [3, 3]
    assert failed == walls == {}


def test_a_device_that_is_broken_ends_the_run_and_says_by_what(monkeypatch, no_peaks):
    """An illegal access fails whatever this process asks of CUDA later: no other implementation is to blame."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(harness, "ceilings", lambda *_: CEILINGS)
    lost = []

    def breaks(data):
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def alive(device, impl, reason):
        if lost:
            raise harness.Broken(impl, reason)

    names = [name for name in ENCODE.implementations if name not in ("csae", "mm")]
    spoilt = without(ENCODE, *names, breaks=breaks)
    monkeypatch.setitem(
        CASES,
        ENCODE.name,
        dataclasses.replace(
            spoilt, implementations={name: spoilt.implementations[name] for name in ("csae", "breaks", "mm")}
        ),
    )
    monkeypatch.setattr(harness, "_check_alive", alive)
    report = harness.run(["tiny"], ["topk_encode", "sparse_decode"], device="cpu", rounds=1, say=str)
    assert report["broke"] == {
        "impl": "breaks",
        "reason": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    said = {(result["case"], result["impl"]): result["skipped"] for result in report["results"]}
    assert said[ENCODE.name, "breaks"].startswith("RuntimeError: CUDA error")
    others = {reason for (_, impl), reason in said.items() if impl != "breaks"}
    assert len(others) == 1
    assert others.pop().startswith("not run: breaks broke the device: RuntimeError")


def test_only_the_implementations_that_are_asked_for_are_run(monkeypatch, no_peaks):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(harness, "ceilings", lambda *_: CEILINGS)
    report = harness.run(["tiny"], ["topk_encode"], device="cpu", rounds=1, implementations=["csae", "mm"], say=str)
    assert [result["impl"] for result in report["results"]] == ["csae", "mm"]
    with pytest.raises(UserError, match="implementation: given 'cublas'"):
        harness.run(["tiny"], ["topk_encode"], device="cpu", implementations=["cublas"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shapes": ["D"]}, "shape: given 'D'; needed one of 'small'"),
        ({"cases": ["decoder"]}, "case: given 'decoder'"),
        ({"dtype": "float8"}, "dtype: given 'float8'"),
        ({"rounds": 0}, "rounds: given 0"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_measured(arguments, said, monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda *_: pytest.fail("it measured"))
    with pytest.raises(UserError, match=said):
        harness.run(**arguments, device="cpu")


def test_the_ceilings_are_the_best_of_the_run(monkeypatch, no_peaks):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    found = iter([Ceilings(1e10, 2e9), Ceilings(3e10, 1e9)])
    monkeypatch.setattr(harness, "ceilings", lambda *_: next(found))
    report = harness.run(["tiny"], ["sparse_decode", "look-back"], device="cpu", rounds=1, say=str)
    assert report["ceilings"] == {"dtype": "float32", "operations_per_s": 3e10, "bytes_per_s": 2e9}


def test_the_shapes_of_the_targets():
    sizes = {name: (shape.n, shape.d_in, shape.d_sae, shape.k) for name, shape in SHAPES.items()}
    assert sizes["A"] == (8192, 768, 32768, 32)
    assert sizes["B"] == (8192, 2304, 65536, 64)
    assert sizes["C"] == (8192, 4096, 131072, 64)
    assert sizes["cpu"] == (2048, 576, 18432, 32)
    for shape in (*SHAPES.values(), CHECK):
        assert shape.n % shape.T == 0


def test_floors_by_hand():
    """Shape C on the ceilings of the design's table, in bfloat16: milliseconds."""
    design = Shape("design", 8192, 1024, 131072, 64, T=1024, heads=8, d_head=64, d_value=64)

    def floor(case):
        return harness.floor_ms(case.floor(design, 2), Ceilings(798e12, 3.0e12))

    assert floor(ENCODE) == pytest.approx(2.8, rel=0.02)
    assert floor(CASES["sparse_decode forward"]) == pytest.approx(0.36, rel=0.03)
    assert floor(BACKWARD) == pytest.approx(0.9, rel=0.03)
    adam = 6 / 7 * 2.5  # the design's also reads a gradient
    assert floor(TOPK_STEP) == pytest.approx(2.8 + 3 * 0.36 + adam, rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not harness.sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_peak_of_a_product_is_nothing_and_that_of_a_dense_backward_is_much():
    """small: n * d_sae floats are 16 MiB."""
    data = Data(SHAPES["small"], DTYPES["float32"], CPU)
    peaks = harness._peaks(FORWARD_BACKWARD, data, ["mm", "PyTorch dense"])
    assert peaks["mm"] < 2 << 20
    assert 32 << 20 < peaks["PyTorch dense"] < 160 << 20


@pytest.mark.slow
def test_compiled_implementations_pass_the_gate():
    for case in (ENCODE, FORWARD_BACKWARD, TOPK_STEP):
        names = [name for name in case.implementations if name not in ("csae", COMPILED)]
        passed, skipped = harness.check(without(case, *names), Data(TINY, torch.float32, CPU))
        assert list(passed) == ["csae", COMPILED], skipped


@pytest.mark.parametrize("make", [ours.topk_sae, ours.contextual_sae])
def test_a_captured_step_is_the_step(make: ours.MakeSAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """After as many steps, where a graph is the function that it was captured from."""
    kept: list[SAE] = []
    begin = ours._begin

    def noted(*given: Any) -> Any:
        found = begin(*given)
        kept.append(found[0])
        return found

    monkeypatch.setattr(ours, "_begin", noted)
    data = Data(TINY, torch.float32, CPU)
    with pytest.raises(Skip, match="needs CUDA"):
        ours.captured_step(make)(data)
    monkeypatch.setattr(ours, "_graphs", lambda device: Graphs(device, lambda once: (once, None)))
    captured, plain = ours.captured_step(make)(data), ours.step(make)(data)
    captured.run()
    for _ in range(CALLS + 2):
        plain.run()
    for one, other in zip(kept[0].parameters(), kept[1].parameters(), strict=True):
        assert torch.equal(one, other)
