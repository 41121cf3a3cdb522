"""A finished run is extended: more steps, from its trained SAE, however often that is stopped or killed."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from tiny_runs import Windows, config, edit, lines, new_sae, same

from csae.checkpoint import load_sae
from csae.data.batches import batch_of
from csae.data.seen import read_seen
from csae.errors import Stopped, UserError
from csae.step import learning_rate
from csae.train import train


def trained(run, source=None, kind="topk", **changed):
    sae = new_sae(kind)
    train(sae, source or Windows(), range(12), run, config(**changed))
    return sae


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_finished_run_goes_on_with_more_steps(log_every, tmp_path):
    first = trained(tmp_path, log_every=log_every)
    before = lines(tmp_path)
    source = Windows()
    longer = trained(tmp_path, source, steps=20, log_every=log_every)
    assert source.reads == 9
    assert not same(first, longer)
    assert same(longer, load_sae(tmp_path))
    figures = lines(tmp_path)
    assert figures[: len(before)] == before
    steps = [line["step"] for line in figures]
    assert steps == (list(range(20)) if log_every == 1 else [3, 7, 10, 11, 15, 19])
    assert figures[-1]["tokens"] == 20 * 21
    assert figures[-1]["fvu"] < figures[0]["fvu"]
    job = json.loads((tmp_path / "run.json").read_text())
    assert (job["train"]["steps"], job["train"]["start"]) == (20, 11)
    assert not list(tmp_path.glob("checkpoint-*"))
    # It is a finished run like any other.
    source = Windows()
    assert same(trained(tmp_path, source, steps=20, log_every=log_every), longer)
    assert source.reads == 0
    with pytest.raises(UserError, match=r"--tokens: given 11 steps \(231 tokens\), the run has 20 steps"):
        trained(tmp_path, log_every=log_every)
    again = trained(tmp_path, steps=23, log_every=log_every)
    assert not same(again, longer)
    assert lines(tmp_path)[: len(figures)] == figures


def test_the_learning_rate_rises_and_falls_again():
    cfg = config(steps=30, start=20, lr=1.0, warmup=0.2, decay=0.2)
    rates = [learning_rate(step, cfg) for step in range(20, 30)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5])


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_stopped_on_the_way_it_ends_at_the_same_bits(stop_at, tmp_path):
    for name in ("whole", "parts"):
        trained(tmp_path / name, kind="contextual")
    whole = trained(tmp_path / "whole", kind="contextual", steps=18)
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == stop_at else None)
    with pytest.raises(Stopped, match=f"stopped after step {11 + stop_at} of 18"):
        trained(tmp_path / "parts", source, kind="contextual", steps=18)
    assert same(whole, trained(tmp_path / "parts", kind="contextual", steps=18))
    for file in ("run.json", "windows.bin"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


@pytest.mark.slow
def test_killed_at_any_call_that_changes_the_disk_it_ends_at_the_same_bits(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    trained(tmp_path / "whole")
    whole = trained(tmp_path / "whole", steps=14)
    at, names = 1, ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")
    while True:
        run, calls = tmp_path / str(at), 0
        trained(run)

        def call(*given, real, **named):
            nonlocal calls
            calls += 1
            if calls >= at:  # noqa: B023 - a killed process cleans nothing up
                raise Killed
            return real(*given, **named)

        for name in names:
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *given, real=real, **named: call(*given, real=real, **named))
        try:
            trained(run, steps=14)
            killed = False
        except Killed:
            killed = True
        monkeypatch.undo()
        if not killed:
            break
        load_sae(run)
        assert same(whole, trained(run, steps=14)), at
        left = sorted(path.name for path in run.iterdir())
        assert left == sorted(path.name for path in (tmp_path / "whole").iterdir()), at
        at += 1
    assert at > 20


def test_the_windows_of_both_parts_are_recorded(tmp_path):
    class Told(Windows):
        def read(self, window_indices):
            tokens = torch.tensor(list(window_indices)).unsqueeze(1).expand(-1, 7).contiguous()
            return super().read(window_indices)._replace(tokens=tokens)

    trained(tmp_path / "two", Told(), steps=2)
    assert len(read_seen(tmp_path / "two").hashes) == 6
    trained(tmp_path / "two", Told(), steps=4)
    trained(tmp_path / "one", Told(), steps=4)
    assert np.array_equal(read_seen(tmp_path / "two").hashes, read_seen(tmp_path / "one").hashes)
    assert len({window for step in range(4) for window in batch_of(range(12), step, config())}) == 12


def test_a_run_that_has_not_ended_is_not_extended(tmp_path):
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None)
    with pytest.raises(Stopped):
        trained(tmp_path, source)
    with pytest.raises(UserError, match=r"--tokens: given 20 steps .* \(a run that has ended can be extended"):
        trained(tmp_path, steps=20)


def test_extended_with_other_options_it_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match=r"\(--lr: given 0.5, the run has 0.01; --tokens: given 20 steps"):
        trained(tmp_path, steps=20, lr=0.5)
    trained(tmp_path)  # it is as it was


def test_a_run_of_an_earlier_version_goes_on_as_it_was(tmp_path):
    """Its run.json says neither how often it logs nor where it started."""
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None)
    with pytest.raises(Stopped):
        trained(tmp_path / "old", source)
    whole = trained(tmp_path / "whole")
    job = json.loads((tmp_path / "old" / "run.json").read_text())
    for name in ("log_every", "start"):
        del job["train"][name]
    (tmp_path / "old" / "run.json").write_text(json.dumps(job))
    edit(tmp_path / "old" / "checkpoint-4" / "training.json", run="gone")
    assert same(whole, trained(tmp_path / "old", log_every=10))
    assert [line["step"] for line in lines(tmp_path / "old")] == list(range(11))
    assert json.loads((tmp_path / "old" / "run.json").read_text()) == job
    longer = trained(tmp_path / "old", log_every=1, steps=15)
    assert same(longer, trained(tmp_path / "whole", steps=15))
