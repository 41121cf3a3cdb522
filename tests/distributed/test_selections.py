"""A budget that ranks share, and thresholds that their owners train, through what becomes of a run: with prefixes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import Ranks
from same_runs import check_same_run
from test_failures import _broken_windows, activations, arguments, check, each, ended

from csae.checkpoint import load_sae
from csae.cli import cli

__all__ = ["activations"]  # a fixture

SELECTIONS = ["batch", "jumprelu"]


def selecting(selection: str, activations: Path, out: Path, *more: object) -> list[object]:
    given = arguments(activations, out, "--selection", selection, "--prefixes", "3,7", *more)
    return ["contextual" if word == "topk" else word for word in given]


def command(*given: object) -> None:
    cli([str(of) for of in given], standalone_mode=False)


def check_done(size: int, tmp_path: Path, given: list[object]) -> None:
    with Ranks(size, tmp_path / "said", given) as ranks:
        found = ranks.wait(300)
    assert [of.code for of in found] == [0] * size, found


def _killed_at_7(rank: int) -> None:
    if rank == 1:
        each(7, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS)
def test_killed_and_resumed_on_other_numbers(selection: str, activations: Path, tmp_path: Path) -> None:
    command(*selecting(selection, activations, tmp_path / "alone", "--checkpoint-every", 3))
    given = selecting(selection, activations, tmp_path / "run", "--checkpoint-every", 3)
    found = ended(2, tmp_path, given, _killed_at_7)
    check(found, "rank 1 ended without a word (killed, or out of memory): the same command goes on from what is saved")
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    check_done(3, tmp_path, given)
    check_same_run(tmp_path / "run", tmp_path / "alone", atol=1e-4)
    for size, name in ((1, "alone"), (2, "run")):
        check_done(size, tmp_path, ["eval", tmp_path / name, "--device", "cpu"])
    one, other = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("alone", "run"))
    assert one["selection"] == other["selection"] == selection
    for figure in ("fvu", "l0", "fvu_sweeps"):
        assert other[figure] == pytest.approx(one[figure], rel=1e-2)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_activations_that_are_not_finite_on_one_rank(selection: str, activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, selecting(selection, activations, tmp_path / "run"), _broken_windows)
    if selection == "jumprelu":  # thresholds begin where a sample has k, and the sample shows it
        check(found, "calibrate: the codes of 4 of 336 tokens of the sample hold NaN or Inf")
    else:
        check(found, f"{tmp_path / 'run'}: NaN or Inf in the activations of windows ", failed=1)


def test_ranks_that_select_differently(activations: Path, tmp_path: Path) -> None:
    def given(rank: int) -> Any:
        return selecting(SELECTIONS[rank], activations, tmp_path / "run")

    check(ended(2, tmp_path, given), "--selection: rank 1 was given jumprelu, rank 0 batch; needed the same command")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_begun_with_thresholds_that_were_trained(activations: Path, tmp_path: Path) -> None:
    """A rank without rows must not calibrate, where others have thresholds."""
    command(*selecting("jumprelu", activations, tmp_path / "first"))
    words = arguments(activations, tmp_path / "run", "--init", tmp_path / "first")
    words = [word for at, word in enumerate(words) if "--arch" not in words[max(0, at - 1) : at + 1]]
    for option in ("--d-sae", "--k"):
        at = words.index(option)
        del words[at : at + 2]
    alone = [tmp_path / "alone" if word == tmp_path / "run" else word for word in words]
    command(*alone)
    check_done(5, tmp_path, words)
    check_same_run(tmp_path / "run", tmp_path / "alone", atol=1e-4)
    assert load_sae(tmp_path / "run").threshold.std() > 0
