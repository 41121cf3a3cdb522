"""A training run over several ranks: the same files, to rounding, as in one process, whatever their number."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from tiny_runs import Windows, config, lines, new_sae, timeless

from csae.checkpoint import load_sae
from csae.distributed import sharded
from csae.sae import SAE
from csae.train import train

KINDS = ["topk", "contextual"]
# Sums over ranks are made in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _train(ranks: Any, folder: Path, kind: str, **changed: Any) -> None:
    sae: SAE = new_sae(kind) if ranks is None else sharded(partial(new_sae, kind), ranks)
    train(sae, Windows(), range(12), folder, config(**changed))


def check_same_run(run_folder: Path, expected: Path) -> None:
    """The files of both runs tell of the same training."""
    for file in ("run.json", "windows.bin"):
        assert (run_folder / file).read_bytes() == (expected / file).read_bytes(), file
    found, wanted = lines(run_folder), lines(expected)
    assert len(found) == len(wanted)
    for one, other in zip(map(timeless, found), map(timeless, wanted), strict=True):
        assert one.keys() == other.keys()
        for name, figure in one.items():
            # The gap is a small difference of large numbers.
            assert figure == pytest.approx(other[name], rel=1e-3, abs=1e-3 if name == "gap" else 1e-5), name
    one, other = load_sae(run_folder).state_dict(), load_sae(expected).state_dict()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module", params=KINDS)
def alone(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    _train(None, folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_same_run_as_in_one_process(alone: tuple[str, Path], tmp_path: Path, size: int) -> None:
    kind, expected = alone
    run(size, _train, tmp_path / "run", kind)
    check_same_run(tmp_path / "run", expected)
