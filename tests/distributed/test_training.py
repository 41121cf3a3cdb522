"""A training run over several ranks: the same files, to rounding, as in one process, whatever their number."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import run
from same_runs import check_same_run
from tiny_runs import Windows, config, lines, new_sae

from csae.distributed import sharded
from csae.errors import FailedElsewhere, Stopped, UserError
from csae.run import locked
from csae.sae import SAE
from csae.train import train


def _train(ranks: Any, folder: Path, kind: str, stop_at: int | None = None, **changed: Any) -> str | None:
    """Train, and stop at a step where that is given: the last rank is asked to. What was said then."""
    sae: SAE = new_sae(kind) if ranks is None else sharded(partial(new_sae, kind), ranks)
    is_last = ranks is None or ranks.rank == ranks.size - 1
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if is_last and count == stop_at else None)
    try:
        train(sae, source, range(12), folder, config(**changed))
    except (Stopped, UserError, FailedElsewhere) as error:
        return str(error)
    assert not sae.training
    return None


@pytest.fixture(scope="module", params=["topk", "contextual"])
def alone(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The kind of SAE, and its run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    _train(None, folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_run_as_in_one_process(alone: tuple[str, Path], tmp_path: Path, size: int) -> None:
    kind, expected = alone
    assert run(size, _train, tmp_path / "run", kind) == [None] * size
    check_same_run(tmp_path / "run", expected)
    assert run(size, _train, tmp_path / "run", kind) == [None] * size  # it is done
    assert _train(None, tmp_path / "run", kind) is None


def test_stopped_and_resumed_on_other_numbers_of_ranks(alone: tuple[str, Path], tmp_path: Path) -> None:
    kind, expected = alone
    folder = tmp_path / "run"
    for size, stop_at, done in ((2, 3, 2), (3, 3, 4), (1, 2, 6), (4, 3, 8)):
        said = run(size, _train, folder, kind, stop_at)
        assert said == [f"{folder}: stopped after step {done} of 11; the same command goes on from there"] * size
        assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{done}"]
    assert run(2, _train, folder, kind) == [None] * 2
    check_same_run(folder, expected)


@pytest.mark.parametrize("changed", [{}, {"log_every": 4, "moments": "bfloat16"}])
def test_resumed_on_the_same_number_it_has_the_same_bits(tmp_path: Path, changed: dict[str, Any]) -> None:
    train_it = partial(_train, kind="contextual", **changed)
    run(2, train_it, tmp_path / "whole")
    assert "stopped after step 5" in str(run(2, partial(train_it, stop_at=6), tmp_path / "run")[0])
    run(2, train_it, tmp_path / "run")
    check_same_run(tmp_path / "run", tmp_path / "whole", bits=True)


def test_extended_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    _train(None, tmp_path / "alone", "topk", steps=6)
    _train(None, tmp_path / "alone", "topk", steps=10)
    run(2, partial(_train, steps=6), tmp_path / "run", "topk")
    run(3, partial(_train, steps=10), tmp_path / "run", "topk")
    check_same_run(tmp_path / "run", tmp_path / "alone")


def test_replicas(alone: tuple[str, Path], tmp_path: Path) -> None:
    kind, expected = alone
    run(4, _train, tmp_path / "run", kind, data=2)
    check_same_run(tmp_path / "run", expected)


def test_more_ranks_than_windows(tmp_path: Path) -> None:
    _train(None, tmp_path / "alone", "contextual", batch_windows=2)
    run(4, partial(_train, batch_windows=2), tmp_path / "run", "contextual")
    check_same_run(tmp_path / "run", tmp_path / "alone")


def _refused(ranks: Any, folder: Path) -> list[str | None]:
    """What each rank says of a folder that another process trains, and of one with something else."""
    said = [_train(ranks, folder / "locked", "topk"), _train(ranks, folder / "other", "topk")]
    return [*said, _train(ranks, folder / "earlier", "topk", lr=0.5)]


def test_what_is_refused_in_one_process_is_by_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("not ours")
    _train(None, tmp_path / "earlier", "topk")
    before = lines(tmp_path / "earlier")
    with locked(tmp_path / "locked", {"sae": {}, "train": {}}):
        (tmp_path / "locked" / "run.json").unlink()
        first, second = run(2, _refused, tmp_path)
    for said, other, words in zip(
        first, second, ("another process is training this run", "no run of csae", "--lr: given 0.5"), strict=True
    ):
        assert words in str(said)
        assert str(other) == f"rank 0: {said}"
    assert lines(tmp_path / "earlier") == before
