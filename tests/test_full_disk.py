"""A disk that takes no more: one line says so, and nothing is left that could be taken for whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command import command

from csae.export import TARGETS

resource = pytest.importorskip("resource")  # not on Windows
ROOM = 400  # bytes a file
COMMANDS = {
    "features": ("features", "RUN", "--text", "TEXT", "-o", "OUT", "--n-ctx", "16"),
    "view": ("view", "RUN", "--text", "TEXT", "-o", "OUT"),
    "push": ("push", "RUN", "org/name", "--dry-run", "OUT"),
} | {
    f"export {to}": ("export", "RUN", "--to", to, "-o", "OUT") for to in TARGETS if to != "gemma_scope"
}  # which takes other SAEs


@contextmanager
def little_room() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", COMMANDS)
def test_one_line_and_nothing_is_left(
    what: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, text = tmp_path / "out", tmp_path / "mill.txt"
    text.write_text("The sluice at the lower mill was opened on the third morning. " * 9)
    names = {"RUN": shutil.copytree(runs["topk"], tmp_path / "run"), "TEXT": text, "OUT": out}
    given = [names.get(part, part) for part in COMMANDS[what]]
    given += [] if what == "push" else ["--device", "cpu"]
    before = sorted(tmp_path.rglob("*"))
    with little_room():
        code, _, err = command(*given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2, err
    said = [line for line in err.splitlines() if line.startswith("csae: ")]
    assert len(said) == 1, err
    assert "Traceback" not in err
    assert str(out) in said[0]
    if what != "features":  # whose file goes on from what is in it
        assert sorted(tmp_path.rglob("*")) == before
    code, printed, err = command(*given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert "mill.txt; search it" in printed if what == "features" else "written: " in printed
    assert ("loading tiny-model" in err) == (what not in ("push", "export sae_lens", "export dictionary_learning"))
