"""When a rank ends: one of them says why, in one line, and none waits for those that are gone.

Ranks leave notes for each other in the store that torchrun keeps:

    csae/RESTART/options/RANK    which it was given
    csae/RESTART/different       what rank 0 says of all of them
    csae/RESTART/process/RANK    which process it is
    csae/RESTART/over/RANK       it ended by itself, well or not
    csae/RESTART/told            how many had something to tell: the first one does
    csae/RESTART/failed          one of them failed

A thread looks after the others: NCCL, and a rank that computes, would notice an end only when the timeout is over.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, ClassVar, NoReturn

import torch.distributed as dist

from csae.distributed.ranks import Ranks, joined
from csae.errors import FailedElsewhere, Stopped, UserError, memory_problem, shown
from csae.progress import say

EVERY = 1.0  # seconds
GRACE = 15.0  # seconds, for a rank to end by itself when another one has failed
CONNECT = timedelta(seconds=10)
AS_LATE = timedelta(seconds=300)  # as others may be: they import the same libraries
# What gloo and NCCL say when a rank is gone, in a RuntimeError.
BROKEN = re.compile(r"connect|peer|timed out|timeout|broken pipe|socket|abort|remote process", re.IGNORECASE)
BECAUSE = "it ended because another rank did"
GO_ON = "the same command goes on from what is saved"


@contextmanager
def started(options: dict[str, Any], device: str | None, timeout_s: float, data: int = 1) -> Iterator[Ranks | None]:
    """`csae.distributed.joined`, for a command with these options; None in one process.

    From here on this process ends when another one of its ranks has failed, or has ended without a word. Raises
    UserError where ranks were given other options.
    """
    torchrun_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if torchrun_keeps_it:  # else rank 0 keeps it, once it has joined
        _begin(options)
    with joined(device, timeout_s, data) as ranks:
        if ranks is not None and not torchrun_keeps_it:
            _begin(options)
        yield ranks
        over()


def n_processes() -> int:
    """How many processes torchrun started, this one included; 1 where it did not."""
    given = os.environ.get("WORLD_SIZE", "")
    return int(given) if given.isdecimal() and len(given) < 10 else 1


def end(error: BaseException, told: tuple[str | None, int] | None) -> NoReturn:
    """End this process after an error. It says why, unless another rank did.

    told: the line, or None for none, and the exit code; None for an error that none was made for.
    """
    code = 1 if told is None else told[1]
    tells = False
    try:
        if not isinstance(error, FailedElsewhere):
            # click, and who says what is saved, raise another error of it.
            interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)
            line = lost(error) or (_peers_lost() if interrupted else None)
            if line is not None:
                told = f"csae: {line}", 1
            tells = is_first_to_tell(failed=not isinstance(error, Stopped))
            if tells:
                if told is None:
                    traceback.print_exception(error)
                elif told[0] is not None:
                    say(told[0])
                tell_torchrun((told and told[0]) or f"{type(error).__name__}: {error}")
        if not tells:
            tell_torchrun(BECAUSE, first=False)
        over()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)  # what is still to be done in order might wait for a rank that is gone


def is_first_to_tell(failed: bool = True, store: dist.TCPStore | None = None) -> bool:
    """Whether no other rank has told why it ends. Without a store that answers, each tells."""
    store = store or _Notes.store()
    if store is None:
        return True
    try:
        first = store.add(_key("told"), 1) == 1
        if failed:
            store.set(_key("failed"), "1")
    except RuntimeError:  # rank 0 kept it, and is gone
        return True
    return bool(first)


def over() -> None:
    """Leave a note that this rank ends by itself."""
    _Notes.is_over.set()
    store = _Notes.store()
    if store is not None:
        with suppress(RuntimeError):
            store.set(_key("over", _rank()), "1")


def lost(error: BaseException) -> str | None:
    """What to say of an error of torch.distributed that another rank's end explains; None of another error."""
    if not isinstance(error, RuntimeError) or memory_problem(error) is not None:
        return None
    if not isinstance(error, dist.DistError) and not (
        _comes_from_a_collective(error.__traceback__) and BROKEN.search(str(error))
    ):
        return None
    found = _peers_lost()
    if found is not None:
        return found
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        return f"another rank did not answer within --timeout: it hangs, or it needs longer ({GO_ON})"
    return f"the connection to another rank broke ({_short(error)}): {GO_ON}"


def _peers_lost() -> str | None:
    gone = _gone_ranks(_Notes.store(), wait=2.0)
    return _ended(gone) if gone else None


def tell_torchrun(line: str, first: bool = True) -> None:
    """Let torchrun's own report of what failed hold this line. first: it is the root cause.

    torchrun takes the failure of the earliest second for the root cause, and other ranks may end in the same one.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or (not first and os.path.exists(file)):
        return
    extra = {"py_callstack": line.strip(), "timestamp": str(int(time.time()) - first)}
    with suppress(OSError), open(file, "w", encoding="utf-8") as opened:
        json.dump({"message": {"message": line, "extraInfo": extra}}, opened)


class _Notes:
    """The connection to the store, and what was read there."""

    opened: dist.TCPStore | None = None
    failed = False
    is_over = threading.Event()
    """set when this rank ends by itself"""
    processes: ClassVar[dict[int, int | None]] = {}
    """of ranks; None where one of that number could be another's here"""

    @classmethod
    def store(cls) -> dist.TCPStore | None:
        """None in one process, and where there is no store that answers."""
        if n_processes() <= 1 or cls.failed:
            return None
        if cls.opened is None:
            try:
                cls.opened = _connected()
            except (KeyError, ValueError, RuntimeError):
                cls.failed = True
        return cls.opened


def _connected() -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=CONNECT, wait_for_workers=False)


def _begin(options: dict[str, Any]) -> None:
    store = _Notes.store()
    if store is None:
        return
    store.set(_key("process", _rank()), f"{_place()} {os.getpid()}")
    # A connection of its own: who waits on one keeps the others from it.
    threading.Thread(target=_look_after_others, args=(_connected(),), name="csae-ranks", daemon=True).start()
    store.set(_key("options", _rank()), json.dumps(options, default=str))
    if _rank() == 0:
        store.set(_key("different"), _difference(store))
    store.wait([_key("different")], AS_LATE)
    different = store.get(_key("different")).decode()
    if different:
        raise UserError(different)


def _difference(store: dist.TCPStore) -> str:
    """What rank 0 has to say of the options of all ranks; nothing where they are the same."""
    first: dict[str, Any] = {}
    for rank in range(n_processes()):
        store.wait([_key("options", rank)], AS_LATE)
        own = json.loads(store.get(_key("options", rank)))
        first = first or own
        for name in sorted(own.keys() | first.keys()):
            if own.get(name) != first.get(name):
                return (
                    f"--{name.replace('_', '-')}: rank {rank} was given {_said(own.get(name))}, rank 0 "
                    f"{_said(first.get(name))}; needed the same command on all ranks"
                )
    return ""


def _look_after_others(store: dist.TCPStore) -> None:
    try:
        while not _Notes.is_over.wait(EVERY):
            gone = [] if store.check([_key("failed")]) else _gone_ranks(store)
            if gone and is_first_to_tell(store=store):
                line = f"csae: {_ended(gone)}"
                say(f"\n{line}")
                tell_torchrun(line)
            if store.check([_key("failed")]):
                if not _Notes.is_over.wait(GRACE):
                    tell_torchrun(BECAUSE, first=False)
                    os._exit(1)
                return
    except RuntimeError:  # the store is gone, and with it torchrun: nobody else would end this process
        if not _Notes.is_over.wait(GRACE):
            say(f"\ncsae: torchrun on the first machine is gone: {GO_ON}")
            os._exit(1)


def _gone_ranks(store: dist.TCPStore | None, wait: float = 0.0) -> list[int]:
    """The ranks on this machine whose process is gone without a note. wait: so many seconds for one at least."""
    until = time.monotonic() + wait
    while store is not None:
        try:
            gone = [rank for rank in _neighbours() if _is_gone(store, rank)]
        except RuntimeError:
            return []
        if gone or time.monotonic() > until:
            return gone
        time.sleep(0.1)
    return []


def _is_gone(store: dist.TCPStore, rank: int) -> bool:
    if rank not in _Notes.processes:
        if not store.check([_key("process", rank)]):
            return False
        place, _, pid = store.get(_key("process", rank)).decode().rpartition(" ")
        _Notes.processes[rank] = int(pid) if place == _place() else None
    process = _Notes.processes[rank]
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return not store.check([_key("over", rank)])
    except OSError:
        pass
    return False


def _neighbours() -> list[int]:
    """The other ranks that this machine's torchrun started; all of them where it does not say."""
    n = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    first = _rank() - int(os.environ.get("LOCAL_RANK") or 0)
    return [rank for rank in (range(first, first + n) if n else range(n_processes())) if rank != _rank()]


def _ended(ranks: list[int]) -> str:
    names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return f"{names} ended without a word (killed, or out of memory): {GO_ON}"


def _comes_from_a_collective(trace: TracebackType | None) -> bool:
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(("torch.distributed", "csae.distributed")):
            return True
        trace = trace.tb_next
    return False


def _said(value: Any) -> str:
    return shown(", ".join(map(str, value)) if isinstance(value, list) else value)


def _short(error: BaseException) -> str:
    """What it says first, without the place in gloo's or NCCL's code."""
    line = re.sub(r"^\[[^]]*:\d+\]\s*", "", " ".join(str(error).split("\n", 1)[0].split()))
    return shown(line.split(". ")[0])[:120]


def _key(*names: object) -> str:
    return "/".join(map(str, ("csae", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), *names)))


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _place() -> str:
    """Where process numbers mean the same: a machine, a name space of processes, and one parent."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space} {os.getppid()}"
