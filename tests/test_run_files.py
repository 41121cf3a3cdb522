"""The files of a run are used only if they agree with each other."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import edit, finish, lines, refused, same, stopped, write

from csae.checkpoint import load_sae
from csae.errors import UserError
from csae.run import read_origin, read_trained_on

DAMAGED = {
    "a list": "[]",
    "a number": "3",
    "empty": "",
    "cut short": '{"step": ',
    "NaN": '{"step": NaN, "sae": {}, "train": {}}',
    "nested deeply": '{"step": ' + "[" * 100_000,
    "5,000 digits": '{"step": ' + "9" * 5000 + ', "sae": {}, "train": {}}',
    "no UTF-8": b'{"step": "\xff"}',
}


@pytest.mark.parametrize("changed", [{"k": 1}, {"query": "gone"}, {"dead_after": 7}])
@pytest.mark.parametrize("weights", ["as saved", "of an earlier version"])
def test_config_json_is_compared_with_run_json(changed, weights, tmp_path):
    finish(tmp_path)
    edit(tmp_path / "config.json", **changed)
    if weights != "as saved":
        save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    for message in refused(tmp_path):
        assert "config.json: not as run.json says" in message
        assert next(iter(changed)) in message


@pytest.mark.parametrize("changed", [{"k": 1}, {"query": "gone"}])
def test_config_json_of_a_checkpoint_is_compared_with_run_json(changed, tmp_path):
    run = stopped(tmp_path)
    edit(run / "checkpoint-4" / "config.json", **changed)
    for message in refused(run):
        assert f"{next(iter(changed))} is " in message


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("file", ["run.json", "config.json", "checkpoint-4/training.json", "checkpoint-4/config.json"])
def test_damaged_json_is_one_line(file, content, tmp_path):
    if file == "config.json":
        finish(tmp_path)
    else:
        stopped(tmp_path)
    write(tmp_path / file, content)
    calls = (finish, load_sae, read_origin, read_trained_on) if file == "run.json" else (finish, load_sae)
    for message in refused(tmp_path, *calls):
        assert file.rpartition("/")[2] in message


@pytest.mark.parametrize(
    "changed",
    [
        {"sae": "gone"},
        {"sae": [1]},
        {"train": None},
        {"data": 3},
        {"n_ctx": "256"},
        {"n_windows": True},
        {"origin": [1]},
        {"origin": {"layer": "3"}},
        {"origin": {"n_ctx": True}},
        {"origin": {"held_out": "a"}},
        {"origin": {"model": 3}},
    ],
)
def test_a_run_json_with_other_types_is_one_line(changed, tmp_path):
    stopped(tmp_path)
    edit(tmp_path / "run.json", **changed)
    for message in refused(tmp_path, finish, load_sae, read_origin, read_trained_on):
        assert "run.json" in message


def test_what_a_source_says_of_itself_may_be_anything(tmp_path):
    stopped(tmp_path)
    edit(tmp_path / "run.json", data={"layer": "blocks.3", "n_ctx": 7, "model": None}, origin={"model": "m"})
    assert read_trained_on(tmp_path) == {"n_ctx": 7, "model": "m"}


@pytest.mark.parametrize("step", ["8", True, 4.5, None, 3, 10**12, -4, [4], "gone"])
def test_the_step_of_a_checkpoint_is_that_of_its_folder(step, tmp_path):
    run = stopped(tmp_path)
    edit(run / "checkpoint-4" / "training.json", step=step)
    for message in refused(run):
        assert "checkpoint-4: not a whole checkpoint of this run (training.json says step" in message


def test_more_steps_than_the_run_has_are_not_believed(tmp_path):
    run = stopped(tmp_path)
    os.rename(run / "checkpoint-4", run / f"checkpoint-{10**12}")
    edit(run / f"checkpoint-{10**12}" / "training.json", step=10**12)
    for message in refused(run):
        assert "the run has 11 steps" in message


def test_a_number_beyond_all_steps_is_no_checkpoint(tmp_path):
    run = stopped(tmp_path)
    (run / f"checkpoint-{'9' * 200}").mkdir()
    (run / "checkpoint-²").mkdir()
    finish(run)
    assert (run / "checkpoint-²").is_dir()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run, other = stopped(tmp_path / "run"), stopped(tmp_path / "other", at=6, seed=1)
    shutil.copytree(other / "checkpoint-6", run / "checkpoint-6")
    for message in refused(run):
        assert "checkpoint-6: not a whole checkpoint of this run (training.json names another run" in message


def test_a_checkpoint_that_was_moved_and_linked_is_gone_on_from(tmp_path, capsys):
    whole = finish(tmp_path / "whole")
    run = stopped(tmp_path / "run")
    shutil.move(run / "checkpoint-4", tmp_path / "big-disk")
    (run / "checkpoint-4").symlink_to(tmp_path / "big-disk")
    assert same(whole, finish(run))
    assert (tmp_path / "big-disk" / "training.json").is_file()
    assert (run / "checkpoint-4").is_symlink()
    assert "checkpoint-4: kept: it is a link" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_in_a_checkpoint_is_refused(file, tmp_path):
    run = stopped(tmp_path)
    content = bytearray((run / "checkpoint-4" / file).read_bytes())
    content[-2] ^= 64
    (run / "checkpoint-4" / file).write_bytes(content)
    assert "checkpoint-4: not a whole checkpoint of this run" in refused(run, finish)[0]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_file_of_another_checkpoint_of_the_run_is_refused(file, tmp_path):
    run = stopped(tmp_path / "run")
    shutil.copytree(run, tmp_path / "other")
    other = stopped(tmp_path / "other", at=2)
    assert (other / "checkpoint-6").is_dir()
    shutil.copy(other / "checkpoint-6" / file, run / "checkpoint-4" / file)
    assert f"{file} is not the file that training.json was written with" in refused(run, finish)[0]


def test_an_optimizer_of_other_sizes_is_refused_before_it_is_read(tmp_path):
    run = stopped(tmp_path)
    file = run / "checkpoint-4" / "optimizer.safetensors"
    save_file(load_file(file) | {"W_enc.exp_avg": torch.zeros(2, 2)}, file)
    assert "W_enc.exp_avg is (2, 2); needed (12, 6)" in refused(run, finish)[0]


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(tmp_path):
    whole = finish(tmp_path / "whole")
    run = stopped(tmp_path / "run")
    edit(run / "checkpoint-4" / "training.json", run="gone", sha256="gone")
    for name in ("model.safetensors", "optimizer.safetensors"):
        save_file(load_file(run / "checkpoint-4" / name), run / "checkpoint-4" / name)
    assert same(whole, finish(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:1] + text[2:], "line 2: it is of step 2; needed step 1"),
        (lambda text: [text[0], *text], "line 2: it is of step 0; needed step 1"),
        (lambda text: text[:2], "line 3: there is no whole line of step 2"),
        (lambda text: [*text[:3], text[3][:9]], "line 4: there is no whole line of step 3"),
        (lambda text: [*text[:3], text[3].rstrip()], "line 4: there is no whole line of step 3"),
        (lambda text: [text[0], "{}\n", *text[2:]], "line 2: it is of step None; needed step 1"),
        (lambda text: [text[0], '{"step": true}\n', *text[2:]], "line 2: it is of step True; needed step 1"),
        (lambda text: [text[0], "\n", *text[2:]], "line 2: not JSON"),
        (lambda text: [text[0], "[1]\n", *text[2:]], "line 2: given a JSON list"),
        (lambda text: [text[0], "[" * 50_000 + "\n", *text[2:]], "line 2: not JSON"),
        (lambda text: [text[0], '{"step": ' + "1" * 5000 + "}\n", *text[2:]], "line 2: not JSON"),
        (lambda text: [], "line 1: there is no whole line of step 0"),
        (lambda text: ["\0" * 2**20, *text], "line 1: there is no whole line of step 0"),
    ],
    ids=[
        "missing",
        "twice",
        "fewer",
        "torn",
        "no end",
        "no step",
        "true",
        "blank",
        "list",
        "nested",
        "digits",
        "none",
        "endless",
    ],
)
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_metrics_that_are_not_those_of_the_steps_that_were_done_are_refused(state, change, message, tmp_path):
    stopped(tmp_path)
    if state == "finished":
        finish(tmp_path)
    file = tmp_path / "metrics.jsonl"
    text = file.read_text().splitlines(keepends=True)
    file.write_text("".join(change(text[:4])) + "".join(text[4:] if message.startswith("line 2") else []))
    assert message in refused(tmp_path, finish)[0]


def test_metrics_of_a_finished_run_end_with_it(tmp_path):
    finish(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 11}\n')
    assert "metrics.jsonl: it goes on after the last of 11 steps" in refused(tmp_path, finish)[0]
    (tmp_path / "metrics.jsonl").unlink()
    assert "metrics.jsonl: can't be read" in refused(tmp_path, finish)[0]


def test_a_checkpoint_is_never_ahead_of_the_metrics_on_the_disk(tmp_path, monkeypatch):
    fsync, rename, done = os.fsync, os.rename, []

    def synced(file):
        fsync(file)
        done.append(os.readlink(f"/proc/self/fd/{file}"))

    def renamed(one, other):
        if Path(other).name == "checkpoint-3":
            assert str(tmp_path / "run" / "metrics.jsonl") in done
            assert str(tmp_path / "run" / "windows.bin") in done
            assert len(lines(tmp_path / "run")) == 3
            done.append("checkpoint-3")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    finish(tmp_path / "run")
    assert "checkpoint-3" in done


def test_windows_that_are_missing_from_their_list_are_said(tmp_path):
    run = stopped(tmp_path)
    file = run / "windows.bin"
    file.write_bytes(file.read_bytes()[:20])
    assert "windows.bin: it lacks windows" in refused(run, finish)[0]
    file.unlink()
    finish(run)


def test_a_missing_run_among_others_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    finish(tmp_path / "one")
    monkeypatch.setattr("csae.checkpoint._hub_config", None)
    with pytest.raises(UserError, match=r"nope: no such folder; in .* there is one$"):
        load_sae(tmp_path / "nope")
