from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from some_shards import some_tensors, write

from csae.config import TrainConfig
from csae.data.activations import Place
from csae.data.batches import AHEAD, IndexedBatches, batch_of
from csae.data.shard_activations import ShardActivations
from csae.data.shards import Shard
from csae.errors import UserError


@pytest.mark.parametrize(
    ("about", "hook"),
    [
        ({"layer": 12}, "resid.out:11"),
        ({"layer": 12, "hook": "resid_post"}, "resid.out:11"),
        ({"layer": 12, "hook": "mlp_out"}, "mlp_out"),
        ({"hook": "mlp.in:3"}, "mlp.in:3"),
        ({}, "activations"),
        ({"layer": "12", "hook": 3}, "activations"),
    ],
)
def test_the_place_of_a_folder_of_shards(tmp_path: Path, about: dict, hook: str) -> None:
    write(tmp_path, some_tensors(4), about=about)
    source = ShardActivations(tmp_path)
    assert source.places == (Place(hook),)
    assert source.at(Place(hook)).describe() == source.describe() == {**about, **describing(tmp_path, source)}
    assert (source.d_in, source.d_out) == (3, 3)


def describing(folder: Path, source: ShardActivations) -> dict:
    return {"folder": str(folder), "n_ctx": 5, "n_windows": source.n_windows, "d_in": 3, "dtype": "float32"}


def test_files_are_mapped_and_not_read(tmp_path: Path) -> None:
    """Two openings of a file share its memory, so neither is a copy."""
    save_file(some_tensors(4), tmp_path / "a.safetensors")
    shard = Shard(tmp_path / "a.safetensors")
    window = shard.read(2).activations
    assert window.data_ptr() == shard.tensors["activations"].data_ptr() + 2 * window.nbytes
    size = (tmp_path / "a.safetensors").stat().st_size
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path / "a.safetensors") in mapped.read_text()
    assert size > shard.tensors["activations"].nbytes


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_what_is_asked_for_ahead_is_where_the_windows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, asked = some_tensors(10), []
    write(tmp_path, tensors, 4)
    source = ShardActivations(tmp_path)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *where: asked.append(os.pread(file, where[1], where[0])))
    source.prefetch([9, 2, 0])
    assert sorted(asked) == sorted(tensors["activations"][i].numpy().tobytes() for i in (9, 2, 0))
    asked.clear()
    source.read([5, 1])
    assert sorted(asked) == sorted(tensors["activations"][i].numpy().tobytes() for i in (5, 1))
    asked.clear()
    source.read([9, 0])  # known to be read
    assert asked == []
    source.read([9])
    assert asked == [tensors["activations"][9].numpy().tobytes()]


def test_a_system_that_takes_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some_tensors(4))
    source = ShardActivations(tmp_path)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    source.prefetch([3])
    monkeypatch.setattr(os, "posix_fadvise", refused, raising=False)
    source.prefetch([3])


def refused(*arguments: object) -> None:
    raise OSError("no advice")


def test_training_tells_ahead_what_it_will_read(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(40))
    source = ShardActivations(tmp_path)
    config, asked = TrainConfig(steps=50, batch_windows=3), []
    source.prefetch = asked.append  # `read_all` asks as well
    steps = IndexedBatches(source, range(40), config).start(2)
    for _ in range(4):
        next(steps)
    told = [windows for windows in asked if windows in [batch_of(range(40), step, config) for step in range(6, 10)]]
    assert told == [batch_of(range(40), step + AHEAD, config) for step in range(2, 6)]


def test_windows_come_in_the_order_asked(tmp_path: Path) -> None:
    tensors = some_tensors(10)
    write(tmp_path, tensors, 4)
    batch = ShardActivations(tmp_path).read([9, 2, 2, 0, 5])
    assert torch.equal(batch.acts, tensors["activations"][[9, 2, 2, 0, 5]])
    assert torch.equal(batch.tokens, tensors["tokens"][[9, 2, 2, 0, 5]].long())
    assert torch.equal(batch.documents, tensors["documents"][[9, 2, 2, 0, 5]].long())


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(4))
    source = ShardActivations(tmp_path)
    source.read([1]).acts.zero_()
    assert torch.equal(source.read([1]).acts[0], some_tensors(4)["activations"][1])


def test_what_it_says_of_itself_is_json(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(4), about={"model": "m"})
    about = ShardActivations(tmp_path).describe()
    assert json.loads(json.dumps(about)) == about


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_found(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    acts = some_tensors(6)["activations"].to(dtype)
    acts[4, 3, 1] = bad
    save_file({"activations": acts}, tmp_path / "a.safetensors")
    source = ShardActivations(tmp_path, keep_first=True)
    assert torch.equal(source.read([5, 0, 3]).acts, acts[[5, 0, 3]].float())
    with pytest.raises(UserError, match=r"a.safetensors, window 4: NaN or Inf"):
        source.read([5, 4, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_positions_of_zeros_of_either_sign_are_padding(tmp_path: Path, dtype: torch.dtype) -> None:
    acts = some_tensors(1, T=4, d_in=2)["activations"].to(dtype)
    acts[0, 1], acts[0, 2], acts[0, 3] = 0, -0.0, torch.finfo(dtype).smallest_normal
    save_file({"activations": acts, "mask": torch.ones(1, 4, dtype=torch.bool)}, tmp_path / "a.safetensors")
    assert ShardActivations(tmp_path).read([0]).mask.tolist() == [[True, False, False, True]]


def test_files_of_several_dtypes_in_one_batch(tmp_path: Path) -> None:
    acts = some_tensors(4)["activations"]
    save_file({"activations": acts[:2].half()}, tmp_path / "a.safetensors")
    save_file({"activations": acts[2:]}, tmp_path / "b.safetensors")
    read = ShardActivations(tmp_path).read([3, 0, 2, 1]).acts
    assert torch.equal(read, torch.stack([acts[3], acts[0].half().float(), acts[2], acts[1].half().float()]))


@pytest.mark.parametrize("change", ["cut short", "replaced", "written over", "deleted"])
def test_a_file_that_is_changed_while_it_is_used(tmp_path: Path, change: str) -> None:
    file = tmp_path / "a.safetensors"
    save_file(some_tensors(4), file)
    source = ShardActivations(tmp_path)
    source.read([3])
    if change == "cut short":
        os.truncate(file, file.stat().st_size // 2)
    elif change == "replaced":
        save_file({**some_tensors(4), "tokens": torch.ones(4, 5, dtype=torch.int32)}, tmp_path / "other")
        os.replace(tmp_path / "other", file)
    elif change == "written over":
        file.write_bytes(bytes(file.stat().st_size))
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    with pytest.raises(UserError, match="no such file" if change == "deleted" else "was changed since it was opened"):
        source.read([3])
