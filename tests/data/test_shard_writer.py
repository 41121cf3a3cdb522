from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from one_line import one_line
from safetensors.torch import save_file
from some_shards import some_tensors, write

from csae.data import shard_writer
from csae.data.shard_writer import write_shards
from csae.data.shards import ShardReader
from csae.errors import Stopped, UserError


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give a new or empty folder"):
        write(tmp_path, some_tensors(4))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a new or empty folder"):
        write(tmp_path / "file", some_tensors(4))
    assert (tmp_path / "file").read_text() == "mine"


def failing_save(monkeypatch: pytest.MonkeyPatch, at: int, number: int = errno.ENOSPC) -> None:
    """The save number `at` ends in an error of the system, half-way."""
    calls = []

    def save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        calls.append(file)
        if len(calls) == at:
            Path(file).write_bytes(b"half a file")
            raise OSError(number, os.strerror(number))
        save_file(tensors, file, metadata)

    monkeypatch.setattr(shard_writer, "save_plain", save)


@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_at_the_first_shard_leaves_nothing(
    tmp_path: Path, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    if existed:
        folder.mkdir()
    failing_save(monkeypatch, 1)
    with pytest.raises(UserError, match="the disk is full") as error:
        write(folder, some_tensors(20), 4)
    one_line(error)
    assert folder.exists() == existed
    assert not existed or not list(folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (KeyboardInterrupt(), "^stopped; 2 of 5 shards are whole and stay in .*: the same command goes on from there"),
        (UserError("NaN"), "^NaN; 2 of 5 shards are whole and stay in "),
        (RuntimeError("out of memory"), "^out of memory"),
    ],
    ids=["Ctrl-C", "user error", "other error"],
)
def test_a_cache_that_was_cut_short_goes_on_to_the_same_bytes(
    tmp_path: Path, failure: BaseException, message: str
) -> None:
    tensors, reads = some_tensors(18), []

    def read(windows: range) -> dict[str, torch.Tensor]:
        reads.append(windows)
        if windows.start >= 8 and failing:
            raise failure
        return {name: tensor[windows.start : windows.stop] for name, tensor in tensors.items()}

    failing = True
    with pytest.raises((Stopped, UserError, RuntimeError), match=message):
        write_shards(tmp_path / "cache", read, 18, 4, {"of": "this"})
    (tmp_path / "cache" / f".activations-00003-of-00005.safetensors.{2**22}.tmp").write_bytes(b"a kill left this")
    (tmp_path / "cache" / f".activations-00004-of-00005.safetensors.{2**22}.tmp.d").mkdir()
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="2 of 5 shards are there"):
        ShardReader(tmp_path / "cache")

    failing = False
    reads.clear()
    write_shards(tmp_path / "cache", read, 18, 4, {"of": "this"})
    assert sum(map(len, reads)) == 18 - 8 + 4  # the last whole shard is looked at again
    write(tmp_path / "at once", tensors, 4, {"of": "this"})
    assert contents(tmp_path / "cache") == contents(tmp_path / "at once") | {"notes.txt": b"mine"}
    write_shards(tmp_path / "cache", read, 18, 4, {"of": "this"})  # all is there
    assert contents(tmp_path / "cache") == contents(tmp_path / "at once") | {"notes.txt": b"mine"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=os.strerror)
def test_a_disk_error_keeps_what_is_whole(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_save(monkeypatch, 3, number)
    with pytest.raises(UserError, match=r"not written: .*; 2 of 5 shards are whole and stay in ") as error:
        write(tmp_path, some_tensors(20), 4)
    one_line(error)
    assert sorted(contents(tmp_path)) == [
        "activations-00001-of-00005.safetensors",
        "activations-00002-of-00005.safetensors",
        "activations.json",
    ]


def test_a_shard_that_is_gone_is_written_again(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(20), 4)
    before = contents(tmp_path)
    (tmp_path / "activations-00002-of-00005.safetensors").unlink()
    write(tmp_path, some_tensors(20), 4)
    assert contents(tmp_path) == before


def test_another_job_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(20), 4, {"of": "this"})
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"it holds others \(of: 'this', now 'that'\)"):
        write(tmp_path, some_tensors(20), 4, {"of": "that"})
    with pytest.raises(UserError, match="is none of these"):
        write(tmp_path, some_tensors(20), 5, {"of": "this"})
    (tmp_path / "activations-00005-of-00005.safetensors").unlink()
    with pytest.raises(UserError, match="is none of these"):
        write(tmp_path, some_tensors(24), 4, {"of": "this"})
    other = some_tensors(20)
    other["tokens"] = other["tokens"] + 1
    with pytest.raises(UserError, match="holds other tokens than are to be written"):
        write(tmp_path, other, 4, {"of": "this"})
    other = some_tensors(20)
    other["activations"] = other["activations"] * 1.1
    with pytest.raises(UserError, match="holds other activations than are to be written"):
        write(tmp_path, other, 4, {"of": "this"})
    del before["activations-00005-of-00005.safetensors"]
    assert contents(tmp_path) == before


def test_a_name_that_safetensors_can_not_open_is_said_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"acts-\xff")
    with pytest.raises(UserError, match=r"acts-\\xff: not UTF-8, and safetensors opens no other names"):
        write(folder, some_tensors(4))
    assert not folder.exists()


def test_an_unfinished_shard_is_not_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while a file is written leaves no file that a reader takes."""

    def save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        assert Path(file).suffix != ".safetensors"
        assert not list(tmp_path.glob("*.safetensors"))
        save_file(tensors, file, metadata)

    monkeypatch.setattr(shard_writer, "save_plain", save)
    write(tmp_path, some_tensors(4), 4)
    assert ShardReader(tmp_path).n_windows == 4


def test_progress_counts_the_steps(tmp_path: Path) -> None:
    tensors = some_tensors(40)
    seen = []

    def progress(iterable, description, total=None):
        for windows in iterable:
            yield windows
            seen.append((windows.start, windows.stop))

    def read(windows: range) -> dict[str, torch.Tensor]:
        return {name: tensor[windows.start : windows.stop] for name, tensor in tensors.items()}

    write_shards(tmp_path, read, 40, 18, {}, progress)
    assert seen == [(0, 16), (16, 18), (18, 34), (34, 36), (36, 40)]
