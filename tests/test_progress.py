from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from csae.progress import quiet, say, track


@pytest.mark.parametrize("show", [quiet, track])
def test_items_pass_through(show) -> None:
    assert list(show([3, 1, 2], "sorting")) == [3, 1, 2]
    assert list(show(iter("ab"), "spelling", 2)) == ["a", "b"]
    assert list(show([], "nothing")) == []


@pytest.mark.parametrize(("terminal", "drawn"), [(True, 30), (False, 5)])
def test_it_is_drawn_on_stderr_and_seldom_in_a_log(terminal, drawn, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    shown = track(range(40), "reading")
    shown.mininterval *= 1e-9 if terminal else 1  # as if each item took long
    assert list(shown) == list(range(40))
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading: 100%" in err
    assert (err.count("reading") >= drawn) == terminal


def test_quiet_shows_nothing(capsys) -> None:
    list(quiet(range(3), "reading"))
    assert capsys.readouterr() == ("", "")


def test_a_line_is_said_at_once(capsys) -> None:
    say("something")
    assert capsys.readouterr() == ("", "something\n")


def test_lines_of_two_unbuffered_processes_stay_apart() -> None:
    program = "import sys; from csae.progress import say\nfor _ in range(1000): say(60 * sys.argv[1])"
    read, write = os.pipe()
    both = [subprocess.Popen([sys.executable, "-u", "-c", program, name], stderr=write) for name in "ab"]
    os.close(write)
    with open(read) as lines:
        said = Counter(line.rstrip("\n") for line in lines)
    assert [process.wait() for process in both] == [0, 0]
    assert said == {60 * "a": 1000, 60 * "b": 1000}
