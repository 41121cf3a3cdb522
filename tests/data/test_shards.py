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
from some_shards import some_tensors, write

from csae.data import shards
from csae.data.shards import ShardReader
from csae.errors import UserError
from csae.files import reading

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


def test_a_folder_that_can_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shards.os, "listdir", refuse)
    with pytest.raises(UserError, match="can't be read: no permission"):
        ShardReader(tmp_path)
