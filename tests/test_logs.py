"""Metrics sent to wandb, trackio and TensorBoard: by fakes, and by the packages where they are installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import json
import os
import signal
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tiny_runs import Windows, config, lines, new_sae

from csae import logs
from csae.data.batches import IndexedBatches
from csae.errors import Stopped, UserError
from csae.logs import LOGS, check_logs, open_logs
from csae.train import train, train_together
from csae.training import Job

JOB = {"sae": {"arch": "topk", "k": 3}, "train": {"lr": 1e-3, "steps": 6}, "origin": None}


def installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")


def line(step: int, loss: float | None = 0.5) -> dict:
    return {"step": step, "tokens": 10 * (step + 1), "loss": loss, "fvu": loss}


class Logged:
    """What a fake package notes of one run."""

    def __init__(self, given: dict, step: int = 0) -> None:
        self.given, self.step, self.lines, self.ended = given, step, [], []

    def log(self, metrics: dict, step: int) -> None:
        self.lines.append((step, metrics))
        self.step = step

    def finish(self, exit_code: int | None = None) -> None:
        self.ended.append(exit_code)


class Fakes:
    """In place of wandb and trackio: the runs that they were asked for, and the step at which a new one begins."""

    def __init__(self) -> None:
        self.runs: list[Logged] = []
        self.step = 0

    def module(self, name: str) -> types.ModuleType:
        """A call of its init is checked with the real signature, where there is a real package."""
        signature = inspect.signature(importlib.import_module(name).init) if installed(name) else None

        def init(**given: object) -> Logged:
            if signature is not None:
                signature.bind(**given)
            self.runs.append(Logged(given, self.step))
            return self.runs[-1]

        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a test")
        module.init, module.Settings = init, dict  # type: ignore[attr-defined]
        return module


@pytest.fixture
def fake(monkeypatch):
    for variable in ("WANDB_PROJECT", "WANDB_DIR", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    fakes = Fakes()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fakes.module(name))
    return fakes


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_line_is_logged_at_its_step_without_nulls(fake, tmp_path, name):
    with open_logs([name], tmp_path, JOB) as (log,):
        log(line(0))
        log(line(7, None))
    (run,) = fake.runs
    assert run.lines == [(0, {"tokens": 10, "loss": 0.5, "fvu": 0.5}), (7, {"tokens": 80})]
    assert run.given["project"] == "csae"
    assert run.given["config"] == JOB
    assert run.given["name"].startswith(tmp_path.name)
    assert len(run.ended) == 1


def test_a_run_that_goes_on_is_logged_where_it_was(fake, tmp_path):
    for _ in range(2):
        with open_logs(["wandb", "trackio"], tmp_path, JOB):
            pass
    first, second = fake.runs[:2], fake.runs[2:]
    assert first[0].given["id"] == second[0].given["id"]
    assert second[0].given["resume"] == "allow"
    assert first[1].given["name"] == second[1].given["name"]
    assert [first[1].given["resume"], second[1].given["resume"]] == ["never", "allow"]


def test_two_runs_of_one_name_are_two(fake, tmp_path):
    for parent in ("one", "other"):
        (tmp_path / parent / "run").mkdir(parents=True)
        with open_logs(["wandb", "trackio"], tmp_path / parent / "run", JOB):
            pass
    assert fake.runs[0].given["id"] != fake.runs[2].given["id"]
    assert fake.runs[1].given["name"] != fake.runs[3].given["name"]
    assert fake.runs[3].given["resume"] == "never"


def test_steps_that_wandb_has_are_not_sent_again(fake, tmp_path):
    fake.step = 5
    with open_logs(["wandb"], tmp_path, JOB) as (log,):
        for step in (3, 4, 5, 6):
            log(line(step))
    assert [step for step, _ in fake.runs[0].lines] == [5, 6]


def test_an_error_ends_the_run_as_failed(fake, tmp_path):
    with pytest.raises(KeyError), open_logs(["wandb"], tmp_path, JOB):
        raise KeyError
    assert fake.runs[0].ended == [1]


def test_a_log_that_fails_is_said_once_and_left_alone(fake, tmp_path, capsys):
    with open_logs(["wandb", "trackio"], tmp_path, JOB) as both:
        fake.runs[0].log = None  # its call raises TypeError
        for step in range(3):
            for log in both:
                log(line(step))
    assert capsys.readouterr().err.count("--log wandb: ") == 1
    assert len(fake.runs[1].lines) == 3


@pytest.mark.parametrize("how", ["network", "disk", "at its end"])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_training_goes_on_where_a_log_fails_midway(fake, tmp_path, capsys, name, how):
    class Failing(Logged):
        def log(self, metrics, step):
            super().log(metrics, step)
            if step >= 3 and how != "at its end":
                raise ConnectionError("no route") if how == "network" else OSError(28, "No space left on device")

        def finish(self, exit_code=None):
            super().finish(exit_code)
            raise ConnectionError("no route")

    def init(**given):
        fake.runs.append(Failing(given))
        return fake.runs[-1]

    train(new_sae("topk"), Windows(), range(12), tmp_path / "quiet", config(log_every=1))
    capsys.readouterr()
    sys.modules[name].init = init
    train(new_sae("topk"), Windows(), range(12), tmp_path / "run", config(log_every=1), logs=[name])
    said = [of for of in capsys.readouterr().err.splitlines() if "--log" in of]
    reason = "No space left on device" if how == "disk" else "no route"
    assert len(said) == 1
    assert reason in said[0]
    what = "its last lines may be missing there" if how == "at its end" else "training goes on, and is logged there no"
    assert what in said[0]
    assert "metrics.jsonl has all of it" in said[0]
    assert [of["loss"] for of in lines(tmp_path / "run")] == [of["loss"] for of in lines(tmp_path / "quiet")]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    (run,) = fake.runs
    assert run.ended == [None]
    assert [step for step, _ in run.lines] == list(range(11 if how == "at its end" else 4))


def test_a_log_that_cannot_end_hides_no_error(fake, tmp_path, capsys):
    def refuse(exit_code=None):
        raise ConnectionError("no route")

    def fail():
        with open_logs(["wandb", "trackio"], tmp_path, JOB):
            for run in fake.runs:
                run.finish = refuse
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err.count("no route") == 2


def test_what_cannot_start_is_one_line(fake, tmp_path, monkeypatch):
    def refuse(**given):
        raise RuntimeError("No API key configured.\nSecond line")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"--log wandb: it can't start \(No API key configured\).*WANDB_MODE=offline"):
        open_logs(["wandb"], tmp_path, JOB).__enter__()
    assert not (tmp_path / "logs.json").exists()


def test_damaged_id(fake, tmp_path):
    (tmp_path / "logs.json").write_text('{"id": 3}')
    with pytest.raises(UserError, match=r"logs\.json: it has no id"):
        open_logs(["wandb"], tmp_path, JOB).__enter__()


def test_another_name_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"--log: given 'mlflow'; needed one of wandb, trackio, tensorboard"):
        check_logs(["mlflow"])
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    for name in LOGS:
        with pytest.raises(UserError, match=rf"--log {name}: .*pip install 'contextual-sae\[{name}\]'"):
            check_logs([name])


def test_a_folder_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="not installed"):
        check_logs(["wandb"])


def test_no_logs(tmp_path):
    with open_logs([], tmp_path, JOB) as none:
        assert none == []
    assert not list(tmp_path.iterdir())


def test_training_logs_the_lines_of_its_metrics(fake, tmp_path):
    train(new_sae("topk"), Windows(), range(12), tmp_path / "run", config(log_every=2), logs=["wandb", "trackio"])
    metrics = [
        (of["step"], {name: value for name, value in of.items() if name != "step" and value is not None})
        for of in lines(tmp_path / "run")
    ]
    assert len(metrics) == 6
    for run in fake.runs:
        assert run.lines == metrics
        assert run.given["config"]["train"] == json.loads((tmp_path / "run" / "run.json").read_text())["train"]
        assert len(run.ended) == 1


def test_training_that_was_stopped_goes_on_in_its_logs(fake, tmp_path):
    stopping = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None)
    with pytest.raises(Stopped):
        train(new_sae("topk"), stopping, range(12), tmp_path / "run", config(log_every=1), logs=["wandb"])
    train(new_sae("topk"), Windows(), range(12), tmp_path / "run", config(log_every=1), logs=["wandb"])
    first, second = fake.runs
    assert first.given["id"] == second.given["id"]
    assert [step for step, _ in first.lines + second.lines] == list(range(11))
    assert (first.ended, second.ended) == ([1], [None])


def test_saes_that_train_together_are_several_runs(fake, tmp_path):
    jobs = [Job(new_sae("topk"), tmp_path / name, config(log_every=5), logs=["wandb"]) for name in "ab"]
    train_together(jobs, IndexedBatches(Windows(), range(12), config()))
    assert [run.given["name"] for run in fake.runs] == ["a", "b"]
    assert len({run.given["id"] for run in fake.runs}) == 2
    assert [step for step, _ in fake.runs[0].lines] == [step for step, _ in fake.runs[1].lines] == [4, 9, 10]


def both_runs(name: str, folder: Path, **environment: str) -> None:
    """Two runs at once, and the first goes on from step 2, as after a kill at step 4."""
    script = f"""
from pathlib import Path
from csae.logs import open_logs
def line(step, loss): return {{"step": step, "tokens": 10 * (step + 1), "loss": loss, "gap": None}}
a, b = Path("runs/a"), Path("runs/b")
for run in (a, b): run.mkdir(parents=True)
with open_logs([{name!r}], a, {JOB!r}) as (log_a,), open_logs([{name!r}], b, {JOB!r}) as (log_b,):
    for step in range(4):
        log_a(line(step, 1 / (step + 1)))
        log_b(line(step, 2 / (step + 1)))
with open_logs([{name!r}], a, {JOB!r}) as (log_a,):
    for step in range(2, 6):
        log_a(line(step, 1 / (step + 1)))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(logs.__file__).parents[1])} | environment
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@needs("tensorboard")
@pytest.mark.slow
def test_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    both_runs("tensorboard", tmp_path)
    found = {}
    for name in "ab":
        found[name] = EventAccumulator(str(tmp_path / "runs" / name))
        found[name].Reload()
        assert sorted(found[name].Tags()["scalars"]) == ["loss", "tokens"]
    assert [(of.step, round(of.value * (of.step + 1), 5)) for of in found["a"].Scalars("loss")] == [
        (step, 1) for step in range(6)
    ]
    assert [round(of.value * (of.step + 1), 5) for of in found["b"].Scalars("loss")] == [2] * 4
    text = found["a"].Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.strip("`").removeprefix("json")) == JOB


@needs("trackio")
@pytest.mark.slow
def test_in_trackio(tmp_path):
    both_runs("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "kept"), TRACKIO_PROJECT="mine")
    with sqlite3.connect(tmp_path / "kept" / "mine.db") as stored:
        rows = stored.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = stored.execute("select run_name, config from configs").fetchall()
    by_run = {name[0]: [(step, json.loads(of)) for run, step, of in rows if run == name] for name, *_ in configs}
    assert [step for step, _ in by_run["a"]] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert by_run["a"][-1][1] == {"tokens": 60, "loss": 1 / 6}
    assert [of["loss"] for _, of in by_run["b"]] == [2, 1, 2 / 3, 0.5]
    assert len(configs) == 2
    assert json.loads(configs[0][1])["sae"] == JOB["sae"]


@needs("wandb")
@pytest.mark.slow
def test_in_wandb_offline(tmp_path):
    both_runs("wandb", tmp_path, WANDB_MODE="offline")
    found = {name: sorted((tmp_path / "runs" / name / "wandb").glob("offline-run-*/run-*.wandb")) for name in "ab"}
    assert [len(files) for files in found.values()] == [2, 1]
    (id_a,) = {file.name for file in found["a"]}  # the same run, in two parts
    assert id_a != found["b"][0].name
    assert id_a == f"run-{json.loads((tmp_path / 'runs' / 'a' / 'logs.json').read_text())['id']}.wandb"
    content = found["a"][1].read_bytes()
    assert b"tokens" in content
    assert b"loss" in content
    assert b"arch" in content
