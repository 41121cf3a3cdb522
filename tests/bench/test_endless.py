from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from csae.bench import endless


def test_rows_are_made_from_any_number_on() -> None:
    def rows(position: dict[str, Any], n: int) -> list[Any]:
        found: list[Any] = []
        for chunk in endless.MadeRows().read(position, ("text",)):
            found += chunk.rows
            if len(found) >= n:
                return found[:n]
        raise AssertionError

    assert rows({"row": 300}, 50) == rows({}, 350)[300:]


def test_memory_along_the_way() -> None:
    looks = [endless.Look(tokens * 10**5, tokens, 1) for tokens in range(1, 53)]
    assert [look.tokens / 10**6 for look in endless.along_the_way(looks, 5_200_000)] == [1, 2, 5, 5.2]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    said: list[str] = []
    found = endless.run(tokens=40 * 8192, kills=1, out=tmp_path, checkpoint_every=7, say=said.append)
    assert found["same"], said
    assert found["memory"]
    assert len(found["killed_at"]) == 1
