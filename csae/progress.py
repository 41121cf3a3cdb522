"""What is said on stderr: lines, and how far a long loop is, drawn often on a terminal, every ten seconds in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """Say a line.

    The line and its end are one write. Where Python is unbuffered, as under torchrun, `print` makes two, and lines of
    several ranks would run together.
    """
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Progress(Protocol):
    """Passes an iterable through and shows how far it is; `total` is its length where it has none of its own."""

    def __call__(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]: ...


def quiet(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The progress that shows nothing."""
    return iterable


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The progress that shows a bar with what is done, the time taken and the time left."""
    return bar(iterable, desc=description, total=total)


def bar(iterable: Iterable[T] | None = None, **options: Any) -> tqdm[T]:
    """tqdm, drawn as often as whoever reads stderr can bear."""
    interval = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(iterable, mininterval=interval, maxinterval=interval, **options)
