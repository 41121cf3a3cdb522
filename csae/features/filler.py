"""Pieces of text that tell nothing of what a feature is about: blanks, and rulers such as ======."""

from __future__ import annotations

import re

RULER = re.compile(r"\s*([^\w\s]|_)\1{2,}\s*")


def is_filler(piece: str) -> bool:
    """Whether a token's text is white space, or one mark three times or more."""
    return not piece.strip() or RULER.fullmatch(piece) is not None
