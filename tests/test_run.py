"""The folder of a run: killed at any moment it goes on, one process trains it, and other content is kept."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_runs import Windows, config, everything, finish, lines, new_sae, refused, same, stopped

from csae.checkpoint import load_sae
from csae.errors import UserError
from csae.run import locked
from csae.train import train

# Kills.

KILLER = textwrap.dedent(
    """
    import os, signal, sys, traceback
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from csae.train import train
    from tiny_runs import Windows, config, lines, new_sae, same

    def forked(do):
        child = os.fork()
        if child == 0:
            try:
                sys.stderr = open(os.devnull, "w")
                do()
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=sys.__stdout__)
                sys.__stdout__.flush()
                os._exit(3)
        return os.waitpid(child, 0)[1]

    def trained(run):
        sae = new_sae()
        train(sae, Windows(), range(12), run, config())
        return sae

    def killed(run, at):
        calls = 0
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "chmod"):
            def call(*arguments, real=getattr(os, name), **named):
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)
            setattr(os, name, call)
        trained(run)

    def check(run):
        assert same(whole, trained(run))
        assert [line["step"] for line in lines(run)] == list(range(11))
        left, wanted = (sorted(path.name for path in folder.iterdir()) for folder in (run, {folder!r} / Path("whole")))
        assert left == wanted, left
        assert (run / "windows.bin").read_bytes() == ({folder!r} / Path("whole") / "windows.bin").read_bytes()

    whole = trained({folder!r} / Path("whole"))
    at, failed = 1, []
    while os.WIFSIGNALED(forked(lambda: killed({folder!r} / Path(str(at)), at))):
        if forked(lambda: check({folder!r} / Path(str(at)))):
            failed.append(at)
        at += 1
    print(f"killed {{at - 1}} times, wrong after {{failed}}")
    """
)


@pytest.mark.slow
def test_killed_before_any_call_that_changes_the_disk_it_ends_at_the_same_bits_and_files(tmp_path):
    """No half-written file is taken for a whole one, no metrics line is missing or twice, and nothing is left over."""
    program = KILLER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    said = run.stdout.splitlines()[-1]
    assert said.endswith("wrong after []"), run.stdout
    assert int(said.split()[1]) > 100


# The lock.

HOLDER = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, {tests!r})
    from csae.train import train
    from tiny_runs import Windows, config, new_sae
    def hold(count):
        if count == 5:
            print("holding", flush=True)
            time.sleep(60)
    train(new_sae(), Windows(hold), range(12), {run!r}, config())
    """
)


def test_a_second_process_gets_one_line_and_a_killed_one_leaves_no_lock(tmp_path):
    run = tmp_path / "run"
    program = HOLDER.format(tests=str(Path(__file__).parent), run=str(run))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "holding\n"
            before = (run / "metrics.jsonl").read_bytes()
            assert "another process is training this run: wait until it is done" in refused(run, finish)[0]
            assert (run / "metrics.jsonl").read_bytes() == before
            load_sae(run)  # what `csae eval` does first
        finally:
            holder.send_signal(signal.SIGKILL)
    assert same(finish(run), finish(tmp_path / "whole"))
    assert [line["step"] for line in lines(run)] == list(range(11))


def test_a_run_that_another_process_finished_is_taken_as_it_is(tmp_path, monkeypatch):
    """The other one ends between the look for a result and the lock."""
    done = finish(tmp_path)
    asked = iter([False])
    is_file = Path.is_file
    monkeypatch.setattr(
        Path, "is_file", lambda path: next(asked, is_file(path)) if path == tmp_path / "config.json" else is_file(path)
    )
    source, again = Windows(), new_sae()
    train(again, source, range(12), tmp_path, config())
    assert source.reads == 0
    assert same(done, again)


def test_without_locks_it_trains_and_says_so(tmp_path, monkeypatch, capsys):
    def none(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("csae.files.fcntl.flock", none)
    finish(tmp_path)
    assert f"{tmp_path}: this file system can't lock it (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["metrics.jsonl", ".run.json.12.tmp", ".model.safetensors.12.tmp.d"])
def test_what_a_kill_leaves_before_run_json_is_no_other_content(left, tmp_path):
    (tmp_path / left).mkdir() if left.endswith(".d") else (tmp_path / left).touch()
    finish(tmp_path)
    assert len(lines(tmp_path)) == 11


def test_metrics_without_a_run_are_other_content(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert "not empty, and no run of csae" in refused(tmp_path, finish)[0]
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_a_link_to_a_folder_is_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    stopped(tmp_path / "run")
    finish(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()


@pytest.mark.parametrize("what", ["a file", "a dangling link", "a link to a file", "below a file"])
def test_what_can_be_no_folder_is_one_line(what, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "file").write_text("mine")
    if what == "a file":
        run.write_text("mine")
    elif what == "a dangling link":
        run.symlink_to(tmp_path / "nowhere")
    elif what == "a link to a file":
        run.symlink_to(tmp_path / "file")
    else:
        run = tmp_path / "file" / "run"
    before = everything(tmp_path)
    refused(run, finish)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["with spaces", "ünïcode", "new\nline", "[glob]*?", "checkpoint-3", "-o"])
def test_odd_names_of_a_run(name, tmp_path):
    run = tmp_path / os.fsdecode(name)
    stopped(run)
    assert same(finish(run), load_sae(run))
    assert not [path for path in run.iterdir() if path.name.startswith(("checkpoint", "."))]


def test_a_name_that_is_not_utf_8_is_refused_before_the_work(tmp_path):
    source = Windows()
    with pytest.raises(UserError, match=r"/\\xff: not UTF-8, and safetensors opens no other names"):
        train(new_sae(), source, range(12), tmp_path / os.fsdecode(b"\xff"), config())
    assert source.reads == 0
    assert not list(tmp_path.iterdir())


def test_a_lock_is_of_one_run(tmp_path):
    with locked(tmp_path / "one", {"sae": {}, "train": {}}):
        finish(tmp_path / "other")
        with (
            pytest.raises(UserError, match="another process is training this run"),
            locked(tmp_path / "one", {"sae": {}, "train": {}}),
        ):
            pass


# Several processes.


def test_each_of_several_processes_trains_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    finish(tmp_path / "run", steps=2)


@pytest.mark.parametrize("size", ["", "1", "0", "x", "9" * 5000])
def test_one_process_alone_trains(size, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    finish(tmp_path / "run", steps=2)
