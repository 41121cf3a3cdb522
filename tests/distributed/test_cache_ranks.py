"""`csae cache` under torchrun: the files that one process writes, by any number of ranks, whatever stops them."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Ended, Ranks, told
from processes import run

from csae.cli import cli
from csae.errors import FailedElsewhere, UserError

HERE = Path(__file__).parent
WORDS = list(range(0, 370, 10))  # 37 windows, four a file


def _small(ranks: Any, folder: Path, several: bool, words: list[int] = WORDS, **options: Any) -> tuple[int, int, int]:
    sys.path[:0] = [str(HERE.parent / "data"), str(HERE.parent)]
    from test_cache import PLACES, Source, small

    return small(Source(words, places=PLACES if several else ()), folder, ranks=ranks, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _written(ranks: Any, folder: Path) -> list[Any]:
    """Several caches, as all of it in one world is quicker."""
    found = []
    for several in (False, True):
        here = folder / str(several)
        found.append(_small(ranks, here / "new", several))
        found.append(_small(ranks, here / "new", several))  # nothing is left to do
        found.append(_small(ranks, here / "drawn", several, shuffle=3, max_bytes=20_000))
        found.append(_small(ranks, here / "grown", several, WORDS[:9]))
        found.append(_small(ranks, here / "grown", several, append=True))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_the_files_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    (alone,) = run(1, _written, tmp_path / "alone")
    assert alone[:2] == [(37, 37, 0)] * 2
    assert alone[4] == (37, 28, 0)
    assert run(size, _written, tmp_path / "ranks") == [alone] * size
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")


def _refused(ranks: Any, folder: Path) -> list[str]:
    said = []
    attempts = [
        lambda: _small(ranks, folder / "a", False, WORDS[:8]),
        lambda: _small(ranks, folder / "a", False, WORDS),  # holds others
        lambda: _small(ranks, folder / "b", False, WORDS[ranks.rank :]),
        lambda: _small(ranks, folder / "c", False, max_bytes=10),
    ]
    for attempt in attempts:
        try:
            said.append(str(tuple(attempt())))
        except (UserError, FailedElsewhere) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_is_refused_is_said_once(tmp_path: Path) -> None:
    first, second = run(2, _refused, tmp_path)
    assert first[0] == second[0] == "(8, 8, 0)"
    assert "holds others" in first[1]
    assert first[1].startswith("UserError: activations")
    assert second[1].startswith("FailedElsewhere: rank 0: activations")
    assert first[2].startswith("FailedElsewhere: rank 1: rank 0 has another source (n_windows: 37, here 36)")
    assert second[2].startswith("UserError: rank 0 has another source (n_windows: 37, here 36)")
    assert "needed" in first[3]
    assert second[3].startswith("FailedElsewhere")


def _begun_without_room(ranks: Any, folder: Path, n_bytes: int) -> str:
    if ranks.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    try:
        return str(tuple(_small(ranks, folder, True)))
    except (UserError, FailedElsewhere) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("n_bytes", [0, 100])
def test_a_disk_that_is_full_from_the_start(n_bytes: int, tmp_path: Path) -> None:
    said = run(2, _begun_without_room, tmp_path / "acts", n_bytes)
    assert [of.split(": ")[0] for of in said] == ["UserError", "FailedElsewhere"]
    assert "larger than this file system or its limits allow" in said[0]
    assert not (tmp_path / "acts").exists()


def _small_files(rank: int) -> None:
    import csae.data.cache

    csae.data.cache.write_cache = functools.partial(csae.data.cache.write_cache, shard_bytes=4000)


def _no_room(full: int, rank: int) -> None:
    _small_files(rank)
    if rank == full:  # a file of windows is larger than this, what says whose they are is not
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank(full: int, tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{n} " * 8}) + "\n" for n in range(100, 160)))

    def cached(size: int, name: str, prepare: Any) -> list[Ended]:
        data = ["--dataset", tmp_path / "rows.jsonl", "--no-stream", "--n-ctx", 16, "--layer", 1, "--layer", 2]
        given = ["cache", "-o", tmp_path / name, "--model", tiny_model_path, "--device", "cpu", *data]
        with Ranks(size, tmp_path / "said", given, prepare) as ranks:
            return ranks.wait()

    found = cached(2, "acts", functools.partial(_no_room, full))
    assert all(of.code not in (0, None) for of in found), found
    (said,) = told(found)
    assert "it is larger than this file system or its limits allow" in said
    assert said in found[full].said
    assert found[full].code == 2
    for size, name in ((3, "acts"), (1, "whole")):
        found = cached(size, name, _small_files)
        assert not any(of.code for of in found), found
    assert len(contents(tmp_path / "whole")) > 6
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


PROGRAM = """
import sys, time
sys.path[:0] = [{here!r}]
from pathlib import Path
import csae.data.shard_writer as writer
from csae.distributed import joined
from test_cache_ranks import _small
slow = writer.save_plain
def save(*args, **kwargs):
    time.sleep(0.1)
    slow(*args, **kwargs)
writer.save_plain = save
def main():  # a process group may not outlive the program
    with joined("cpu", 60) as ranks:
        if ranks.rank == 0:  # what several ranks print at once may run together
            print("begun", flush=True)
        _small(ranks, Path({folder!r}), True)
main()
"""


def begun_by(size: int, folder: Path, program: Path) -> subprocess.Popen[str]:
    program.write_text(PROGRAM.format(here=str(HERE), folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(program)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the ranks in /proc")
def test_killed_at_any_moment_and_resumed_on_other_ranks(tmp_path: Path) -> None:
    run(1, _small, tmp_path / "whole", True)
    draw = random.Random(0)
    for size in (2, 3, 2):
        running = begun_by(size, tmp_path / "cut", tmp_path / "program.py")
        assert running.stdout.readline() == "begun\n"
        time.sleep(draw.uniform(0, 0.8))
        os.kill(draw.choice(ranks_of(running.pid)), signal.SIGKILL)
        running.communicate(timeout=60)
        assert running.returncode != 0
    assert contents(tmp_path / "cut") != contents(tmp_path / "whole")
    running = begun_by(3, tmp_path / "cut", tmp_path / "program.py")
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the ranks in /proc")
def test_a_killed_rank_is_told_in_one_line(tiny_model_path: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [{"text": " ".join(str(draw.randrange(10**6)) for _ in range(40))} for _ in range(4000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset", str(tmp_path / "rows.jsonl"), "--n-ctx", "16", "--max-bytes", "20MB"]
    where = ["--model", str(tiny_model_path), "--layer", "2", "--device", "cpu", "-o", str(tmp_path / "acts")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = ["-m", "csae", "cache", *data, *where]
    running = subprocess.Popen([*torchrun, "2", *command], stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if "caching" in line:
            break
    os.kill(ranks_of(running.pid)[1], signal.SIGKILL)
    _, err = running.communicate(timeout=60)
    said = [line for line in err.splitlines() if line.strip().startswith("csae: ")]
    assert said == ["csae: rank 1 ended without a word (killed, or out of memory): the same command goes on from what "
                    "is saved"]  # fmt: skip
    for name in ("acts", "alone"):
        where[-1] = str(tmp_path / name)
        cli(["cache", *data, *where], standalone_mode=False)
    assert contents(tmp_path / "acts") == contents(tmp_path / "alone")
