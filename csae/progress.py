"""Progress of a long loop: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Passes an iterable through and shows how far it is; `total` is its length where it has none of its own."""

    def __call__(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]: ...


def quiet(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The progress that shows nothing."""
    return iterable


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows progress on stderr: a bar on a terminal, otherwise a line every ten seconds and one at the end."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        try:
            return _bar(iterable, description, total)
        except ImportError:  # rich comes with the extra csae[cli]; without it lines do
            pass
    return _lines(iterable, description, total)


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterable[T]:
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(iterable, description, total=total, console=Console(stderr=True))


def _lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(_line(description, done, total, now - start), file=sys.stderr, flush=True)
    print(_line(description, done, total, time.monotonic() - start), file=sys.stderr, flush=True)


def _line(description: str, done: int, total: int | None, seconds: float) -> str:
    line = f"{description}: {done}" + (f"/{total}" if total else "") + f", {seconds:.0f} s"
    if total and 0 < done < total:
        line += f", {seconds / done * (total - done):.0f} s left"
    return line
