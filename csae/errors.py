"""What ends in one line: bad input, a disk that does not do as asked, a stop that was asked for."""

from __future__ import annotations

import re
import unicodedata

# Marks and spaces that are not printable, but text needs them: joiners, no-break space, ideographic space.
HARMLESS = frozenset("\u00a0\u200c\u200d\u3000")


class UserError(ValueError):
    """Bad input from a user: the command line prints the message and exits with code 2."""


class Stopped(Exception):
    """Work was asked to stop (Ctrl-C); the message says where it can go on."""


class FailedElsewhere(Exception):
    """Another rank failed, and says why: this one ends without a word."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(rank, reason)
        self.rank, self.reason = rank, reason

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.reason}"


def shown(text: object) -> str:
    """A text that can be printed, and stand in a page or a JSON file: on one line, valid Unicode, without controls.

    A byte that is no UTF-8 (in the name of a file) becomes \\xff, a control or escape sequence \\x1b, a line break \\n.
    """
    return "".join(character if _is_plain(character) else _escaped(character) for character in str(text))


def first_line(error: Exception) -> str:
    """The first line of what an error says, and the next where that goes on there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].endswith(":"):
        lines[:2] = [" ".join(lines[:2])]
    return lines[0].rstrip(".:")


def memory_problem(error: BaseException) -> str | None:
    """What to say of an error for want of memory, of Python or of torch on any device; None of another error."""
    text = str(error)
    said = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
    if not isinstance(error, MemoryError) and not any(words in text.lower() for words in said):
        return None
    tried = re.search(r"tried to allocate (\d[\d.]* ?(?:[KMGT]i?B|bytes))", text, re.IGNORECASE)
    return "not enough memory" + (f" (tried to allocate {_in_gb(tried[1])})" if tried else "")


def _in_gb(size: str) -> str:
    return f"{int(size.removesuffix('bytes')) / 1e9:.1f} GB" if size.endswith("bytes") else size.strip()


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in HARMLESS or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii") if not 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"
