"""A saved SAE in several files: written by all ranks, read whole or in rows, and refused where it is not one SAE."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from one_line import one_line
from processes import run
from safetensors.torch import load_file, save_file
from sharding import new, rows_of
from test_checkpoint import ARCHITECTURES, filled

from csae import TopKSAE
from csae.checkpoint import load_sae
from csae.distributed import Shard, sharded
from csae.distributed import checksum as checksums
from csae.errors import FailedElsewhere, UserError
from csae.parts import Weights
from csae.push import write_folder
from csae.sae import SAE
from csae.tensors import checksum
from csae.trained_on import TrainedOn

INDEX = "model.safetensors.index.json"


def _save(ranks: Any, folder: Path, seed: int = 1) -> None:
    for arch in ARCHITECTURES:
        sae = filled(seed, arch, ranks)[0]
        sae.trained_on = TrainedOn(model="some/model", layer=3)
        sae.save_pretrained(folder / arch)


def _load(ranks: Any, folders: list[Path]) -> bool:
    for folder in folders:
        for arch in ARCHITECTURES:
            expected = filled(1, arch, None)[0].state_dict()
            shard = None if ranks is None else Shard(new(arch).d_sae, ranks)
            sae = type(new(arch)).from_pretrained(folder / arch, shard=shard)
            assert sae.trained_on == TrainedOn(model="some/model", layer=3)
            assert sae.config == new(arch).config
            for name, tensor in sae.state_dict().items():
                assert torch.equal(tensor, rows_of(sae, name, expected[name])), (folder, arch, name)
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of ranks, what they saved."""
    folders = {size: tmp_path_factory.mktemp(f"by-{size}") for size in range(1, 5)}
    for size, folder in folders.items():
        run(size, _save, folder)
    return folders


@pytest.mark.parametrize("size", range(1, 5))
def test_any_number_of_ranks_reads_what_any_number_saved(size: int, saved: dict[int, Path]) -> None:
    assert all(run(size, _load, list(saved.values())))


def test_files_are_named_as_transformers_names_them(saved: dict[int, Path]) -> None:
    three = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    beside = {INDEX, "config.json", "README.md"}
    assert {file.name for file in (saved[3] / "topk").iterdir()} == three | beside
    assert len(list((saved[4] / "contextual").glob("model-*-of-00003.safetensors"))) == 3  # the fourth has no rows
    index = json.loads((saved[3] / "topk" / INDEX).read_text())
    assert set(index["weight_map"].values()) == three
    tensors = filled(1, "topk", None)[0].state_dict().values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


def test_any_reader_can_put_them_together(saved: dict[int, Path]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load_parts" in block)
    said: dict[str, Any] = {}
    exec(code, said)
    tensors = said["load_parts"](saved[3] / "topk")
    expected = filled(1, "topk", None)[0].state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_one_form_replaces_the_other(saved: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(saved[3], tmp_path / "sae")
    for by, seed in ((2, 3), (1, 4), (4, 5), (4, 6)):
        run(by, _save, tmp_path / "sae", seed)
        for arch in ARCHITECTURES:
            expected = filled(seed, arch, None)[0].state_dict()
            assert torch.equal(load_sae(tmp_path / "sae" / arch).W_enc, expected["W_enc"])
            n_files = 0 if by == 1 else min(by, 3 if arch == "contextual" else 4)
            assert len(list((tmp_path / "sae" / arch).iterdir())) == (3 if by == 1 else n_files + 3)


def test_replicas_save_once(tmp_path: Path, saved: dict[int, Path]) -> None:
    run(4, _save, tmp_path, data=2)
    assert len(list((tmp_path / "topk").glob("model-*-of-00002.safetensors"))) == 2
    assert all(run(4, _load, [tmp_path, saved[3]], data=2))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another save of as many ranks."""
    folder = tmp_path_factory.mktemp("other")
    run(3, _save, folder, 7)
    return folder


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 64
    file.write_bytes(content)


FIRST, SECOND = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a file is missing": (lambda one, other: (one / SECOND).unlink(), f"{SECOND}: can't be read: no such file"),
    "a file of another save": (lambda one, other: shutil.copy(other / SECOND, one), f"{SECOND}: not the file that"),
    "the index of another save": (lambda one, other: shutil.copy(other / INDEX, one), "not the file that"),
    "a file is cut short": (
        lambda one, other: (one / FIRST).write_bytes((one / FIRST).read_bytes()[:-9]),
        f"{FIRST}: not a whole safetensors file",
    ),
    "a bit": (lambda one, other: flip(one / SECOND), f"{SECOND}: its tensors are not those that were saved"),
    "the config": (lambda one, other: edit(one / "config.json", lambda of: of.update(k=2)), "k is 2, not 3"),
    "the config of the size": (
        lambda one, other: edit(one / "config.json", lambda of: of.update(d_sae=11)),
        "d_sae is 11",
    ),
    "an index of nothing": (lambda one, other: (one / INDEX).write_text("{}"), "not an index that csae wrote"),
    "an index of other files": (
        lambda one, other: edit(one / INDEX, lambda of: of["weight_map"].update({"b_dec": "../model.safetensors"})),
        "it names other files",
    ),
    "an index that leaves rows out": (
        lambda one, other: edit(one / INDEX, lambda of: of["weight_map"].pop("W_dec[4:8]")),
        f"it names other tensors in {SECOND}",
    ),
    "an index that exchanges files": (
        lambda one, other: edit(one / INDEX, lambda of: of["weight_map"].update({"b_dec": SECOND})),
        "it names other tensors in",
    ),
    "an index of a list": (
        lambda one, other: edit(one / INDEX, lambda of: of["weight_map"].update({"b_dec": ["a"]})),
        "it names other files",
    ),
    "a file less, and the index knows": (
        lambda one, other: edit(
            one / INDEX,
            lambda of: of.update(
                weight_map={name: file for name, file in of["weight_map"].items() if file != SECOND},
                metadata={"sha256": {f: s for f, s in of["metadata"]["sha256"].items() if f != SECOND}},
            ),
        ),
        "are missing, or there twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_one_sae_is_one_line(damage: str, saved: dict[int, Path], other: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved[3] / "topk", tmp_path / "sae")
    change, message = DAMAGES[damage]
    change(folder, other / "topk")
    for load in (load_sae, TopKSAE.from_pretrained):
        with pytest.raises(UserError) as error:
            load(folder)
        assert message in one_line(error)
        assert str(folder) in str(error.value)


def _said(ranks: Any, work: Callable[..., object], *given: Any) -> str:
    try:
        work(ranks, *given)
    except (UserError, FailedElsewhere) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _load_rows(ranks: Any, folder: Path) -> None:
    TopKSAE.from_pretrained(folder, shard=Shard(10, ranks))


def test_one_rank_says_it(saved: dict[int, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[3] / "topk", tmp_path / "sae")
    flip(folder / SECOND)
    said = run(2, _said, _load_rows, folder)
    assert [of.split(": ")[0] for of in said] == ["FailedElsewhere", "UserError"]


def _save_without_room(ranks: Any, folder: Path, full: int) -> None:
    sae = filled(3, "topk", ranks)[0]
    if ranks.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    sae.save_pretrained(folder)


@pytest.mark.parametrize("by", [1, 3])
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank_leaves_what_was_there(
    full: int, by: int, saved: dict[int, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[by] / "topk", tmp_path / "sae")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    said = run(3, _said, _save_without_room, folder, full)
    for rank in range(3):
        assert said[rank].startswith("UserError" if rank == full else f"FailedElsewhere: rank {full}")
    assert "larger than this file system or its limits allow" in said[full]
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name: of for name, of in after.items() if name != "README.md"} == {
        name: of for name, of in before.items() if name != "README.md"
    }


def _checksums(ranks: Any, folders: list[Path]) -> list[str]:
    checksums.BLOCK_NUMBERS = 13
    if ranks is not None:
        del Weights._whole  # no rank reads all rows
    return [checksums.whole_checksum(load_sae(folder, ranks=ranks)) for folder in folders]


def test_the_checksum_is_that_of_the_whole_one(saved: dict[int, Path]) -> None:
    folders = [folder / arch for folder in (saved[1], saved[3]) for arch in ARCHITECTURES]
    expected = [checksum(load_sae(folder).state_dict()) for folder in folders]
    assert expected[0] == expected[2] != expected[1]
    for size, data in ((1, 1), (2, 1), (4, 1), (4, 2)):
        assert run(size, _checksums, folders, data=data) == [expected] * size


def _save_selecting(ranks: Any, folder: Path) -> str:
    sae = sharded(lambda: TopKSAE(6, 10, 3, selection="batch"), ranks)
    sae.threshold.fill_(4)
    sae.save_pretrained(folder)
    return checksums.whole_checksum(load_sae(folder, ranks=ranks))


def test_a_threshold_of_a_batch_is_saved(tmp_path: Path) -> None:
    found = run(3, _save_selecting, tmp_path / "several")
    sae = load_sae(tmp_path / "several")
    assert found == [checksum(sae.state_dict())] * 3
    assert sae.threshold == 4


class Snapshots:
    """Copies of a folder, before and after each change of a name in it: what a kill would leave."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out, self.count = folder, out, 0
        for name in ("replace", "rename", "unlink", "rmdir"):
            setattr(os, name, self._around(getattr(os, name)))

    def _around(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def around(*given: Any, **more: Any) -> Any:
            self.take()
            try:
                return change(*given, **more)
            finally:
                self.take()

        return around

    def take(self) -> None:
        copy = self.out / f"{os.getpid()}-{self.count:03}"
        self.count += 1
        copy.mkdir(parents=True)
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another rank changes names too
                if file.is_file():
                    shutil.copy(file, copy)


def other_sae(changed: bool, ranks: Any) -> SAE:
    """Other weights, and other arguments if asked for."""
    sae = filled(3, "topk", ranks)[0]
    sae.trained_on = TrainedOn(model="another/model", layer=2)
    if changed:
        sae.k = sae._hub_mixin_config["k"] = 2  # type: ignore[index]
    return sae


def _save_in_steps(ranks: Any, folder: Path, changed: bool, out: Path) -> None:
    sae = other_sae(changed, ranks)
    Snapshots(folder, out / "steps")
    sae.save_pretrained(folder)


@pytest.mark.parametrize("changed", [False, True], ids=["the same arguments", "other arguments"])
@pytest.mark.parametrize(("before", "by"), [(1, 1), (1, 3), (3, 3), (3, 1), (2, 3)])
def test_killed_at_any_step_the_old_or_the_new_one_is_there(
    before: int, by: int, changed: bool, saved: dict[int, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[before] / "topk", tmp_path / "sae")
    old, new = load_sae(folder), other_sae(changed, None)
    run(by, _save_in_steps, folder, changed, tmp_path)
    seen = set()
    for step in [*sorted((tmp_path / "steps").iterdir()), folder]:
        sae, again = load_sae(step), TopKSAE.from_pretrained(step)
        is_new = torch.equal(sae.W_enc, new.W_enc)
        expected = new if is_new else old
        seen.add(is_new)
        for loaded in (sae, again):
            assert loaded.config == expected.config
            assert loaded.trained_on == expected.trained_on
            for name, tensor in expected.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor)
    assert seen == {False, True}
    assert len(list(folder.iterdir())) == (3 if by == 1 else 6)
    for step in sorted((tmp_path / "steps").iterdir()):
        old.save_pretrained(step)
        left = {file.name for file in step.iterdir() if not file.name.endswith(".tmp")}
        assert left == {"config.json", "model.safetensors", "README.md"}
        assert load_sae(step).config == old.config


def _dies(ranks: Any, folder: Path, of: int, at: int) -> None:
    count, replace = 0, os.replace

    def killed(*given: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            os._exit(1)
        replace(*given)

    if ranks.rank == of:
        os.replace = killed  # type: ignore[assignment]
    other_sae(True, ranks).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("of", "at"), [(2, 1), (2, 2), *((0, at) for at in range(1, 7))])
def test_a_rank_that_is_killed(of: int, at: int, saved: dict[int, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[3] / "topk", tmp_path / "sae")
    old, new = load_sae(folder), other_sae(True, None)
    with pytest.raises((AssertionError, RuntimeError)):
        run(3, _dies, folder, of, at)
    sae = load_sae(folder)
    expected = new if torch.equal(sae.W_enc, new.W_enc) else old
    assert sae.config == expected.config
    run(2, _save_in_steps, folder, True, tmp_path)
    assert torch.equal(load_sae(folder).W_enc, new.W_enc)
    left = [file.name for file in folder.iterdir() if not file.name.endswith((".tmp", ".d"))]
    assert len(left) == 5


def test_it_is_pushed_in_one_file(saved: dict[int, Path], tmp_path: Path) -> None:
    names = write_folder(saved[3] / "topk", "org/name", tmp_path / "out")
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(load_sae(tmp_path / "out").W_dec, load_sae(saved[1] / "topk").W_dec)


def test_from_the_hub(saved: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, filename: str, **options: object) -> str:
        asked.append(filename)
        file = saved[3] / "topk" / filename
        if not file.is_file():
            raise EntryNotFoundError(filename)
        return str(file)

    for module in ("csae.saving", "csae.checkpoint", "huggingface_hub.hub_mixin"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    loaded = load_sae("org/name")
    assert torch.equal(loaded.W_dec, load_sae(saved[3] / "topk").W_dec)
    assert {INDEX, FIRST, SECOND} <= set(asked)


def test_a_part_is_not_taken_for_a_whole_tensor(tmp_path: Path) -> None:
    sae: SAE = TopKSAE(6, 10, 3)
    sae.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({("W_dec[0:10]" if name == "W_dec" else name): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match="W_dec is missing"):
        load_sae(tmp_path)
