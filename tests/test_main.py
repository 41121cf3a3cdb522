"""The program ends with one line and an exit code, whatever happens, at any moment."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import csae.cli
from csae.__main__ import main
from csae.errors import Stopped, UserError


def program(*args: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "csae", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("seconds", [0.2, 0.7])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_it_imports_is_one_line(number, seconds):
    running = program("info")
    time.sleep(seconds)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    if running.returncode:  # on a fast machine it may be done
        assert running.returncode == 128 + number, err
        assert lines(err) == ["csae: interrupted"]
        assert out == ""


def test_what_the_caller_ignores_stays_ignored():
    command = [sys.executable, "-c", "from csae.__main__ import main; import signal; main()", "--version"]
    signal_before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, signal_before)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert out.startswith("csae, version") or out.startswith("csae ")


@pytest.mark.parametrize("command", ["--help", "info"])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "csae", command], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ended(error, monkeypatch, capsys):
    """Exit code and lines on stderr where the command line raises `error`, or does as it says."""

    def cli(**_):
        if callable(error):
            error()
        raise error

    monkeypatch.setattr(csae.cli, "cli", cli)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stop:
        main()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    return stop.value.code, lines(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "csae: interrupted"),
        (Stopped("run: stopped after step 3"), 130, "csae: run: stopped after step 3"),
        (UserError("k: given 0;\nneeded \x1b[31m1"), 2, "csae: k: given 0;\\nneeded \\x1b[31m1"),
        (UserError(f"{os.fsdecode(b'r-xff')}: no"), 2, "csae: r-xff: no"),
        (UserError(f"{os.fsdecode(bytes([114, 255]))}: no"), 2, "csae: r\\xff: no"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/a"), 2, "csae: /x/a: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/a"), 2, "csae: /x/a: no permission"),
        (OSError(errno.EIO, "Input/output error"), 2, "csae: the disk or the network behind it"),
        (MemoryError(), 2, "csae: not enough memory: needed a smaller --d-sae"),
        (
            RuntimeError("CPUAllocator: can't allocate memory: you tried to allocate 77309411328 bytes. Error 12"),
            2,
            "csae: not enough memory (tried to allocate 77.3 GB): needed",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity"),
            2,
            "csae: not enough memory (tried to allocate 20.00 GiB): needed",
        ),
        (RuntimeError("I/O error: Too many open files (os error 24)"), 2, "csae: too many open files"),
    ],
)
def test_each_error_is_one_line(error, code, line, monkeypatch, capsys):
    found, said = ended(error, monkeypatch, capsys)
    assert found == code
    assert len(said) == 1
    assert said[0].startswith(line)


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    def cli(**_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(csae.cli, "cli", cli)
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_ctrl_c_that_a_library_turns_into_another_error(monkeypatch, capsys):
    def error():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'x'") from None

    assert ended(error, monkeypatch, capsys) == (130, ["csae: interrupted"])


def test_a_second_ctrl_c_while_it_cleans_up(monkeypatch, capsys):
    def error():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    assert ended(error, monkeypatch, capsys) == (130, ["csae: interrupted"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_where_python_can_not_raise_it(monkeypatch, capsys):
    class Deleted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    def error():
        Deleted()
        time.sleep(5)

    began = time.monotonic()
    assert ended(error, monkeypatch, capsys) == (130, ["csae: interrupted"])
    assert time.monotonic() - began < 4


def test_terminated_while_it_works(monkeypatch, capsys):
    def error():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    assert ended(error, monkeypatch, capsys) == (143, ["csae: interrupted"])


@pytest.mark.parametrize("args", [["tr\x1b[31main"], ["train", "--la\x1b[31myer"], ["train", "--k", "\x1b[31m"]])
def test_what_was_typed_is_shown_safely(args, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["csae", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert err.startswith("Usage: csae")


def test_training_without_a_reader_ends_quietly_with_a_checkpoint(tiny_model_path, tmp_path):
    (tmp_path / "a.txt").write_text("some words of text, again and again. " * 400)
    options = ["--text", tmp_path / "a.txt", "--layer", "2", "--n-ctx", "16", "--d-sae", "64", "--k", "4"]
    where = ["--model", tiny_model_path, "--tokens", str(10**9), "--device", "cpu", "-o", tmp_path / "run"]
    command = [sys.executable, "-m", "csae", "train", "--arch", "topk", *options, *where]
    program = "import csae.progress; csae.progress.SECONDS_BETWEEN_LINES = 0.1; from csae.__main__ import main; main()"
    command = [sys.executable, "-c", program, *map(str, command[3:])]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in running.stdout:
        if "step/s" in line:
            break
    running.stdout.close()  # as `head` does
    assert running.wait(timeout=60) == 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
