"""The tables that `make gpu` writes: predicted and measured apart, by device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from csae.bench import cases, gpu_results, predictions, report, targets
from csae.bench.data import SHAPES, Data

ROOT = Path(__file__).parents[2]


def result(case: str, impl: str, median: float, peak: int = 8, share: float = 0.5, shape: str = "B") -> dict[str, Any]:
    size = {"name": shape, "n": 8192, "d_in": 2304, "d_sae": 65536, "k": 64}
    times = {"median_ms": median, "spread_ms": 0.1, "peak_bytes": peak, "share_of_floor": share, "ratio_to_ours": 1.0}
    return {"case": case, "shape": size, "dtype": "bfloat16", "impl": impl, "floor_ms": 1.0, **times}


FOUND = {
    "device": "NVIDIA H200",
    "type": "cuda",
    "versions": {"torch": "2.11.0"},
    "threads": 8,
    "rounds": 10,
    "ceilings": {"dtype": "bfloat16", "operations_per_s": 8e14, "bytes_per_s": 3e12},
    "results": [
        result("topk_encode forward", "csae", 1.5),
        result("topk_encode forward", "mm", 1.0),
        result("encode + decode backward", "csae", 1.5, share=0.8),
        result("TopK training step", "csae", 2.0, peak=2),
        result("TopK training step", "sparsify", 7.0, peak=10),
    ],
}


def test_targets_are_held_against_results() -> None:
    at_B = {cells[0]: cells[1:][2] for cells in targets.measured(FOUND)}
    assert at_B["topk_encode forward / the product alone"] == "1.50 !"
    assert at_B["backward of encode + decode / its floor"] == "1.25"
    assert at_B["TopK training step: sparsify / ours"] == "3.50"
    assert at_B["its memory: ours / sparsify"] == "0.20"
    assert at_B["TopK training step: SAELens / ours"] == ""
    assert {cells[2] for cells in targets.measured(FOUND)} == {""}  # shape A
    assert "1.50 !" in targets.short(FOUND)


def test_predicted_and_measured_are_apart_by_device(tmp_path: Path) -> None:
    """Whatever the device: an H200, another, none."""
    nothing = targets.markdown(tmp_path)
    assert "## Predicted: NVIDIA H200" in nothing
    assert "Nothing yet: no kernel here has run on a GPU." in nothing
    assert "## Measured: " not in nothing
    row = {"shape": "A", "op": "gather_sum", "kernel": "", "launches": 1, "ms": 0.2}
    said = predictions.predicted("NVIDIA H200", "gather_sum", "A")
    assert said is not None
    row = row | {"ms": 2 * said}
    for device in ("NVIDIA H200", "AMD Instinct MI300X"):
        predicted = predictions.predicted(device, "gather_sum", "A")
        report.write(
            FOUND | {"device": device, "kernels": [row | {"predicted_ms": predicted}]}, tmp_path / f"{device}.json"
        )
    text = targets.markdown(tmp_path)
    assert "no kernel here has run" not in text
    parts = {part.partition("\n")[0]: part for part in text.split("\n## ")}
    assert "| topk_encode forward / the product alone | at most 1.2 | " in parts["Predicted: NVIDIA H200"]
    for device, ratio in (("NVIDIA H200", "2.00"), ("AMD Instinct MI300X", "ms  ")):
        part = parts[f"Measured: {device}"]
        assert "| topk_encode forward / the product alone | at most 1.2 |  | 1.50 ! |  |" in part
        (line,) = [line for line in part.splitlines() if "gather_sum" in line]
        assert ratio in line
        beside = [line for line in part.splitlines() if line.startswith("| TopK training step, B | 2 | ")]
        assert len(beside) == (device == "NVIDIA H200")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_predictions_are_for_rows_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from csae.bench import tune
    from csae.kernels.triton.variant import Variant

    monkeypatch.setattr(Variant, "launch", lambda *_: None)
    with FakeTensorMode():
        measured = {name for name, _ in tune.ops(Data(SHAPES["A"], torch.bfloat16, torch.device("cpu")))}
    for device in json.loads(predictions.PREDICTIONS.read_text())["devices"].values():
        assert {name.partition(": ")[0] for name in device["ms"]} <= measured | {*cases.CASES, "torch.mm"}
        assert set(device["ratios"]) <= {target.what for target in targets.TARGETS}


def test_results_of_several_cases_become_one_file_and_a_table(tmp_path: Path) -> None:
    parts = [{"report": FOUND | {"results": [one]}} for one in FOUND["results"]]
    tuned = result("topk_encode forward", "csae", 1.25)
    gone = {name: tuned[name] for name in ("case", "shape", "dtype", "impl")} | {"skipped": "out of memory"}
    parts += [
        {"kernels": [{"shape": "A"}]},
        {"report": FOUND | {"results": [tuned]}},
        {"report": FOUND | {"results": [gone]}},
    ]
    found = gpu_results.together(parts)
    assert found is not None
    assert found["results"] == [tuned, *FOUND["results"][1:]]
    assert found["kernels"] == [{"shape": "A"}]
    files = gpu_results.write(parts[:1], tmp_path / "results", tmp_path / "RESULTS.md")
    assert [file.name for file in files] == ["NVIDIA-H200.json", "RESULTS.md"]
    assert gpu_results.write([{}], tmp_path / "results", tmp_path / "RESULTS.md") == []


def test_results_md_is_what_the_results_say() -> None:
    assert (ROOT / "bench" / "RESULTS.md").read_text() == targets.markdown(ROOT / "bench" / "results")
