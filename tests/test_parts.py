"""Tensors in parts: whole or some rows, whatever files they are in; compared with their checksum in blocks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from csae import tensors as tensors_module
from csae.errors import UserError
from csae.parts import WEIGHTS, indexed, part_name, shard_name, whole_files
from csae.run import FILES, remove_unfinished
from csae.tensors import check_tensors, load_tensors, save_tensors

STORED = {
    "table": torch.arange(21.0).view(7, 3),
    "half": torch.arange(14, dtype=torch.bfloat16).view(7, 2),
    "counts": torch.arange(7),
    "none": torch.zeros(0, 3),
    "number": torch.tensor(2.5),
}
TABLES = ("table", "half", "counts")


@pytest.mark.parametrize("numbers", [1, 3, 4, 1 << 20])
def test_blocks_have_the_checksum_of_the_whole(numbers, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "BLOCK_NUMBERS", numbers)
    file = tmp_path / "tensors.safetensors"
    save_tensors(STORED, file)
    check_tensors(file)
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    for read in (check_tensors, load_tensors):
        with pytest.raises(UserError, match="its tensors are not those that were saved"):
            read(file)


def test_a_file_without_a_checksum_is_taken_as_it_is(tmp_path):
    save_file(STORED, tmp_path / "tensors.safetensors")
    check_tensors(tmp_path / "tensors.safetensors")


@pytest.mark.parametrize("rows", [range(7), range(2), range(2, 6), range(5, 7), range(7, 7)])
def test_some_rows_of_tables(rows, tmp_path):
    save_tensors(STORED, tmp_path / WEIGHTS)
    found = whole_files([tmp_path / WEIGHTS]).load(dict.fromkeys(TABLES, rows))
    assert found.keys() == STORED.keys()
    for name, tensor in STORED.items():
        expected = tensor[rows.start : rows.stop] if name in TABLES else tensor
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], expected)


def test_for_some_rows_no_whole_file_is_in_memory(tmp_path, monkeypatch):
    save_tensors(STORED, tmp_path / WEIGHTS)
    monkeypatch.setattr("csae.parts.load_tensors", lambda file: pytest.fail("it loads a whole file"))
    whole_files([tmp_path / WEIGHTS]).load(dict.fromkeys(TABLES, range(2)))


def test_an_index_of_another_program_is_refused(tmp_path):
    """transformers' own index has no checksums."""
    index = {"metadata": {"total_size": 1}, "weight_map": {"b": shard_name(0, 1)}}
    (tmp_path / "index").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not an index that csae wrote"):
        indexed(tmp_path / "index", lambda name: tmp_path / name)


def test_names():
    assert shard_name(0, 12) == "model-00001-of-00012.safetensors"
    assert part_name("W_enc", range(4, 9)) == "W_enc[4:9]"


def test_what_a_kill_left_of_them_is_removed(tmp_path):
    for name in ("model-00002-of-00003.safetensors", "model.safetensors.index.json"):
        (tmp_path / f".{name}.12.tmp").write_text("")
    (tmp_path / ".model-00002-of-00003.safetensors.12.tmp.d").mkdir()
    (tmp_path / "model-00002-of-00003.safetensors").write_text("")
    remove_unfinished(tmp_path, FILES)
    assert [file.name for file in tmp_path.iterdir()] == ["model-00002-of-00003.safetensors"]
