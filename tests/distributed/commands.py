"""A command of `csae` in several processes, as torchrun starts them, and what becomes of each.

Ranks start from a process that has the modules already, and nobody ends the others when one ends: they have to notice.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import _context
from torch.distributed import TCPStore

AT_ONCE = 50.0  # seconds: within a minute all ranks have ended


class Ended(NamedTuple):
    """What became of a rank."""

    code: int | None
    """as `multiprocessing.Process.exitcode`; None where it had to be killed"""
    said: str
    """on stderr, without what begins with a progress bar"""
    printed: str


class Ranks:
    """The processes of one command. `with Ranks(...) as ranks: ...; ranks.wait()`; none is left behind."""

    def __init__(
        self,
        size: int,
        folder: Path,
        arguments: Sequence[object] | Callable[[int], Sequence[object]],
        prepare: Callable[..., None] | None = None,
        restart: int = 0,
    ) -> None:
        """arguments: of `csae`, or of each rank. prepare(rank): called in each rank before the command."""
        folder.mkdir(parents=True, exist_ok=True)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.files = [(folder / f"{restart}-{rank}.err", folder / f"{restart}-{rank}.out") for rank in range(size)]
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(size):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "TORCHELASTIC_RESTART_COUNT": restart,
            }
            argv = [str(of) for of in (arguments(rank) if callable(arguments) else arguments)]
            process = _context.Process(
                target=_in_rank, args=(environment, argv, self.files[rank], prepare, rank), daemon=True
            )
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, seconds: float = AT_ONCE) -> list[Ended]:
        """What became of them; those that still run after so many seconds have no code."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        found = []
        for process, (err, out) in zip(self.processes, self.files, strict=True):
            lines = err.read_text(errors="replace").replace("\r", "\n").splitlines()
            said = [line for line in lines if line.strip() and "step/s]" not in line]
            found.append(Ended(process.exitcode, "\n".join(said), out.read_text()))
        return found


def told(ended: Sequence[Ended]) -> list[str]:
    """The lines of `csae:` that all ranks said."""
    return [line for of in ended for line in of.said.splitlines() if line.startswith("csae:")]


def _in_rank(
    environment: dict[str, Any],
    argv: list[str],
    files: tuple[Path, Path],
    prepare: Callable[..., None] | None,
    rank: int,
) -> None:
    from csae.__main__ import main

    os.environ.update({name: str(value) for name, value in environment.items()})
    for number, file in zip((2, 1), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    sys.argv = ["csae", *argv]
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
