"""Training on a stream of text: the command line, its resume, evaluation, and what happens while text is waited for."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_line import one_line
from tiny_runs import Windows, config, lines, new_sae, same

from csae.cli import cli
from csae.data import retrying
from csae.data.batches import IndexedBatches, Step
from csae.data.rows import FileRows
from csae.errors import Stopped, UserError
from csae.tensors import load_tensors
from csae.train import Job, train_together

STEPS = 12


def texts(n: int) -> list[str]:
    return [f"{i}: the sluice at the lower mill, the {i * i}th, was opened on morning {i % 7}." for i in range(n)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, start in (("a.jsonl", 0), ("b.jsonl", 300)):
        rows = [json.dumps({"text": text}) for text in texts(600)[start : start + 300]]
        (folder / name).write_text("\n".join(rows) + "\n")
    return folder


def csae(*args: object) -> None:
    cli([str(arg) for arg in args], standalone_mode=False)


def train_on(dataset: Path, model: Path, run: Path, *more: object) -> Path:
    how = ["--arch", "topk", "--d-sae", 24, "--k", 2, "--batch-windows", 2, "--checkpoint-every", 4, "--log-every", 1]
    size = ["--n-ctx", 16, "--tokens", STEPS * 2 * 16, "--shuffle-buffer", 8, "--device", "cpu", "--workers", 0]
    csae("train", "-o", run, "--model", model, "--layer", 2, "--dataset", dataset, *how, *size, *more)
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / "model.safetensors")


def test_the_command_line(dataset: Path, tiny_model_path: Path, tmp_path: Path, capsys: Any) -> None:
    run = train_on(dataset, tiny_model_path, tmp_path / "run")
    job = json.loads((run / "run.json").read_text())
    assert job["origin"]["stream"] is True
    assert job["origin"]["dataset"] == str(dataset)
    assert job["origin"]["held_out_windows"] == 1
    assert job["data"]["stream"] is True
    assert job["n_windows"] is None
    assert len(lines(run)) == STEPS
    capsys.readouterr()
    csae("eval", run, "--device", "cpu")
    found = json.loads((run / "eval.json").read_text())
    assert found["which"] == "held out"
    assert found["trained_windows"] == 0
    train_on(dataset, tiny_model_path, run)  # it is done
    with pytest.raises(UserError, match="holds another run"):
        train_on(dataset, tiny_model_path, run, "--shuffle-buffer", 9)


def test_a_stopped_run_goes_on_with_the_same_bits(
    dataset: Path, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = "--selection", "topk"  # nothing is read again at the end, to find a threshold
    unbroken = train_on(dataset, tiny_model_path, tmp_path / "unbroken", "--workers", 1, *each)
    from csae.data.activations import ModelActivations

    batches, count = ModelActivations.batches, 0

    def interrupted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(self, *args)

    monkeypatch.setattr(ModelActivations, "batches", interrupted)
    with pytest.raises(Stopped):
        train_on(dataset, tiny_model_path, tmp_path / "run", *each)
    run = train_on(dataset, tiny_model_path, tmp_path / "run", *each)
    assert count == STEPS
    assert all(torch.equal(tensor, weights(unbroken)[name]) for name, tensor in weights(run).items())
    assert (run / "windows.bin").read_bytes() == (unbroken / "windows.bin").read_bytes()


def test_a_connection_that_stays_lost_leaves_a_checkpoint(
    dataset: Path, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)
    monkeypatch.setattr("csae.data.rows.ROWS_AT_ONCE", 4)
    monkeypatch.setattr("csae.data.raw_text.MEASURED", 2)
    unbroken = train_on(dataset, tiny_model_path, tmp_path / "unbroken")
    read, down = FileRows.read, True

    def shaky(self: Any, position: Any, columns: Any) -> Any:
        for chunk in read(self, position, columns):
            if down and chunk.first > 8:
                raise ConnectionError("reset by peer")
            yield chunk

    monkeypatch.setattr(FileRows, "read", shaky)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"out of reach .* the same command goes on from the checkpoint") as error:
        train_on(dataset, tiny_model_path, run)
    one_line(error)
    assert capsys.readouterr().err.count("trying again in") == retrying.TRIES
    (checkpoint,) = run.glob("checkpoint-*")
    assert int(checkpoint.name.rpartition("-")[2]) == len(lines(run)) > 0
    down = False
    train_on(dataset, tiny_model_path, run)
    assert all(torch.equal(tensor, weights(unbroken)[name]) for name, tensor in weights(run).items())


def test_while_data_is_waited_for_there_is_a_checkpoint(tmp_path: Path) -> None:
    whole = new_sae("topk")
    train_together([Job(whole, tmp_path / "whole", config())], IndexedBatches(Windows(), range(12), config()))

    class Waits(IndexedBatches):
        def start(self, step: int, state: Any = None) -> Iterator[Step]:
            for number, found in enumerate(super().start(step, state), start=step):
                if number == 4:
                    for _ in range(3):
                        yield Step({}, None, "nothing yet")
                        assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
                yield found

    run = tmp_path / "run"
    sae = new_sae("topk")
    train_together([Job(sae, run, config())], Waits(Windows(), range(12), config()))
    assert same(sae, whole)
    assert len(lines(run)) == len(lines(tmp_path / "whole"))


def test_ctrl_c_is_heard_while_data_is_waited_for(tmp_path: Path) -> None:
    class Waits(IndexedBatches):
        def start(self, step: int, state: Any = None) -> Iterator[Step]:
            for number, found in enumerate(super().start(step, state), start=step):
                while number == 4:
                    os.kill(os.getpid(), signal.SIGINT)
                    yield Step({}, None, "nothing yet")
                yield found

    with pytest.raises(Stopped, match="stopped after step 4 of"):
        train_together([Job(new_sae("topk"), tmp_path / "run", config())], Waits(Windows(), range(12), config()))
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
