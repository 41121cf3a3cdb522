"""The positions at which a feature is new or carried, with how much; packed into bytes for the index."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

# Fractions are kept as whole numbers of ten thousandths, and activities of hundredths.
FRACTION, ACTIVITY = 10_000, 100
CARRIED = 0.01  # of c: a feature with a smaller share counts as not carried
LARGEST = 2**16 - 1


class Places(NamedTuple):
    """Positions in rising order, each with an amount and its token."""

    positions: np.ndarray
    """[n] int64"""
    amounts: np.ndarray
    """[n] uint16: activities in 1/ACTIVITY of the unit of normalised activations, or shares of c in 1/FRACTION"""
    tokens: np.ndarray
    """[n] int32: token ids"""

    @classmethod
    def none(cls) -> Places:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.int32))

    @classmethod
    def joined(cls, parts: list[Places]) -> Places:
        return cls(*map(np.concatenate, zip(*parts, strict=True))) if parts else cls.none()

    def pack(self, first: int) -> bytes:
        """As bytes, compressed: steps between positions (uint32, little-endian, from `first` on), amounts, tokens."""
        steps = np.diff(self.positions, prepend=first).astype("<u4")
        return zlib.compress(
            steps.tobytes() + self.amounts.astype("<u2").tobytes() + self.tokens.astype("<i4").tobytes(), 1
        )

    @classmethod
    def unpack(cls, packed: bytes, first: int) -> Places:
        """What `pack` was given. Raises zlib.error or ValueError where the bytes are of something else."""
        content = zlib.decompress(packed)
        n, rest = divmod(len(content), 10)
        if rest:
            raise ValueError(f"{len(content)} bytes; needed a multiple of 10")
        steps, amounts, tokens = (
            np.frombuffer(content, kind, n, at * n) for kind, at in (("<u4", 0), ("<u2", 4), ("<i4", 6))
        )
        return cls(first + steps.cumsum(dtype=np.int64), amounts.astype(np.uint16), tokens.astype(np.int32))


def whole(amounts: np.ndarray, unit: int) -> np.ndarray:
    """Positive amounts as whole numbers of 1/unit, 1 at least: uint16."""
    return np.rint(amounts * unit).clip(1, LARGEST).astype(np.uint16)


class Spans(NamedTuple):
    """Stretches over which a feature is present, that is new or carried, without a gap."""

    begins: np.ndarray
    """[m] int64: the first position of each"""
    ends: np.ndarray
    """[m] int64: the position after its last"""


def spans(new: Places, carried: Places, starts: np.ndarray) -> Spans:
    """The stretches over which a feature is present. starts [s] int64: where a window or a document begins."""
    present = np.union1d(new.positions, carried.positions)
    if not len(present):
        return Spans(present, present)
    begins = np.diff(present, prepend=present[0] - 2) != 1
    begins |= np.isin(present, starts, assume_unique=True)
    at = begins.nonzero()[0]
    return Spans(present[at], present[np.append(at[1:], len(present)) - 1] + 1)
