from __future__ import annotations

import sys

import pytest

from csae.progress import quiet, track


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
