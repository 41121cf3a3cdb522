"""When a rank fails, all end within a minute, and one line says why."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ended, Ranks, told

from csae.data.shard_writer import write_shards
from csae.errors import UserError

STEPS = 12


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 windows of 7 positions, of width 6; and 24 of them beside it."""
    folder = tmp_path_factory.mktemp("activations") / "acts"
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(30, 7, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    for name, n in (("acts", 30), ("acts-short", 24)):
        write_shards(
            folder.with_name(name), lambda w: {"activations": acts[w.start : w.stop]}, n, 8, {"keep_first": True}
        )
    return folder


def arguments(activations: Path, out: Path, *more: object) -> list[object]:
    size = ["--d-sae", 12, "--k", 2, "--batch-windows", 4, "--tokens", STEPS * 4 * 7, "--held-out", 0.1]
    how = ["--arch", "topk", "--device", "cpu", "--log-every", 1, "--checkpoint-every", 1000]
    return ["train", "-o", out, "--activations", activations, *size, *how, *more]


def ended(size: int, tmp_path: Path, given: Any, prepare: Any = None) -> list[Ended]:
    with Ranks(size, tmp_path / "said", given, prepare) as ranks:
        return ranks.wait()


def check(found: list[Ended], line: str, code: int = 2, failed: int | None = None) -> None:
    """All ended, and one line says why: that of the rank that failed, where it is known."""
    assert None not in [of.code for of in found], found
    assert 0 not in [of.code for of in found], found
    (said,) = told(found)
    assert line in said
    assert not any("Traceback" in of.said for of in found), found
    if failed is not None:
        assert said in found[failed].said
        assert found[failed].code == code


def each(step: int, do: Any) -> None:
    """Call `do` at a step of training, before it."""
    import csae.training

    before, count = csae.training.train_step, 0

    def train_step(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            do()
        return before(*given)

    csae.training.train_step = train_step


def test_ranks_with_other_options(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, lambda rank: arguments(activations, tmp_path / "run", "--lr", 0.1 + rank))
    check(found, "--lr: rank 1 was given 1.1, rank 0 0.1; needed the same command on all ranks")
    assert not (tmp_path / "run").exists()


def _short(rank: int) -> None:
    from csae.data import sources
    from csae.distributed import same_data

    same_data.check_same_data = lambda *given: None  # training itself compares too
    before = sources._of_shards
    if rank == 1:
        sources._of_shards = lambda folder, *given: before(f"{folder}-short", *given)


def test_a_shorter_data_set_on_one_rank(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run"), _short)
    check(found, "n_windows: rank 1 has 22 windows to train on, rank 0 has 27; needed the same data on all ranks")
    assert not (tmp_path / "run").exists()


def _other_files(rank: int) -> None:
    from csae.distributed import same_data

    before = same_data.of_folder
    if rank == 1:
        same_data.of_folder = lambda folder: before(Path(f"{folder}-short"))


def test_other_numbers_in_the_same_folder_on_one_rank(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run"), _other_files)
    check(found, "rank 1 has other numbers there than rank 0; needed the same files on all machines")
    assert not (tmp_path / "run").exists()


def _no_memory(rank: int) -> None:
    def do() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if rank == 1:
        each(3, do)


def test_out_of_memory_on_one_rank(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run"), _no_memory)
    check(found, "not enough memory (tried to allocate 2.00 GiB)", failed=1)


def _killed(rank: int) -> None:
    if rank == 1:
        each(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed(activations: Path, tmp_path: Path, size: int) -> None:
    found = ended(size, tmp_path, arguments(activations, tmp_path / "run"), _killed)
    assert found[1].code == -signal.SIGKILL
    check(found, "rank 1 ended without a word (killed, or out of memory): the same command goes on from what is saved")


def _refused_windows(rank: int) -> None:
    from csae.data.shard_activations import ShardActivations

    read = ShardActivations.read_all

    def read_all(self: Any, windows: Any) -> Any:
        if 5 in windows and len(windows) < 4:  # not where the normalisation is measured
            raise UserError("shard 0: NaN or Inf in window 5")
        return read(self, windows)

    if rank == 1:
        ShardActivations.read_all = read_all  # type: ignore[method-assign]


def test_windows_that_one_rank_cannot_read(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run"), _refused_windows)
    check(found, "shard 0: NaN or Inf in window 5", failed=1)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def _broken_windows(rank: int) -> None:
    from csae.data.batches import IndexedBatches

    read = IndexedBatches._read

    def broken(self: Any, windows: Any) -> Any:
        batches = read(self, windows)
        if rank == 1 and 5 in windows:
            next(iter(batches.values())).acts[list(windows).index(5), 3] = torch.nan
        return batches

    IndexedBatches._read = broken  # type: ignore[method-assign]


def test_activations_that_are_not_finite_on_one_rank(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run"), _broken_windows)
    check(found, f"{tmp_path / 'run'}: NaN or Inf in the activations of windows ", failed=1)
    assert "5" in told(found)[0].rpartition("windows ")[0]


def _full_disk(rank: int) -> None:
    import csae.training

    before, count = csae.training.append_line, 0

    def append_line(*given: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise UserError("metrics.jsonl: can't be written: the disk is full")
        before(*given)

    if rank == 0:
        csae.training.append_line = append_line


def test_a_full_disk_of_rank_0(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run"), _full_disk)
    check(found, "metrics.jsonl: can't be written: the disk is full", failed=0)


def no_room(n_bytes: int) -> None:
    """From here on this process can't write a file that is larger; progress of the command has a file too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def _no_room_from_step_5(rank: int) -> None:
    if rank == 1:
        each(5, lambda: no_room(1000))


def _no_room_in_the_end(rank: int) -> None:
    if rank == 1:
        each(STEPS, lambda: no_room(1000))


@pytest.mark.parametrize(
    ("every", "prepare", "file", "left"),
    [(3, _no_room_from_step_5, "checkpoint-6", 3), (5, _no_room_in_the_end, "model-00002-of-00002.safetensors", 10)],
    ids=["a checkpoint", "the SAE"],
)
def test_a_full_disk_of_another_rank(
    every: int, prepare: Any, file: str, left: int, activations: Path, tmp_path: Path
) -> None:
    given = arguments(activations, tmp_path / "run", "--checkpoint-every", every)
    found = ended(2, tmp_path, given, prepare)
    check(found, "it is larger than this file system or its limits allow", failed=1)
    assert f"{tmp_path / 'run' / file}: " in told(found)[0]
    assert [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name] == [f"checkpoint-{left}"]
    assert not list((tmp_path / "run").glob("model*"))
    assert [of.code for of in ended(3, tmp_path / "again", given)] == [0, 0, 0]


def _differs(rank: int) -> None:
    import csae.training

    before = csae.training.train_step

    def train_step(sae: Any, *given: Any) -> Any:
        if rank == 1:
            with torch.no_grad():
                sae.b_dec[0] += 1e-7
        return before(sae, *given)

    csae.training.train_step = train_step


def test_ranks_whose_numbers_differ(activations: Path, tmp_path: Path) -> None:
    given = arguments(activations, tmp_path / "run", "--checkpoint-every", 2)
    check(ended(2, tmp_path, given, _differs), "b_dec: ranks 0 and 1 should have the same numbers, and differ")


def _a_bug(rank: int) -> None:
    def do() -> None:
        raise IndexError("a mistake of ours")

    if rank == 1:
        each(3, do)


def test_an_error_of_our_own_shows_where_it_is_once(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run"), _a_bug)
    assert [of.code for of in found] == [1, 1]
    assert found[1].said.count("IndexError: a mistake of ours") == 1
    assert "Traceback" not in found[0].said
    assert not told(found)


def _asked_to_stop(rank: int) -> None:
    if rank == 1:
        each(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_a_stop_that_one_rank_is_asked_for(activations: Path, tmp_path: Path) -> None:
    given = arguments(activations, tmp_path / "run")
    found = ended(2, tmp_path, given, _asked_to_stop)
    check(found, f"stopped after step 3 of {STEPS}; the same command goes on from there", code=130)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_command_that_runs_in_one_process(tmp_path: Path) -> None:
    found = ended(2, tmp_path, ["demo", "-o", tmp_path / "demo"])
    check(found, "csae demo: runs in one process, and this is one of 2: start it without torchrun")


def _hangs(rank: int) -> None:
    if rank == 1:
        each(3, lambda: time.sleep(3600))


@pytest.mark.slow
def test_a_rank_that_hangs(activations: Path, tmp_path: Path) -> None:
    found = ended(2, tmp_path, arguments(activations, tmp_path / "run", "--timeout", 5), _hangs)
    check(found, "another rank did not answer within --timeout")


def test_one_process_has_no_replicas(activations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.cli import cli

    monkeypatch.setattr(sys, "argv", ["csae"])
    with pytest.raises(UserError, match="--data-ranks: given 2 in one process; needed torchrun"):
        cli([str(of) for of in arguments(activations, tmp_path / "run", "--data-ranks", 2)], standalone_mode=False)
