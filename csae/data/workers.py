"""Work done in other processes, with its results in the order of its items.

The processes are started as programs of their own and not forked, so neither threads nor a script without a main guard
do harm. They end when this process does, however that ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, BinaryIO, Generic, TypeVar

from csae.errors import UserError, first_line

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2  # items a process that are read before they are needed
PROGRAM = "from csae.data.workers import serve; serve()"


class Waiting(Exception):
    """A result is not there yet."""


class InOrder(Generic[T, R]):
    """work(item) of each item, in their order, done in so many processes; 0 for a thread of this one.

    Items are taken in a thread of their own, so waiting for one does not keep back results that are there. At most
    three items a process are on the way.
    """

    def __init__(self, work: Callable[[T], R], items: Iterable[T], processes: int) -> None:
        """Raises UserError where work can't be sent to a process."""
        n = max(1, processes)
        self._work, self._items = work, items
        self._program = _pickled(work) if processes else None
        self._results: queue.Queue[Future[R] | None] = queue.Queue(maxsize=AHEAD * n)
        self._next: Future[R] | None = None
        self._stop = threading.Event()
        self._local = threading.local()
        self._processes: list[_Process] = []
        self._pool = ThreadPoolExecutor(n, thread_name_prefix="csae-worker")
        # A daemon: it may be waiting for a network when the program ends.
        threading.Thread(target=self._take, name="csae-reader", daemon=True).start()

    def get(self, patience: float | None = None) -> R | None:
        """The next result; None after the last. An error of the items or of work is raised where its result would be.

        patience: seconds. Raises Waiting where it takes longer; UserError where a process died.
        """
        try:
            if self._next is None:
                self._next = self._results.get(timeout=patience)
        except queue.Empty as empty:
            raise Waiting from empty
        if self._next is None:
            return None
        wait([self._next], patience)
        if not self._next.done():
            raise Waiting
        found, self._next = self._next, None
        return found.result()

    def close(self) -> None:
        """Stop all of it; the processes end."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()

    def _do(self, item: T) -> R:
        if self._program is None:
            return self._work(item)
        if not hasattr(self._local, "process"):
            self._local.process = _Process(self._program)
            self._processes.append(self._local.process)
            if self._stop.is_set():
                self._local.process.close()
        return self._local.process(item)

    def _take(self) -> None:
        try:
            for item in self._items:
                if self._stop.is_set():
                    return
                self._put(self._pool.submit(self._do, item))
            self._put(None)
        except BaseException as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            self._put(failed)

    def _put(self, result: Future[R] | None) -> None:
        while not self._stop.is_set():
            try:
                return self._results.put(result, timeout=0.1)
            except queue.Full:
                continue


class _Process:
    """A process that does the work, an item at a time."""

    def __init__(self, program: bytes) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        # A session of its own: Ctrl-C at the terminal is for this process, which decides when the work ends.
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self._send(program)

    def __call__(self, item: Any) -> Any:
        self._send(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        try:
            error, result = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, pickle.UnpicklingError) as lost:
            raise self._died() from lost
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent yet
                pipe.close()  # type: ignore[union-attr]

    def _send(self, content: bytes) -> None:
        try:
            self._process.stdin.write(content)  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except OSError as error:
            raise self._died() from error

    def _died(self) -> UserError:
        status = self._process.wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return UserError(
            f"--workers: a process that makes token ids ended with {how}: there may be too little memory; give fewer"
        )


def serve() -> None:
    """What such a process runs: it reads the work, then item after item, and writes (error, result) for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = sys.stdin.buffer
    # What anything prints goes to stderr, as stdout is for results.
    results: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work = pickle.load(source)
    while True:
        try:
            item = pickle.load(source)
        except EOFError:
            return
        try:
            answer = pickle.dumps((None, work(item)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            kept = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
            answer = pickle.dumps((kept, None), pickle.HIGHEST_PROTOCOL)
        try:
            results.write(answer)
            results.flush()
        except OSError:  # nobody is there to read it
            return


def _pickled(work: object) -> bytes:
    try:
        return pickle.dumps(work, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # of a foreign class
        raise UserError(
            f"--workers: the model's tokenizer can't be sent to another process ({first_line(error)}): give 0"
        ) from error
