"""Tests that take several processes: a function runs in each rank of a world on gloo.

def _check(ranks, *given): ...          # at the top level of the test's module
run(3, _check, *given)                  # gives what each rank returned, in the order of ranks
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

from csae.distributed import joined

# Processes start from one that has the modules already: a tenth of a second, where importing torch takes seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.device_mesh", "csae", "csae.train"])


def run(size: int, function: Callable[..., Any], *given: Any, data: int = 1, timeout_s: float = 60) -> list[Any]:
    """`function(ranks, *given)` in each of `size` processes; ranks is None in the only one. Raises what one raised."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # takes a free port
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = _context.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is there already
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        process = _context.Process(
            target=_in_rank, args=(theirs, environment, data, timeout_s, function, given), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    try:
        return _results(ends)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(ends: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ends):
        for end in wait([end for rank, end in enumerate(ends) if rank not in found]):
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                error, found[rank] = pickle.loads(ends[rank].recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if error is not None:
                raise error
    return [found[rank] for rank in range(len(ends))]


def _in_rank(
    end: Connection,
    environment: dict[str, Any],
    data: int,
    timeout_s: float,
    function: Callable[..., Any],
    given: tuple[Any, ...],
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    try:
        with joined("cpu", timeout_s, data) as ranks:
            found = function(ranks, *given)
            end.send_bytes(pickle.dumps((None, found)))  # send() would share memory of a process that ends
    except BaseException as error:
        try:
            end.send_bytes(pickle.dumps((error, None)))
        except (pickle.PicklingError, AttributeError):
            end.send_bytes(pickle.dumps((AssertionError(f"{type(error).__name__}: {error}"), None)))
        raise
