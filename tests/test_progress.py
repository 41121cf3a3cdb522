from __future__ import annotations

import sys

import pytest

from csae import progress
from csae.progress import quiet, track


@pytest.mark.parametrize("show", [quiet, track])
def test_items_pass_through(show) -> None:
    assert list(show([3, 1, 2], "sorting")) == [3, 1, 2]
    assert list(show(iter("ab"), "spelling", 2)) == ["a", "b"]
    assert list(show([], "nothing")) == []


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0, 4, 9, 11, 15, 30, 31])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    for _ in track(range(5), "reading"):
        pass
    assert capsys.readouterr() == ("", "reading: 3/5, 11 s, 7 s left\nreading: 5/5, 30 s\nreading: 5/5, 31 s\n")


def test_a_log_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(iter(range(7)), "reading"))
    assert capsys.readouterr().err == "reading: 7, 0 s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(range(5), "reading")) == [0, 1, 2, 3, 4]
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading" in err
    assert "100%" in err


def test_a_terminal_without_rich_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert list(track(range(5), "reading")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == "reading: 5/5, 0 s\n"
