"""Checkpoints of several ranks that are damaged, mixed, or not written to the end: one line, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from one_line import one_line
from processes import run
from test_checkpoint import _write, filled, job, state

from csae.checkpoint import last_checkpoint, load_sae, restore_checkpoint, save_checkpoint
from csae.checkpoint_folders import remove_checkpoints
from csae.errors import FailedElsewhere, UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs whose last checkpoint three ranks wrote: the same step, with other numbers."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    for seed, folder in enumerate(folders, 1):
        run(3, _write, folder, seed)
    return folders[0] / "topk" / "checkpoint-4", folders[1] / "topk" / "checkpoint-4"


def flip(file: Path, at: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 64
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


class Command:
    """A pickle of it runs a command when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it-ran",)


def replace_metadata(folder: Path, content: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    checksum = hashlib.sha256((folder / ".metadata").read_bytes()).hexdigest()
    edit(folder / "training.json", lambda of: of["sha256"].update({".metadata": checksum}))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a bit of a rank's file": lambda one, other: flip(one / "__1_0.distcp"),
    "a bit of the metadata": lambda one, other: flip(one / ".metadata"),
    "a rank's file is cut short": lambda one, other: cut(one / "__2_0.distcp"),
    "a rank's file is missing": lambda one, other: (one / "__0_0.distcp").unlink(),
    "a rank's file of another checkpoint": lambda one, other: shutil.copy(other / "__1_0.distcp", one),
    "the metadata of another checkpoint": lambda one, other: shutil.copy(other / ".metadata", one),
    "the state of another checkpoint": lambda one, other: shutil.copy(other / "training.json", one),
    "the config": lambda one, other: edit(one / "config.json", lambda of: of.update(k=2)),
    "no checksums": lambda one, other: edit(one / "training.json", lambda of: of.pop("sha256")),
    "a file without a checksum": lambda one, other: edit(
        one / "training.json", lambda of: of["sha256"].pop("__2_0.distcp")
    ),
    "the checksum of a file elsewhere": lambda one, other: edit(
        one / "training.json", lambda of: of["sha256"].update({"../secret": "0"})
    ),
    "metadata that runs a command": lambda one, other: replace_metadata(one, Command()),
    "metadata of something else": lambda one, other: replace_metadata(one, {"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_one_line(
    damage: str, written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = shutil.copytree(written[0], tmp_path / "topk" / "checkpoint-4")
    DAMAGES[damage](checkpoint, written[1])
    sae, optimizer, _ = filled(2, "topk", None)
    before = state(sae, optimizer, {})
    with pytest.raises(UserError) as error:
        restore_checkpoint(checkpoint, sae, optimizer, job(sae))
    assert f"{checkpoint}: not a whole checkpoint of this run (" in one_line(error)
    assert all((tensor == before[name]).all() for name, tensor in state(sae, optimizer, {}).items())
    with pytest.raises(UserError) as error:
        load_sae(checkpoint)
    assert str(checkpoint) in one_line(error)
    assert not (tmp_path / "it-ran").exists()


def test_a_whole_one_of_another_job_is_refused(written: tuple[Path, Path]) -> None:
    sae, optimizer, _ = filled(2, "topk", None)
    with pytest.raises(UserError, match="names another run"):
        restore_checkpoint(written[0], sae, optimizer, job(sae) | {"data": 2})


def _said(ranks: Any, work: Callable[..., object], *given: Any) -> str:
    """What a rank says of what it could not do."""
    try:
        work(ranks, *given)
    except (UserError, FailedElsewhere) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _restore(ranks: Any, checkpoint: Path) -> None:
    sae, optimizer, _ = filled(2, "topk", ranks)
    restore_checkpoint(checkpoint, sae, optimizer, job(sae))


def test_one_rank_says_it(written: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(written[0], tmp_path / "topk" / "checkpoint-4")
    flip(checkpoint / "__1_0.distcp")
    said = run(2, _said, _restore, checkpoint)
    assert sorted(of.split(": ")[0] for of in said) == ["FailedElsewhere", "UserError"]
    assert all("__1_0.distcp: not the file that training.json was written with" in of for of in said)


def test_what_one_process_wrote_and_is_damaged(tmp_path: Path) -> None:
    _write(None, tmp_path)
    flip(tmp_path / "topk" / "checkpoint-4" / "optimizer.safetensors", at=-2)
    said = run(3, _said, _restore, tmp_path / "topk" / "checkpoint-4")
    assert [of.split(": ")[0] for of in said] == ["FailedElsewhere", "UserError", "FailedElsewhere"]


def _save(ranks: Any, folder: Path, of: int, failing: Callable[[], object]) -> None:
    """The next checkpoint, on whose way one rank fails."""
    sae, optimizer, beside = filled(3, "topk", ranks)
    if ranks.rank == of:
        failing()
    save_checkpoint(folder / "topk", 6, sae, optimizer, job(sae), beside).result()


def no_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.parametrize("full", [0, 2])
def test_a_full_disk_on_one_rank(full: int, written: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(written[0], tmp_path / "topk" / "checkpoint-4")
    said = run(3, _said, _save, tmp_path, full, no_room)
    assert [of.split(": ")[0] for of in said] == [
        "UserError" if rank == full else "FailedElsewhere" for rank in (0, 1, 2)
    ]
    assert "larger than this file system or its limits allow" in said[full]
    assert {entry.name for entry in (tmp_path / "topk").iterdir()} == {"checkpoint-4"}
    assert run(2, _said, _restore, tmp_path / "topk" / "checkpoint-4") == ["done", "done"]


def dies_while_writing() -> None:
    dcp.FileSystemWriter.write_data = lambda *given: os._exit(1)  # type: ignore[method-assign]


def dies_before_the_name() -> None:
    os.rename = lambda *given: os._exit(1)  # type: ignore[assignment]


def dies_before_the_old_is_removed() -> None:
    rename = os.rename

    def once(one: Path, other: Path) -> None:
        if "checkpoint-4" in str(one):
            os._exit(1)
        rename(one, other)

    os.rename = once  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("of", "dies", "last"),
    [
        (2, dies_while_writing, 4),
        (0, dies_while_writing, 4),
        (0, dies_before_the_name, 4),
        (0, dies_before_the_old_is_removed, 6),
    ],
)
def test_killed_on_the_way(
    of: int, dies: Callable[[], None], last: int, written: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(written[0], tmp_path / "topk" / "checkpoint-4")
    with pytest.raises((AssertionError, RuntimeError)):
        run(3, _save, tmp_path, of, dies)
    checkpoint = last_checkpoint(tmp_path / "topk")
    assert checkpoint == tmp_path / "topk" / f"checkpoint-{last}"
    sae, optimizer, _ = filled(2, "topk", None)
    _, beside = restore_checkpoint(checkpoint, sae, optimizer, job(sae))
    expected = state(*filled(1 if last == 4 else 3, "topk", None))
    assert all((tensor == expected[name]).all() for name, tensor in state(sae, optimizer, beside).items())
    save_checkpoint(tmp_path / "topk", 8, sae, optimizer, job(sae), beside).result()
    remove_checkpoints(tmp_path / "topk", job(sae), tmp_path / "topk" / "checkpoint-8")
    assert {entry.name for entry in (tmp_path / "topk").iterdir()} == {"checkpoint-8"}


def test_what_a_person_put_into_one_is_kept(written: tuple[Path, Path], tmp_path: Path) -> None:
    sae = filled(2, "topk", None)[0]
    for name in ("notes.txt", "__7_0.distcp"):
        checkpoint = shutil.copytree(written[0], tmp_path / name / "checkpoint-4")
        (checkpoint / name).write_text("mine")
        kept = remove_checkpoints(tmp_path / name, job(sae))
        assert list(kept) == [checkpoint]
        assert f"it holds {name}" in kept[checkpoint]
    checkpoint = shutil.copytree(written[0], tmp_path / "cut" / "checkpoint-4")
    (checkpoint / "__2_0.distcp").unlink()
    assert remove_checkpoints(tmp_path / "cut", job(sae)) == {checkpoint: "it has no __2_0.distcp"}
