"""Rows of a data set whose connection may be lost: read again from where it was, a few times, ever later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from csae.data.rows import Chunk, Rows
from csae.errors import UserError, first_line

TRIES = 8
FIRST_WAIT = 1.0  # seconds; twice as long each time: four minutes in all
# What the data itself causes is the same the next time.
LASTING = (UserError, ValueError, TypeError, LookupError, AttributeError, AssertionError, MemoryError)
LASTING_OF_DISK = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class ConnectionLost(UserError):
    """A source of data is out of reach, and was so for all tries."""


def read_on(
    rows: Rows, position: dict[str, Any], columns: tuple[str, ...], say: Callable[[str], None]
) -> Iterator[Chunk]:
    """The rows from a position on. Each time that they can't be reached, `say` gets a line, and they are tried again.

    Raises ConnectionLost after TRIES failures in a row, UserError where the data is damaged.
    """
    failures = 0
    while True:
        try:
            for chunk in rows.read(position, columns):
                position, failures = chunk.after, 0
                yield chunk
            return
        except LASTING + LASTING_OF_DISK as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{rows.name}: can't be read ({type(error).__name__}: {first_line(error)})") from error
        except Exception as error:
            failures += 1
            reason = f"{type(error).__name__}: {first_line(error)}"
            if failures > TRIES:
                raise ConnectionLost(
                    f"{rows.name}: out of reach ({reason}), tried {TRIES} times: check the network; the same command "
                    "goes on from the checkpoint"
                ) from error
            wait = FIRST_WAIT * 2 ** (failures - 1)
            say(f"{rows.name}: connection lost ({reason}): trying again in {wait:.0f} s ({failures} of {TRIES})")
        time.sleep(wait)
