from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_line import one_line
from safetensors.torch import load_file, save_file

from csae.data import shards
from csae.data.shards import ShardReader, write_shards
from csae.errors import Stopped, UserError
from csae.files import reading


def some_tensors(n_windows: int, T: int = 5, d_in: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "activations": torch.randn(n_windows, T, d_in, generator=generator),
        "mask": torch.rand(n_windows, T, generator=generator) > 0.3,
        "documents": torch.randint(9, (n_windows, T), dtype=torch.int32, generator=generator),
        "tokens": torch.randint(9, (n_windows, T), dtype=torch.int32, generator=generator),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], windows_per_shard: int = 4, about=None) -> None:
    def read(windows: range) -> dict[str, torch.Tensor]:
        return {name: tensor[windows.start : windows.stop] for name, tensor in tensors.items()}

    write_shards(folder, read, len(tensors["activations"]), windows_per_shard, about or {})


# --- writing and reading back ------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    n_windows=st.integers(1, 50),
    windows_per_shard=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    optional=st.sets(st.sampled_from(["mask", "documents", "tokens"])),
    data=st.data(),
)
def test_what_is_written_is_read(n_windows, windows_per_shard, dtype, optional, data) -> None:
    tensors = {name: tensor for name, tensor in some_tensors(n_windows).items() if name in {"activations"} | optional}
    tensors["activations"] = tensors["activations"].to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), tensors, windows_per_shard, {"layer": 3})
        files = sorted(Path(folder).glob("*.safetensors"))
        assert len(files) == -(-n_windows // windows_per_shard)
        assert all(len(load_file(file)["activations"]) <= windows_per_shard for file in files)
        reader = ShardReader(folder)
        assert (reader.n_windows, reader.n_ctx, reader.d_in, reader.dtype) == (n_windows, 5, 3, dtype)
        assert reader.has_tokens == ("tokens" in optional)
        assert reader.about == {"layer": 3}
        for i in data.draw(st.permutations(range(n_windows))):
            window = reader.read(i)
            for name in window._fields:
                stored = getattr(window, name)
                assert (stored is None) == (name not in tensors)
                assert stored is None or torch.equal(stored, tensors[name][i])


def test_names_of_the_files(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", some_tensors(10), 4, {"model": "m"})
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == [
        "activations-00001-of-00003.safetensors",
        "activations-00002-of-00003.safetensors",
        "activations-00003-of-00003.safetensors",
        "activations.json",
    ]
    assert json.loads((tmp_path / "a" / "b" / "activations.json").read_text()) == {"model": "m"}


@pytest.mark.parametrize("window", [-1, 10])
def test_no_such_window(tmp_path: Path, window: int) -> None:
    write(tmp_path, some_tensors(10))
    with pytest.raises(IndexError, match=f"window: given {window}; needed 0 to 9"):
        ShardReader(tmp_path).read(window)


def test_where_a_window_is(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(10), 4)
    reader = ShardReader(tmp_path)
    assert reader.where(3) == f"{tmp_path / 'activations-00001-of-00003.safetensors'}, window 3"
    assert reader.where(4) == f"{tmp_path / 'activations-00002-of-00003.safetensors'}, window 0"


# --- folders that someone else wrote -----------------------------------------------------------------


def test_activations_alone_in_files_of_any_name_and_dtype(tmp_path: Path) -> None:
    first, second = some_tensors(2), some_tensors(3)
    save_file({"activations": first["activations"].half()}, tmp_path / "a.safetensors")
    second["mask"] = second["mask"].to(torch.uint8)
    second["documents"] = second["documents"].to(torch.uint16)
    save_file({**second, "extra": torch.zeros(1)}, tmp_path / "b.safetensors")
    (tmp_path / "README.txt").write_text("mine")
    reader = ShardReader(str(tmp_path))
    assert reader.n_windows == 5
    assert reader.about == {}
    assert not reader.has_tokens  # the first file has none
    assert reader.read(1).mask is None
    assert torch.equal(reader.read(1).activations, first["activations"][1].half())
    assert torch.equal(reader.read(4).activations, second["activations"][2])
    assert torch.equal(reader.read(4).documents.int(), second["documents"][2].int())


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        ShardReader(tmp_path / "missing")


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*\.safetensors file"):
        ShardReader(tmp_path)


GOOD = torch.zeros(4, 5, 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": GOOD}, "holds no tensor `activations`, only weight; give a folder of activation shards"),
        ({"activations": GOOD[0]}, r"activations are \(5, 3\); needed \[windows, T, d_in\]"),
        ({"activations": GOOD.double()}, "activations are F64; needed float16, bfloat16 or float32"),
        ({"activations": GOOD, "mask": torch.zeros(4, 4, dtype=torch.bool)}, r"mask is \(4, 4\); needed \(4, 5\)"),
        ({"activations": GOOD, "mask": torch.zeros(4, 5)}, "mask is F32; needed bool or uint8"),
        ({"activations": GOOD, "documents": torch.zeros(4, 5)}, "documents is F32; needed an integer type"),
        ({"activations": GOOD, "tokens": torch.zeros(4, dtype=torch.int32)}, r"tokens is \(4,\); needed \(4, 5\)"),
    ],
)
def test_tensors_that_break_the_format(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as error:
        ShardReader(tmp_path)
    assert "x.safetensors" in one_line(error)


@pytest.mark.parametrize(("T", "d_in"), [(6, 3), (5, 4)])
def test_shards_of_different_sizes(tmp_path: Path, T: int, d_in: int) -> None:
    save_file(some_tensors(2), tmp_path / "a.safetensors")
    save_file(some_tensors(2, T, d_in), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors: .* all files of a folder need the same T and d_in") as error:
        ShardReader(tmp_path)
    one_line(error)


@pytest.mark.parametrize("size", [0, 20, 200, -1])
def test_a_truncated_file(tmp_path: Path, size: int) -> None:
    write(tmp_path, some_tensors(8), 4)
    file = tmp_path / "activations-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is no whole safetensors file") as error:
        ShardReader(tmp_path)
    one_line(error)


def test_no_windows(tmp_path: Path) -> None:
    save_file({"activations": torch.zeros(0, 5, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="are empty"):
        ShardReader(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(12), 4)
    (tmp_path / "activations-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="2 of 3 shards are there"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_broken_json(tmp_path: Path, text: str) -> None:
    write(tmp_path, some_tensors(4))
    (tmp_path / "activations.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="repair or delete it") as error:
        ShardReader(tmp_path)
    one_line(error)


# --- writing that fails ------------------------------------------------------------------------------


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

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        calls.append(file)
        if len(calls) == at:
            Path(file).write_bytes(b"half a file")
            raise OSError(number, os.strerror(number))
        save_file(tensors, file)

    monkeypatch.setattr(shards, "save_plain", save)


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


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EACCES, "no permission to read it"), (errno.EIO, "input/output error"), (errno.EMFILE, "ulimit -n")],
    ids=["permission", "input and output", "open files"],
)
def test_a_shard_that_the_system_does_not_give_is_not_called_damaged(
    tmp_path: Path, number: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, some_tensors(8), 4)

    def refuse(path: Path) -> None:
        with reading(path):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards, "check_readable", refuse)
    with pytest.raises(UserError, match=rf"00001-of-00002\.safetensors: can't be read: .*{reason}") as error:
        ShardReader(tmp_path)
    assert "delete" not in one_line(error)


@pytest.mark.parametrize("kind", ["folder", "circle of links", "link to nothing"])
def test_what_is_no_file_is_not_called_damaged(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.safetensors"
    if kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file if kind.startswith("circle") else tmp_path / "nothing")
    reason = {"folder": "it is a folder", "circle of links": "in a circle", "link to nothing": "no such file"}[kind]
    with pytest.raises(UserError, match=rf"a\.safetensors: can't be read: .*{reason}") as error:
        ShardReader(tmp_path)
    assert "delete" not in one_line(error)


def test_a_name_that_safetensors_can_not_open_is_said_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"acts-\xff")
    with pytest.raises(UserError, match=r"acts-\\xff: not UTF-8, and safetensors opens no other names"):
        write(folder, some_tensors(4))
    assert not folder.exists()


def test_a_folder_that_can_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shards.os, "listdir", refuse)
    with pytest.raises(UserError, match="can't be read: no permission"):
        ShardReader(tmp_path)


def test_an_unfinished_shard_is_not_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while a file is written leaves no file that a reader takes."""

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        assert Path(file).suffix != ".safetensors"
        assert not list(tmp_path.glob("*.safetensors"))
        save_file(tensors, file)

    monkeypatch.setattr(shards, "save_plain", save)
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
