"""`csae eval` under torchrun: the figures of one process, from a share of the windows on each rank."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run

from csae.contextual_sae import ContextualSAE
from csae.data.activations import Batch, sink_mask
from csae.errors import FailedElsewhere, UserError
from csae.topk_sae import TopKSAE

N, T, D = 100, 6, 8


class Source:
    """Made-up windows; `broken` holds NaN, one is padding."""

    n_windows, n_ctx, d_in = N, T, D

    def __init__(self, broken: int | None = None) -> None:
        acts = torch.randn(N, T, D, generator=torch.Generator().manual_seed(1)) + 30
        acts[7] = 0
        if broken is not None:
            acts[broken] = math.nan
        self.acts = acts

    def read(self, windows: Any) -> Batch:
        acts = self.acts[list(windows)]
        return Batch(acts, sink_mask(acts), torch.zeros(acts.shape[:2], dtype=torch.int64), None)

    def describe(self) -> dict[str, Any]:
        return {}


def _evaluated(ranks: Any, broken: int | None = None) -> Any:
    from csae.evaluate import Subject, evaluate_together

    torch.manual_seed(0)
    saes = [TopKSAE(D, 12, 3), ContextualSAE(D, 12, 3, n_heads=2, d_head=4, d_value=4, d_memory=8)]
    for sae in saes:
        sae.initialise(torch.full([D], 30.0), 1.0)
    source: Any = Source(broken)
    subjects = [Subject(sae, sae.arch) for sae in saes]
    try:
        return evaluate_together(subjects, source, range(N), batch_windows=8, ranks=ranks)
    except (UserError, FailedElsewhere) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("size", [2, 3, 14], ids=["two", "three", "more than batches"])
def test_the_figures_are_those_of_one_process(size: int) -> None:
    (alone,) = run(1, _evaluated)
    found = run(size, _evaluated)
    for of_rank in found:
        for one, other in zip(of_rank, alone, strict=True):
            assert one.keys() == other.keys()
            for name, figure in other.items():
                if isinstance(figure, float) and not name.startswith("tokens_per_s"):
                    assert one[name] == pytest.approx(figure, rel=1e-12), name
                elif not isinstance(figure, float):
                    assert one[name] == figure, name


def test_what_is_wrong_on_one_rank_is_said_once() -> None:
    first, second = run(2, _evaluated, 11)  # in the second batch
    assert second == "UserError: NaN or Inf in the activations of windows 8 to 15: make them again"
    assert first == f"FailedElsewhere: rank 1: {second.removeprefix('UserError: ')}"


def _of_runs(ranks: Any, runs: list[Path]) -> Any:
    from csae.checkpoint import load_sae
    from csae.evaluate_run import evaluate_runs

    return evaluate_runs([(path, load_sae(path)) for path in runs], device="cpu", ranks=ranks)


def test_runs_of_a_language_model(runs: dict[str, Path]) -> None:
    folders = list(runs.values())
    (alone,) = run(1, _of_runs, folders)
    assert {"ce_sae", "loss_recovered"} <= alone[0].keys()
    found = run(2, _of_runs, folders)
    for of_rank in found:
        for one, other in zip(of_rank, alone, strict=True):
            for name, figure in other.items():
                if not name.startswith("tokens_per_s"):
                    expected = pytest.approx(figure, rel=1e-12) if isinstance(figure, float) else figure
                    assert one[name] == expected, name


@pytest.mark.slow
def test_a_run_of_two_ranks_is_evaluated_by_one_and_by_three(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog, and sleeps in the sun. " * 200)
    data = ["--model", str(tiny_model_path), "--text", str(tmp_path / "a.txt"), "--layer", "2", "--n-ctx", "16"]
    size = ["--arch", "topk", "--d-sae", "41", "--k", "4", "--tokens", "2000", "--held-out", "0.3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    folder = tmp_path / "run"
    commands = [
        [*torchrun, "2", "-m", "csae", "train", *data, *size, "--device", "cpu", "-o", str(folder)],
        [sys.executable, "-m", "csae", "eval", "--device", "cpu", str(folder)],
        [*torchrun, "3", "-m", "csae", "eval", "--device", "cpu", str(folder)],
    ]
    figures = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        if "eval" in command:
            assert done.stdout.count("run ") == 1  # one table
            figures.append(json.loads((folder / "eval.json").read_text()))
    alone, by_three = figures
    for name, figure in alone.items():
        if name != "tokens_per_s":
            expected = pytest.approx(figure, rel=1e-12) if isinstance(figure, float) else figure
            assert by_three[name] == expected, name
