"""The windows of a stream that are kept in files while they are cached."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from one_line import one_line
from streams import as_rows, same_windows, stream_of, texts_of, write_lines

from csae.data import kept_text
from csae.data.kept_text import keep_windows, map_kept, remove_kept
from csae.data.stream import TokenStream
from csae.errors import UserError


def data(folder: Path, n: int = 400) -> Path:
    return write_lines(folder / "text.jsonl", as_rows(texts_of(n)))


@pytest.mark.parametrize("begin", [(), (1,)], ids=["plain", "with a beginning"])
@pytest.mark.parametrize("n", [1, 37, None])
def test_the_first_windows_of_the_data_set(n: int | None, begin: tuple[int, ...], tmp_path: Path) -> None:
    stream = stream_of(data(tmp_path), begin=begin)
    keep_windows(tmp_path / "acts", stream, n)
    kept = map_kept(tmp_path / "acts", begin)
    assert same_windows(kept, stream.first(10**6 if n is None else n))
    assert kept.begin == begin
    assert n is None or len(kept.tokens) == n
    remove_kept(tmp_path / "acts")
    assert not list((tmp_path / "acts").iterdir())


def test_fewer_where_there_are_no_more(tmp_path: Path) -> None:
    stream = stream_of(data(tmp_path, 20))
    keep_windows(tmp_path, stream, 10**6)
    assert same_windows(map_kept(tmp_path, ()), stream.first(10**6))


def test_they_are_made_once_and_anew_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = data(tmp_path), tmp_path / "acts"
    keep_windows(folder, stream_of(file), 9)
    before = map_kept(folder, ())
    with monkeypatch.context() as patched:
        patched.setattr(kept_text, "_make", None)
        keep_windows(folder, stream_of(file), 9)
    for stream, n in ((stream_of(file), 8), (stream_of(file, n_ctx=8), 9), (stream_of(data(tmp_path, 300)), 9)):
        keep_windows(folder, stream, n)
        assert same_windows(map_kept(folder, ()), stream.first(n))
    assert before.tokens.shape == (9, 16)  # what is mapped stays, though its file is gone


def test_what_a_kill_left_goes(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    done = subprocess.Popen(["true"])
    done.wait()
    (folder / f".text.{done.pid}.tmp").mkdir(parents=True)
    keep_windows(folder, stream_of(data(tmp_path)), 3)
    assert [path.name for path in folder.iterdir()] == [".text"]


def test_rows_that_can_not_be_used_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    file = write_lines(tmp_path / "a.jsonl", [*as_rows(texts_of(30)), "nonsense", {"text": 3}])
    keep_windows(tmp_path, stream_of(file, say=said.append), None)
    assert [line.split(":")[0].split(", ")[1] for line in said] == ["line 31", "line 32"]
    hopeless = write_lines(tmp_path / "b.jsonl", [*as_rows(texts_of(1)), *["nonsense"] * 1500])
    with pytest.raises(UserError, match=r"none of the last [0-9,]+ rows can be used") as error:
        keep_windows(tmp_path / "b", stream_of(hopeless), None)
    one_line(error)
    assert not list((tmp_path / "b").iterdir())


def test_too_little_text_is_one_line(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", as_rows(["too few words"]))
    with pytest.raises(UserError, match="too short for a window of 64"):
        keep_windows(tmp_path / "acts", stream_of(file, n_ctx=64), None)
    with pytest.raises(UserError, match="needed a folder all ranks share"):
        map_kept(tmp_path / "acts", ())


def test_an_endless_data_set_is_read_no_further(tmp_path: Path) -> None:
    stream = stream_of(data(tmp_path, 2))
    rows = Endless(stream)
    stream.rows = rows
    keep_windows(tmp_path / "acts", stream, 100)
    assert map_kept(tmp_path / "acts", ()).tokens.shape == (100, 16)
    assert rows.chunks < 200


class Endless:
    def __init__(self, stream: TokenStream) -> None:
        self.rows, self.chunks, self.name = stream.rows, 0, "endless"

    def read(self, position, columns):
        while True:
            for chunk in self.rows.read({}, columns):
                self.chunks += 1
                yield chunk

    def describe(self) -> dict:
        return {}


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    keep_windows(tmp_path, stream_of(data(tmp_path)), 5)
    assert json.loads((tmp_path / ".text" / "about.json").read_text())["shape"] == [5, 16]
    assert (tmp_path / ".text" / "tokens").stat().st_size == 5 * 16 * 4
    assert not (tmp_path / ".text" / "special").exists()
    assert map_kept(tmp_path, ()).tokens.dtype == torch.int32
