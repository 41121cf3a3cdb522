"""A run removes what it left itself, and keeps what a person put there."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import Windows, config, edit, everything, finish, new_sae, refused, same, stopped

from csae.checkpoint import load_sae
from csae.errors import UserError
from csae.train import train


def test_what_a_person_put_into_a_run_is_kept(tmp_path, capsys):
    run, other = stopped(tmp_path / "run"), stopped(tmp_path / "other", at=2, seed=7)
    mine = run / "checkpoint-4"
    for name in ("checkpoint-4-keep", "checkpoint-04", "checkpoint-٣", "checkpoint-"):
        shutil.copytree(mine, run / name)
        (run / name / "notes.txt").write_text("the good one")
    (run / "checkpoint-notes.txt").write_text("notes")
    (run / "checkpoint-0").write_text("a file")
    (tmp_path / "linked").mkdir()
    shutil.copytree(mine, tmp_path / "linked", dirs_exist_ok=True)
    (run / "checkpoint-1").symlink_to(tmp_path / "linked")
    shutil.copytree(other / "checkpoint-2", run / "checkpoint-2")  # of another run
    shutil.copytree(mine, run / "checkpoint-3")  # a copy: its step is another
    (run / ".notes.tmp").write_text("mine")
    (run / ".checkpoint-1.tmp").mkdir()
    (run / ".checkpoint-1.tmp" / "thesis.tex").write_text("mine")
    (run / "README.md").write_text("mine\n")
    before = everything(run)
    finish(run)
    after = everything(run)
    for name in before:
        if name.split("/")[0] not in ("checkpoint-4", "metrics.jsonl", "windows.bin"):
            assert after[name] == before[name], name
    assert "checkpoint-4" not in after
    assert (tmp_path / "linked" / "model.safetensors").is_file()
    said = capsys.readouterr().err
    for name, reason in {
        "checkpoint-0": "it is a file",
        "checkpoint-1": "it is a link",
        "checkpoint-2": "its training.json is of another checkpoint",
        "checkpoint-3": "its training.json is of another checkpoint",
    }.items():
        assert f"{run}/{name}: kept: {reason}\n" in said


@pytest.mark.parametrize("added", ["notes.txt", "a folder", "a link", "a file less"])
def test_a_checkpoint_that_a_person_changed_is_kept_and_said_so(added, tmp_path, capsys):
    run = stopped(tmp_path)
    folder = run / "checkpoint-4"
    if added == "notes.txt":
        (folder / "notes.txt").write_text("the good one")
    elif added == "a folder":
        (folder / "plots").mkdir()
    elif added == "a link":
        shutil.move(folder / "model.safetensors", tmp_path / "elsewhere")
        (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "README.md").unlink()
    before = everything(folder)
    whole = finish(run)
    assert everything(folder) == before
    assert f"{folder}: kept: " in capsys.readouterr().err
    assert same(whole, load_sae(run))


@pytest.mark.parametrize("of", ["the run", "an earlier version"])
def test_what_a_kill_left_before_the_cleaning_is_removed_at_the_next_start(of, tmp_path):
    run = stopped(tmp_path / "run")
    shutil.copytree(run / "checkpoint-4", tmp_path / "kept")
    finish(run)
    before = sorted(path.name for path in run.iterdir())
    shutil.copytree(tmp_path / "kept", run / "checkpoint-4")
    if of == "an earlier version":
        edit(run / "checkpoint-4" / "training.json", run="gone", sha256="gone")
    shutil.copytree(tmp_path / "kept", run / ".checkpoint-3.tmp")  # a cleaning that was cut short
    source = Windows()
    train(new_sae(), source, range(12), run, config())
    assert sorted(path.name for path in run.iterdir()) == before
    assert source.reads == 0


def test_a_cleaning_that_fails_is_a_line_and_not_the_end(tmp_path, monkeypatch, capsys):
    run = stopped(tmp_path)
    rename = os.rename

    def fails(one, other):
        if Path(one).name == "checkpoint-4":
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(one, other)

    monkeypatch.setattr(os, "rename", fails)
    sae = finish(run)
    assert "checkpoint-4: kept: no permission" in capsys.readouterr().err
    assert same(sae, load_sae(run))


def test_a_damaged_result_keeps_its_checkpoint(tmp_path):
    run = stopped(tmp_path / "run")
    shutil.copytree(run / "checkpoint-4", tmp_path / "kept")
    finish(run)
    shutil.copytree(tmp_path / "kept", run / "checkpoint-4")
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "model.safetensors").write_bytes(content)
    assert "checksum" in refused(run)[0]
    assert (run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_in_the_way_of_a_checkpoint_is_said_at_once(kind, tmp_path):
    run = stopped(tmp_path)
    if kind == "file":
        (run / "checkpoint-9").write_text("notes")
    else:
        (run / "checkpoint-9").symlink_to(tmp_path / "nowhere")
    source = Windows()
    with pytest.raises(UserError, match="checkpoint-9: in the way of a checkpoint of this run: move it elsewhere"):
        train(new_sae(), source, range(12), run, config())
    assert source.reads == 0


def test_leftovers_are_removed_where_they_are_ours(tmp_path):
    run = stopped(tmp_path / "run")
    ours = [".run.json.1.tmp", ".config.json.77.tmp", ".model.safetensors.8.tmp", ".README.md.8.tmp"]
    theirs = [".notes.tmp", ".config.json.tmp", ".thesis.8.tmp", ".eval.json.8.tmp", "a.tmp"]
    for name in ours + theirs:
        (run / name).write_text("half")
    (run / ".model.safetensors.9.tmp.d").mkdir()
    (run / ".model.safetensors.9.tmp.d" / ".tmpAbC123").write_text("half")
    (tmp_path / "target").write_text("mine")
    (run / ".config.json.5.tmp").symlink_to(tmp_path / "target")
    shutil.copytree(run / "checkpoint-4", run / ".checkpoint-9.tmp")
    finish(run)
    hidden = {path.name for path in run.iterdir() if path.name.startswith(".") or path.name == "a.tmp"}
    assert hidden == {*theirs, ".config.json.5.tmp"}
    assert (tmp_path / "target").read_text() == "mine"
