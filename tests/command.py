"""Runs a command of `csae` in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from csae.cli import main


def command(*args: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The exit code, what is printed, and what is said of errors and progress."""
    monkeypatch.setattr(sys, "argv", ["csae", *map(str, args)])
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err
