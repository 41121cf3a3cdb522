"""Labels beside a run: read, and refused where they can't be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from one_line import one_line

from csae.errors import UserError
from csae.features.labels import LONGEST, read_labels


def test_labels(tmp_path: Path) -> None:
    assert read_labels(tmp_path, 10) == {}
    (tmp_path / "labels.json").write_text(json.dumps({"3": " dates ", "0": "日本語 — <b>"}), encoding="utf-8")
    assert read_labels(tmp_path, 10) == {3: "dates", 0: "日本語 — <b>"}


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"10": "x"}, "'10': needed the number of a feature, 0 to 9"),
        ({"-1": "x"}, "needed the number"),
        ({"01": "x"}, "needed the number"),
        ({"one": "x"}, "needed the number"),
        ({"1": 3}, "its label is 3; needed a text"),
        ({"1": "  "}, "needed a text"),
        ({"1": "a\nb"}, "needed one line"),
        ({"1": "a" * (LONGEST + 1)}, f"{LONGEST + 1} characters; needed one line of {LONGEST} or fewer"),
        ([1], "needed an object"),
    ],
)
def test_what_is_refused(labels: object, says: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(UserError) as error:
        read_labels(tmp_path, 10)
    assert says in one_line(error)
    assert str(tmp_path / "labels.json") in str(error.value)
