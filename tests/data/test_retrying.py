from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from one_line import one_line

from csae.data import retrying
from csae.data.retrying import ConnectionLost, read_on
from csae.data.rows import Chunk
from csae.errors import UserError


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)


class Shaky:
    """Ten rows; before some of them, the connection is lost so many times."""

    name = "dataset 'org/name'"
    columns = ("text",)

    def __init__(self, failures: dict[int, int], error: type[Exception] = ConnectionError) -> None:
        self.failures, self.error, self.reads = failures, error, 0

    def read(self, position: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
        self.reads += 1
        for row in range(position.get("row", 0), 10):
            if self.failures.get(row, 0):
                self.failures[row] -= 1
                raise self.error("reset by peer")
            yield Chunk([row], self.name, row, "row", {"row": row + 1})

    def describe(self) -> dict[str, Any]:
        return {}


def rows_of(source: Any, said: list[str]) -> list[int]:
    return [row for chunk in read_on(source, {"row": 2}, ("text",), said.append) for row in chunk.rows]


@pytest.mark.parametrize(
    "error", [ConnectionError, TimeoutError, OSError, RuntimeError, type("HTTPError", (Exception,), {})]
)
def test_a_lost_connection_is_tried_again_from_where_it_was(error: type[Exception]) -> None:
    said: list[str] = []
    source = Shaky({4: 1, 7: retrying.TRIES}, error)
    assert rows_of(source, said) == list(range(2, 10))
    assert len(said) == 1 + retrying.TRIES
    assert said[0] == (
        f"dataset 'org/name': connection lost ({error.__name__}: reset by peer): trying again in 0 s (1 of 8)"
    )


def test_it_is_given_up_after_some_tries() -> None:
    said: list[str] = []
    with pytest.raises(
        ConnectionLost, match=r"out of reach .*tried 8 times: check the network; the same command"
    ) as error:
        rows_of(Shaky({4: 100}), said)
    one_line(error)
    assert len(said) == retrying.TRIES


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, UserError, KeyError])
def test_damage_is_not_tried_again(error: type[Exception]) -> None:
    said: list[str] = []
    source = Shaky({4: 1}, error)
    with pytest.raises(UserError, match="reset by peer"):
        rows_of(source, said)
    assert source.reads == 1
    assert not said
