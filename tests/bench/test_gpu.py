"""`make gpu` as far as it can be tested without a GPU: the order, what is written when, and how it goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from csae.bench import gpu, report

ROOT = Path(__file__).parents[2]
RATES = {"dtype": "bfloat16", "operations_per_s": 8e14, "bytes_per_s": 4e12}
DEVICE = {"device": "Some GPU", "type": "cuda", "versions": {"torch": "2.11.0"}, "threads": 1, "rounds": 1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Here:
    monkeypatch.setattr(gpu, "key", lambda: "code 1")
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    (tmp_path / "state").mkdir()
    return gpu.Here(
        True,
        tmp_path / "state",
        tmp_path / "results",
        tmp_path / "RESULTS.md",
        tmp_path / "tuned.json",
        tmp_path / "out",
    )


def go_on(here: gpu.Here, cases: list[gpu.Case], seconds: float = 60) -> tuple[bool, list[str]]:
    said: list[str] = []
    return gpu.go_on(cases, here, time.monotonic() + seconds, said.append), said


def device(here: gpu.Here, keep: gpu.Keep) -> tuple[str, dict[str, Any]]:
    return "Some GPU", {"report": {**DEVICE, "ceilings": RATES, "results": []}}


def timed(here: gpu.Here, keep: gpu.Keep, name: str, seconds: float = 0.0) -> tuple[str, dict[str, Any]]:
    """A fake that times: it notes when it begins and ends."""
    with (here.state / "notes").open("a") as notes:
        notes.write(f"{name} begins\n")
    time.sleep(seconds)
    with (here.state / "notes").open("a") as notes:
        notes.write(f"{name} ends\n")
    size = {"name": "A", "n": 8, "d_in": 4, "d_sae": 16, "k": 2}
    times = {"median_ms": 1.0, "spread_ms": 0.1, "peak_bytes": None, "share_of_floor": 0.5, "ratio_to_ours": 1.0}
    result = {"case": name, "shape": size, "dtype": "bfloat16", "impl": "csae", "floor_ms": 1.0, **times}
    return f"{name} is timed", {"report": {**DEVICE, "ceilings": RATES, "results": [result]}}


def fails(here: gpu.Here, keep: gpu.Keep) -> tuple[str, dict[str, Any]]:
    raise gpu.Failed("broken")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_does_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "csae.bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no CUDA device" in done.stdout


def test_killed_at_five_moments_it_goes_on(here: gpu.Here) -> None:
    names = [f"case {i}" for i in range(6)]
    cases = [gpu.Case("device", 30, device), *(gpu.Case(name, 30, timed, (name, 0.3)) for name in names)]
    notes, file = here.state / "notes", here.results / "Some-GPU.json"
    for i in range(5):
        process = multiprocessing.get_context("fork").Process(target=go_on, args=(here, cases))
        process.start()
        while not (notes.exists() and notes.read_text().endswith(f"case {i} begins\n")):
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        before = [result["case"] for result in report.read(file)["results"]]
        assert before == names[:i]  # each was written when it was done
        assert report.read(here.out / file.name) == report.read(file)  # type: ignore[operator]
        time.sleep(0.4)
        assert f"case {i} ends" not in notes.read_text()  # the case was stopped with the run
        # The next one begins with the case that was cut short, and ends it.
        assert go_on(here, cases[: i + 2])[0]
    well, said = go_on(here, cases)
    assert well
    assert [line.endswith("(before)") for line in said] == [True] * 6 + [False]
    ends = [line for line in notes.read_text().splitlines() if line.endswith("ends")]
    assert ends == [f"{name} ends" for name in names]
    assert [result["case"] for result in report.read(file)["results"]] == names
    assert sorted(path.name for path in here.out.iterdir()) == [  # type: ignore[union-attr]
        "RESULTS.md",
        "Some-GPU.json",
        "log.txt",
        "state.json",
    ]


def test_it_goes_on_from_the_folder_that_was_named(here: gpu.Here, tmp_path: Path) -> None:
    """On a fresh machine, whose build/gpu is empty."""
    cases = [gpu.Case("device", 30, device), gpu.Case("a", 30, timed, ("a",)), gpu.Case("b", 30, timed, ("b",))]
    assert go_on(here, cases[:2])[0]
    (tmp_path / "fresh").mkdir()
    well, said = go_on(here._replace(state=tmp_path / "fresh", results=tmp_path / "new"), cases)
    assert well
    assert [line.endswith("(before)") for line in said] == [True, True, False]
    assert [result["case"] for result in report.read(tmp_path / "new" / "Some-GPU.json")["results"]] == ["a", "b"]


def test_other_code_begins_anew(here: gpu.Here, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [gpu.Case("device", 30, device), gpu.Case("a", 30, timed, ("a",))]
    assert go_on(here, cases)[0]
    monkeypatch.setattr(gpu, "key", lambda: "code 2")
    assert "(before)" not in " ".join(go_on(here, cases)[1])


def test_what_failed_is_tried_again_after_what_is_new(here: gpu.Here) -> None:
    cases = [gpu.Case("broken", 30, fails), gpu.Case("a", 30, timed, ("a",)), gpu.Case("b", 30, timed, ("b",))]
    well, said = go_on(here, cases[:2])
    assert not well
    assert "FAILED: broken" in said[0]
    _, said = go_on(here, cases)
    assert [line.split()[0] for line in said] == ["a", "b", "broken"]


def test_an_error_of_one_process_spoils_no_other(here: gpu.Here) -> None:
    def crashes(here: gpu.Here, keep: gpu.Keep) -> tuple[str, dict[str, Any]]:
        keep({"so far": 1})
        os.write(1, b"CUDA error: an illegal memory access")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    well, said = go_on(here, [gpu.Case("crashes", 30, crashes), gpu.Case("a", 30, timed, ("a",))])
    assert not well
    assert "FAILED: its process ended with exit code -9: CUDA error: an illegal memory access" in said[0]
    assert "a is timed" in said[1]
    assert json.loads((here.state / "state.json").read_text())["cases"]["crashes"]["found"] == {"so far": 1}


def test_what_broke_the_device_is_left_out_of_what_is_measured_again(here: gpu.Here) -> None:
    def breaks(here: gpu.Here, keep: gpu.Keep, impls: list[str]) -> tuple[str, dict[str, Any]]:
        if "bad" in impls:
            return "bad broke the device", {"failed": True, "rest": [[impl for impl in impls if impl != "bad"]]}
        return " ".join(impls), {}

    _, said = go_on(here, [gpu.Case("steps", 30, breaks, (["csae", "bad", "mm"],))])
    assert "FAILED: bad broke the device" in said[0]
    assert said[1].startswith("steps, the rest")
    assert "csae mm" in said[1]


def test_a_case_is_interrupted_before_it_is_killed_and_keeps_what_it_found(here: gpu.Here, tmp_path: Path) -> None:
    def slow(here: gpu.Here, keep: gpu.Keep) -> tuple[str, dict[str, Any]]:
        keep({"so far": 1})
        try:
            subprocess.run(["sh", "-c", f"echo $$ > {tmp_path}/child; exec sleep 60"])
        except KeyboardInterrupt:
            keep({"so far": 2})
            raise
        raise AssertionError

    def deaf(here: gpu.Here, keep: gpu.Keep) -> tuple[str, dict[str, Any]]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        keep({"so far": 3})
        time.sleep(60)
        raise AssertionError

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts a job in the background
    try:
        _, said = go_on(here, [gpu.Case("slow", 5, slow), gpu.Case("deaf", 5, deaf)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert all("FAILED: stopped after" in line for line in said)
    found = json.loads((here.state / "state.json").read_text())["cases"]
    assert found["slow"]["found"] == {"so far": 2}
    assert found["deaf"]["found"] == {"so far": 3}
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text()


def test_when_time_is_up_it_says_how_much_is_left(here: gpu.Here) -> None:
    cases = [gpu.Case(name, 30, timed, (name, 0.5)) for name in "abcd"]
    well, said = go_on(here, cases, 1.2)
    assert not well
    assert said[-1].startswith("time is up with ")
    assert go_on(here, cases)[0]


def test_the_order_and_what_two_runs_have_time_for(tmp_path: Path) -> None:
    from csae.bench import gpu_cases

    given = gpu.Here(False, tmp_path, tmp_path, tmp_path / "R", tmp_path / "t")
    cases = gpu_cases.listed(given)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    stages = list(dict.fromkeys(name.partition(":")[0] for name in names))
    assert stages == ["smoke", "kernels", "steps", "tests", "tune", "tuned", "others"] or stages == [
        "smoke", "kernels", "steps", "tests", "tune", "tuned", "tune", "others",
    ]  # fmt: skip
    steps = [name for name in names if name.startswith("steps")]
    assert steps[:3] == [f"steps: TopK training step, {size}" for size in "ABC"]
    assert "FlexAttention" in names[-1]
    rehearsed = gpu_cases.listed(given._replace(rehearse=True))
    assert {case.work for case in rehearsed} == {case.work for case in cases}


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    """The works themselves, with interpreted kernels in tiny sizes, killed at five moments."""
    command = [sys.executable, "-m", "csae.bench.gpu", "--rehearse", "--seconds", "900", "--out", str(tmp_path)]
    state = tmp_path / "state.json"
    done: list[str] = []

    def known() -> list[str]:
        return list(json.loads(state.read_text())["cases"]) if state.exists() else []

    for moment in (1, 3, 6, 9, 11):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
            while len(known()) < moment:
                assert process.poll() is None
                time.sleep(0.1)
            process.kill()
        assert known()[: len(done)] == done  # nothing was lost
        done = known()
    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stdout + last.stderr
    assert last.stdout.count("(before)") >= 11
    stages = list(dict.fromkeys(name.partition(":")[0] for name in known()))
    assert stages == ["smoke", "kernels", "steps", "tests", "tune", "others"]
    assert json.loads((tmp_path / "tuned.json").read_text()).keys() == {"cpu"}
    (found,) = (report.read(file) for file in tmp_path.glob("*.json") if file.name not in ("state.json", "tuned.json"))
    assert {result["impl"] for result in found["results"]} == {"csae", "mm", "PyTorch dense"}
    assert {row["op"] for row in found["kernels"]} == {"gather_sum", "look-back"}
