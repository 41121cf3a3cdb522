from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from csae.data.packing import Packing, Text, pack


@given(
    documents=st.lists(st.lists(st.integers(0, 3), max_size=20), min_size=1, max_size=10),
    n_ctx=st.integers(4, 9),
    begin=st.sampled_from([(), (0,), (0, 1), (1, 1, 0)]),
    data=st.data(),
)
def test_windows_are_the_same_however_documents_come_in(
    documents: list[list[int]], n_ctx: int, begin: tuple[int, ...], data: Any
) -> None:
    documents.append([2] * n_ctx)
    whole = pack(documents, n_ctx, begin=begin)
    packing, found = Packing(n_ctx, begin), []
    for document in documents:
        cut = data.draw(st.integers(0, len(document)))
        packing.add(np.array(document[:cut], dtype=np.int32))
        if data.draw(st.booleans()):
            found.append(packing.cut())
        packing.add(np.array(document[cut:], dtype=np.int32), goes_on=True)
        if data.draw(st.booleans()):  # stopped and resumed
            rest, count = packing.rest(), packing.n_documents
            packing = Packing(n_ctx, begin)
            packing.restore(rest, count)
        if data.draw(st.booleans()):
            found.append(packing.cut())
    found.append(packing.cut(at_end=True))
    windows = Text(*(np.concatenate(parts) for parts in zip(*found, strict=True))).as_windows(begin)
    for part, expected in zip(windows[:3], whole[:3], strict=True):
        assert (part is None) == (expected is None)
        assert part is None or torch.equal(part, expected)


def test_more_of_a_document_before_there_is_one_begins_one() -> None:
    packing = Packing(2)
    packing.add(np.array([5, 6], dtype=np.int32), goes_on=True)
    assert packing.cut().documents.tolist() == [[0, 0]]


def test_numbers_of_documents_begin_again_before_they_are_too_large() -> None:
    packing = Packing(2)
    packing.n_documents = 2**31
    packing.add(np.array([5, 6], dtype=np.int32))
    assert packing.cut().documents.tolist() == [[0, 0]]
