"""Places packed and unpacked, stretches, and what counts as a filler."""

from __future__ import annotations

import numpy as np
import pytest

from csae.features.filler import is_filler
from csae.features.places import LARGEST, Places, spans, whole


def places(*positions: int) -> Places:
    return Places(np.array(positions, np.int64), np.ones(len(positions), np.uint16), np.zeros(len(positions), np.int32))


@pytest.mark.parametrize("first", [0, 7, 2**33])
def test_packed_and_unpacked(first: int) -> None:
    given = Places(
        first + np.array([0, 3, 4, 2**31], np.int64),
        np.array([1, 500, LARGEST, 7], np.uint16),
        np.array([0, 2**31 - 1, 5, 49_151], np.int32),
    )
    found = Places.unpack(given.pack(first), first)
    for one, other in zip(found, given, strict=True):
        assert one.tolist() == other.tolist()
        assert one.dtype == other.dtype
    assert len(Places.unpack(Places.none().pack(first), first).positions) == 0


def test_amounts_are_never_lost() -> None:
    assert whole(np.array([1e-9, 0.014, 1.0, 1e9]), 100).tolist() == [1, 1, 100, LARGEST]


def test_spans() -> None:
    found = spans(places(2, 3, 9, 20), places(4, 10, 11, 19), np.array([0, 10, 20]))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == [(2, 5), (9, 10), (10, 12), (19, 20), (20, 21)]
    assert [part.tolist() for part in spans(places(), places(), np.array([0]))] == [[], []]
    assert [part.tolist() for part in spans(places(0), places(), np.array([0]))] == [[0], [1]]


@pytest.mark.parametrize("piece", ["", " ", "\n\n", "\t ", "====", " ----", "___", "\n***", "......\n"])
def test_fillers(piece: str) -> None:
    assert is_filler(piece)


@pytest.mark.parametrize("piece", ["a", " the", "=", "==", "aaa", "111", "...a", "-=-", "“"])
def test_what_is_no_filler(piece: str) -> None:
    assert not is_filler(piece)
