"""`make gpu` as far as it can be tested without a GPU, and the tables that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from csae.bench import gpu, report, targets

ROOT = Path(__file__).parents[2]


def here(tmp_path: Path) -> gpu.Here:
    return gpu.Here(
        "Some GPU", True, None, tmp_path, tmp_path / "results", tmp_path / "RESULTS.md", tmp_path / "tuned.json"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_does_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "csae.bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no CUDA device" in done.stdout


def test_what_measures_in_a_process_of_its_own_imports_the_benchmark(tmp_path: Path) -> None:
    assert gpu.python(here(tmp_path), "bench", ["-c", gpu.MEASURE, str(tmp_path), "1"], 120) == ""  # of no shape


def test_a_stage_is_done_once_until_the_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []

    def work(where: gpu.Here, seconds: float) -> str:
        runs.append(seconds)
        return "fine"

    stage, at = gpu.Stage("work", 50, work), here(tmp_path)
    monkeypatch.setattr(gpu, "key", lambda where, name: "code 1")
    assert gpu.do(at, stage, 100) == (True, "fine (0 s)")
    assert gpu.do(at, stage, 100) == (True, "fine (0 s) (before)")
    monkeypatch.setattr(gpu, "key", lambda where, name: "code 2")
    assert gpu.do(at, stage, 30) == (True, "fine (0 s)")
    assert runs == [50, 30]


def test_a_stage_that_fails_or_is_skipped_is_tried_again(tmp_path: Path) -> None:
    def fail(where: gpu.Here, seconds: float) -> str:
        raise gpu.Failed("broken")

    def skip(where: gpu.Here, seconds: float) -> str:
        raise gpu.Skip("not here")

    for _ in range(2):
        assert gpu.do(here(tmp_path), gpu.Stage("fail", 50, fail), 100) == (False, "FAILED: broken")
        assert gpu.do(here(tmp_path), gpu.Stage("skip", 50, skip), 100) == (True, "skipped: not here")
    fine, line = gpu.do(here(tmp_path), gpu.Stage("fail", 50, fail), 5)
    assert not fine
    assert "time is up" in line


def test_a_command_is_stopped_with_its_children_when_its_time_is_up(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 3; touch {child}'])"
    start = time.monotonic()
    with pytest.raises(gpu.Failed, match=r"stopped after 1 s: see .*hang\.log"):
        gpu.python(here(tmp_path), "hang", ["-c", program], 1)
    assert time.monotonic() - start < 3
    time.sleep(3)
    assert not child.exists()


def test_a_command_that_fails_says_how(tmp_path: Path) -> None:
    with pytest.raises(gpu.Failed, match=r"ValueError: too bad \(exit code 1\)"):
        gpu.python(here(tmp_path), "log", ["-c", "raise ValueError('too bad')"], 60)
    assert "too bad" in (tmp_path / "log.log").read_text()


def test_the_key_changes_with_the_tiles_for_the_benchmark_only(tmp_path: Path) -> None:
    before = [gpu.key(here(tmp_path), name) for name in ("tests", "bench")]
    (tmp_path / "tuned.json").write_text("{}")
    after = [gpu.key(here(tmp_path), name) for name in ("tests", "bench")]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_peers_that_are_no_wheels_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "wheels"
    empty.mkdir()
    gpu.peers(here(tmp_path)._replace(peers=empty), 60)
    assert "left out: no wheels" in capsys.readouterr().out
    (empty / "peer-1-py3-none-any.whl").write_text("not a wheel")
    gpu.peers(here(tmp_path)._replace(peers=empty), 60)
    assert "left out: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_rehearsal() -> None:
    command = [
        sys.executable,
        "-m",
        "csae.bench.gpu",
        "--rehearse",
        "--fresh",
        "--only",
        "build",
        "tests",
        "memcheck",
        "tune",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compute-sanitizer --tool memcheck" in done.stdout
    assert json.loads((ROOT / "build" / "rehearsal" / "tuned.json").read_text()).keys() == {"cpu"}


def result(case: str, impl: str, median: float, peak: int = 8, share: float = 0.5, shape: str = "B") -> dict[str, Any]:
    size = {"name": shape, "n": 8192, "d_in": 2304, "d_sae": 65536, "k": 64}
    times = {"median_ms": median, "spread_ms": 0.1, "peak_bytes": peak, "share_of_floor": share, "ratio_to_ours": 1.0}
    return {"case": case, "shape": size, "dtype": "bfloat16", "impl": impl, "floor_ms": 1.0, **times}


FOUND = {
    "device": "NVIDIA H100 80GB HBM3",
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
    at_B = {cells[0]: cells[1:][2] for cells in targets.rows(FOUND)}
    assert at_B["topk_encode forward / the product alone"] == "1.50 !"
    assert at_B["backward of encode + decode / its floor"] == "1.25"
    assert at_B["TopK training step: sparsify / ours"] == "3.50"
    assert at_B["its memory: ours / sparsify"] == "0.20"
    assert at_B["TopK training step: SAELens / ours"] == "not measured"
    assert {cells[2] for cells in targets.rows(FOUND)} == {"not measured"}  # shape A
    assert "1.50 !" in targets.short(FOUND)


def test_results_of_several_cases_become_one_file_and_a_table(tmp_path: Path) -> None:
    files = []
    for place, one in enumerate(FOUND["results"]):
        files.append(tmp_path / f"{place}.json")
        report.write(FOUND | {"results": [one]}, files[-1])
    assert gpu.write_results(here(tmp_path), files) == "5 timed, 0 not: Some-GPU.json, RESULTS.md"
    assert report.read(tmp_path / "results" / "Some-GPU.json") == FOUND
    assert "| NVIDIA H100 80GB HBM3 | target | A | B | C |" in (tmp_path / "RESULTS.md").read_text()


def test_results_md_is_what_the_results_say() -> None:
    assert (ROOT / "bench" / "RESULTS.md").read_text() == targets.markdown(ROOT / "bench" / "results")
