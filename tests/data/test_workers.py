from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from one_line import one_line

from csae.data.workers import InOrder, Waiting
from csae.errors import UserError


def in_order(work: Callable[[int], Any], items: Iterable[int], processes: int) -> Iterator[Any]:
    """The results, with None for the end left out."""
    results = InOrder(work, items, processes)
    try:
        while (result := results.get()) is not None:
            yield result
    finally:
        results.close()


def late(item: int) -> tuple[int, int]:
    """Takes the longer the smaller the item is."""
    time.sleep(0.01 * (3 - item % 4))
    return item, os.getpid()


def fail(item: int) -> int:
    print("a library says something")
    if item == 3:
        raise UserError("three is too many")
    return item + 1


def die(item: int) -> int:
    os._exit(9) if item == 3 else None
    return item


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_the_order_of_their_items(processes: int) -> None:
    results = list(in_order(late, range(20), processes))
    assert [item for item, _ in results] == list(range(20))
    pids = {pid for _, pid in results}
    assert pids == {os.getpid()} if processes == 0 else (os.getpid() not in pids and len(pids) <= processes)


def test_no_more_items_are_taken_than_a_few() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = in_order(lambda item: item, items(), 0)
    assert next(results) == 1
    time.sleep(0.3)
    assert taken < 8
    results.close()
    time.sleep(0.3)
    before = taken
    time.sleep(0.2)
    assert taken == before


@pytest.mark.parametrize("processes", [0, 1])
def test_errors_come_where_the_result_would_be(processes: int) -> None:
    results = in_order(fail, range(5), processes)
    assert [next(results) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="three is too many"):
        next(results)


def test_patience() -> None:
    go, finished = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        go.wait()
        yield 1

    def work(item: int) -> int:
        return item if not item else (finished.wait(), item)[1]

    results = InOrder(work, items(), 0)
    assert results.get(60) == 0
    for event in (go, finished):  # first the item is late, then the work
        with pytest.raises(Waiting):
            results.get(0.05)
        event.set()
    assert results.get(60) == 1
    assert results.get() is None
    results.close()


def test_errors_of_the_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ConnectionError("gone")

    results = in_order(fail, items(), 0)
    assert next(results) == 2
    with pytest.raises(ConnectionError, match="gone"):
        next(results)


def test_a_process_that_dies() -> None:
    results = in_order(die, range(5), 1)
    with pytest.raises(
        UserError, match=r"--workers: a process that makes token ids ended with status 9: .*give fewer"
    ) as e:
        list(results)
    one_line(e)


def test_work_that_cannot_be_sent() -> None:
    with pytest.raises(UserError, match=r"--workers: .* can't be sent to another process .*: give 0") as error:
        list(in_order(lambda item: item, range(2), 1))
    one_line(error)


def test_processes_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # without a main guard
    script.write_text(
        "import os, signal\n"
        "from test_workers import in_order, late\n"
        "results = in_order(late, iter(int, 1), 2)\n"
        "print(*{next(results)[1] for _ in range(8)}, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, timeout=100)
    pids = [int(pid) for pid in run.stdout.split()]
    assert pids, run.stderr
    until = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
