"""`csae train` as torchrun starts it: killed, started again by torchrun, and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from same_runs import check_same_run
from tiny_runs import lines

from csae.cli import cli
from csae.data.shard_writer import write_shards

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations") / "acts"
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(30, 7, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    write_shards(folder, lambda w: {"activations": acts[w.start : w.stop]}, 30, 8, {"keep_first": True})
    return folder


def arguments(activations: Path, out: Path) -> list[str]:
    size = ["--d-sae", 12, "--k", 2, "--batch-windows", 4, "--tokens", STEPS * 4 * 7, "--held-out", 0.1]
    how = ["--arch", "contextual", "--device", "cpu", "--log-every", 1, "--checkpoint-every", 7]
    return [str(of) for of in ["train", "-o", out, "--activations", activations, *size, *how]]


@pytest.fixture(scope="module")
def alone(activations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    cli(arguments(activations, folder), standalone_mode=False)
    return folder


@contextmanager
def torchrun(size: int, arguments: list[str], *how: str) -> Iterator[subprocess.Popen[str]]:
    """The command under torchrun; it and its processes are gone afterwards."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *how]
    process = subprocess.Popen(
        [*program, "-m", "csae", *arguments],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        end(process)
        process.communicate()


def end(process: subprocess.Popen[str]) -> None:
    """Kill torchrun and its processes, which have groups of their own."""
    for pid in [*(workers(process) if process.poll() is None else []), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The numbers of torchrun's processes."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"csae" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and len(lines(run)) >= step:
            return
        time.sleep(0.02)
    end(process)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def told(said: str) -> list[str]:
    return [line.strip() for line in said.replace("\r", "\n").splitlines() if line.startswith("csae:")]


def test_torchrun_goes_on_from_the_last_checkpoint_by_itself(alone: Path, activations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with torchrun(2, arguments(activations, run), "--max-restarts=1") as process:
        wait_for_step(process, run, 30)
        os.kill(workers(process)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert len(told(said)) <= 1
    check_same_run(run, alone)


def test_a_killed_rank_ends_all_and_the_run_goes_on_with_others(alone: Path, activations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for size, step, victim in ((3, 9, 2), (2, 30, 0)):
        with torchrun(size, arguments(activations, run)) as process:
            wait_for_step(process, run, step)
            os.kill(workers(process)[victim], signal.SIGKILL)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        (line,) = told(said)
        assert f"rank {victim} ended without a word" in line
    cli(arguments(activations, run), standalone_mode=False)
    check_same_run(run, alone)


def test_what_failed_is_the_root_cause_that_torchrun_reports(activations: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "run" / "checkpoint-14"  # in the way: rank 0 says it
    blocked.mkdir(parents=True)
    for said_by, how in ((0, ["--lr", "0.001"]), (1, ["--timeout", "600"])):
        given = [*arguments(activations, tmp_path / "run"), *how]
        if said_by:  # a rank of its own options
            (tmp_path / "one.py").write_text(
                "import os, sys; sys.argv += ['--lr', '0.' + str(1 + int(os.environ['RANK']))]\n"
                "from csae.__main__ import main; main()"
            )
        program = [str(tmp_path / "one.py"), *given] if said_by else ["-m", "csae", *given]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 1
        (line,) = told(ended.stderr)
        root = ended.stderr.partition("Root Cause")[2]
        assert f"traceback : {line}" in root
        assert ended.stderr.rstrip().splitlines()[-2].strip() == f"traceback : {line}"
        assert "it ended because another rank did" in ended.stderr
        assert "To enable traceback see" not in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_torchrun(alone: Path, activations: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    with torchrun(2, arguments(activations, run)) as process:
        wait_for_step(process, run, 10)
        # Ctrl-C goes to all at once.
        for pid in [process.pid, *(workers(process) if number == signal.SIGINT else [])]:
            os.kill(pid, number)
        _, said = process.communicate(timeout=60)
    (line,) = told(said)
    assert "stopped after step" in line
    (checkpoint,) = run.glob("checkpoint-*")
    assert checkpoint.name.removeprefix("checkpoint-") in line
    cli(arguments(activations, run), standalone_mode=False)
    check_same_run(run, alone)
