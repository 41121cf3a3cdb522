"""The folder of a run: believed only where its parts agree, locked while it trains, and cleaned of its own only."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import Windows, config, lines, new_sae, same

from csae.checkpoint import load_sae
from csae.errors import Stopped, UserError
from csae.run import locked, read_origin, read_trained_on
from csae.train import train

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


def stopped(run, at=4, **changed):
    """A run that was stopped after some steps."""
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == at else None)
    with pytest.raises(Stopped):
        train(new_sae(), source, range(12), run, config(**changed))
    return run


def finish(run, **changed):
    sae = new_sae()
    train(sae, Windows(), range(12), run, config(**changed))
    return sae


def edit(file, **changed):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | changed).items() if v != "gone"}))


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(run, *do):
    """What each of `do` (by default: training on, and loading) says in one line."""
    found = []
    for call in do or (finish, load_sae):
        with pytest.raises(UserError) as error:
            call(run)
        found.append(str(error.value))
        assert "\n" not in found[-1]
        assert len(found[-1]) < 600
        assert str(run) in found[-1]
    return found


def everything(folder):
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


# Cleaning.


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


# What its files say.


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


# Kills.

KILLER = textwrap.dedent(
    """
    import os, signal, sys, traceback
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_train import Windows, config, lines, new_sae, same, train

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
    from test_train import Windows, config, new_sae, train
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

    monkeypatch.setattr("csae.run.fcntl.flock", none)
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


def test_one_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"this is one of 2 \(WORLD_SIZE, as torchrun sets it\): start it without"):
        train(new_sae(), Windows(), range(12), tmp_path / "run", config())
    assert not (tmp_path / "run").exists()


def test_one_of_several_initialised_by_hand_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    with pytest.raises(UserError, match="this is one of 4"):
        train(new_sae(), Windows(), range(12), tmp_path / "run", config())


@pytest.mark.parametrize("size", ["", "1", "0", "x", "9" * 5000])
def test_one_process_alone_trains(size, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    finish(tmp_path / "run", steps=2)
