"""All that needs a GPU, in two runs of five minutes: `make gpu`, and once more, which goes on where the first ended.

    python -m csae.bench.gpu [--out FOLDER] [--seconds 290] [--fresh] [--peers FOLDER] [--compiled FOLDER]
    python -m csae.bench.gpu --rehearse      the same order without a GPU: kernels are interpreted, in tiny sizes

The cases are in gpu_cases.py, the most telling first. Each has a process of its own, so that an error of CUDA spoils no
other one, and is stopped when its time is up: by SIGINT, and five seconds later by SIGKILL. After each case everything
that is known is written: build/gpu/state.json, from which the next run goes on; bench/results/<device>.json;
bench/RESULTS.md; and the same, with the log and the tuned tiles, into the folder named by --out. A run that finds no
state in build/gpu goes on from that folder's. What failed is tried again by the next run, after all that is new. State
of other code is forgotten.

--compiled: a folder that `python -m csae.bench.compiled` filled: kernels that needn't be compiled here. --peers: a
folder with wheels of other libraries to measure against.

Needs torch, triton, numpy and what csae needs to be imported; pytest for the tests, compute-sanitizer for the memory
checker. No network and no virtual environment.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEAST = 8.0  # seconds: with less left no case is begun
GRACE = 5.0  # seconds from SIGINT to SIGKILL
PR_SET_PDEATHSIG = 1

Keep = Callable[[dict[str, Any]], None]
"""Writes what a case has found so far, which outlives its being stopped."""


class Skip(Exception):
    """A case can't be done here, which is no failure; the message says why."""


class Failed(Exception):
    """A case went wrong; the message says how."""


class Here(NamedTuple):
    """Where and how a run takes place."""

    rehearse: bool
    """no GPU: kernels are interpreted, sizes tiny, and no file of the repository is written"""
    state: Path
    """the folder that is kept between runs"""
    results: Path
    """the folder of the benchmark's JSON files"""
    table: Path
    """RESULTS.md"""
    tuned: Path
    """tuned.json"""
    out: Path | None = None
    peers: Path | None = None
    compiled: Path | None = None


class Case(NamedTuple):
    """A part of the run, in a process of its own."""

    name: str
    """its stage, a colon, and what it is"""
    seconds: float
    """after which it is stopped"""
    work: Callable[..., tuple[str, dict[str, Any]]]
    """given `here`, a `Keep` and the arguments: a line to print, and what was found, as JSON"""
    arguments: tuple[Any, ...] = ()


Record = dict[str, dict[str, Any]]
"""What is known of each case: ok, line, seconds, found."""


# --- a case in its process -------------------------------------------------------------------------------------------


def do(case: Case, here: Here, seconds: float) -> dict[str, Any]:
    """Do a case within that many seconds; returns what is to be recorded of it."""
    part, log = here.state / "part.json", here.state / "log.txt"
    part.unlink(missing_ok=True)
    with log.open("a") as file:
        file.write(f"\n=== {case.name}\n")
    start = time.monotonic()
    # Forked, so that torch is imported once. The parent never touches CUDA, which doesn't survive a fork.
    process = multiprocessing.get_context("fork").Process(target=_child, args=(case, here, part, log))
    process.start()
    try:
        process.join(max(1.0, seconds))
        late = process.is_alive()
    finally:
        _stop(process)
    found = json.loads(part.read_text()) if part.exists() else {}
    taken = time.monotonic() - start
    if late:
        found |= {"ok": False, "line": f"stopped after {taken:.0f} s"}
    elif "ok" not in found:
        found |= {"ok": False, "line": f"its process ended with exit code {process.exitcode}: {_last_line(log)}"}
    return {"found": {}, **found, "seconds": round(taken, 1)}


def _child(case: Case, here: Here, part: Path, log: Path) -> None:
    os.setsid()  # so that its children are stopped with it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    if sys.platform == "linux":  # where the parent is killed, it is not to go on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    known: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        known.update(found)
        _write(part, {"found": known})

    try:
        line, found = case.work(here, keep, *case.arguments)
        said = {"ok": not found.get("failed", False), "line": line}
        known.update(found)
    except Skip as reason:
        said = {"ok": True, "line": f"skipped: {reason}"}
    except Failed as reason:
        said = {"ok": False, "line": str(reason)}
    except KeyboardInterrupt:
        said = {"ok": False, "line": "stopped"}
    except Exception as error:
        traceback.print_exc()
        said = {"ok": False, "line": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    _write(part, said | {"found": known})
    sys.stdout.flush()
    os._exit(0)  # after an error of CUDA its destructors may hang or crash


def _stop(process: BaseProcess) -> None:
    """SIGINT to the process and its children, then SIGKILL."""
    assert process.pid is not None
    if process.is_alive():
        _signal(process.pid, signal.SIGINT)
        process.join(GRACE)
    _signal(process.pid, signal.SIGKILL)  # children may outlive it
    if process.is_alive():
        process.kill()  # it may have no group of its own yet
    process.join()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended
        os.killpg(group, number)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


# --- all of them -----------------------------------------------------------------------------------------------------


def go_on(cases: Sequence[Case], here: Here, until: float, say: Callable[[str], None] = print) -> bool:
    """Do what is not done yet, new cases first, then those that failed before this run. Returns whether all is well."""
    code = key()
    state = _read(here, code)
    record: Record = state["cases"]
    failed_before = {name for name, of in record.items() if not of["ok"]}
    for case in cases:
        if case.name in record and record[case.name]["ok"]:
            say(f"{case.name:<44} {record[case.name]['line']} (before)")
    new = [case for case in cases if case.name not in record]
    waiting = [*new, *(case for case in cases if case.name in failed_before)]
    while waiting:
        left = until - time.monotonic()
        if left < LEAST:
            say(f"time is up with {len(waiting)} cases to do: run it again to go on")
            break
        case = waiting.pop(0)
        found = do(case, here, min(left - LEAST / 2, case.seconds))
        record[case.name] = found
        if rest := found["found"].pop("rest", None):  # what is left of it, once more
            waiting.insert(0, case._replace(name=f"{case.name}, the rest", arguments=tuple(rest)))
        _publish(here, state)
        say(f"{case.name:<44} {'' if found['ok'] else 'FAILED: '}{found['line']} ({found['seconds']:.0f} s)")
    return not waiting and all(of["ok"] for of in record.values())


def _read(here: Here, code: str) -> dict[str, Any]:
    """What the run before wrote, here or into `here.out`; new if there is none, or none of this code."""
    for folder in filter(None, (here.state, here.out)):
        file = folder / "state.json"
        if file.exists():
            state: dict[str, Any] = json.loads(file.read_text())
            if state["code"] == code:
                if folder == here.out and (folder / "tuned.json").exists():
                    shutil.copy2(folder / "tuned.json", here.tuned)
                return state
    return {"code": code, "cases": {}}


def _publish(here: Here, state: dict[str, Any]) -> None:
    """Write the state, the results and the table, and all of it into the folder of --out."""
    from . import gpu_results

    _write(here.state / "state.json", state)
    files = [here.state / "state.json", here.state / "log.txt", here.tuned]
    files += gpu_results.write([of["found"] for of in state["cases"].values()], here.results, here.table)
    if here.out:
        here.out.mkdir(parents=True, exist_ok=True)
        for file in files:
            if file.exists():
                shutil.copy2(file, here.out / file.name)


def _write(file: Path, content: dict[str, Any]) -> None:
    """As JSON, at once or not at all."""
    file.with_suffix(".new").write_text(json.dumps(content, indent=1))
    os.replace(file.with_suffix(".new"), file)


def key() -> str:
    """A hash of the code."""
    digest = hashlib.sha256(sys.version.encode())
    files = {
        file.resolve() for folder in ("kernels", "csae", "bench", "tests") for file in (ROOT / folder).rglob("*.py")
    }
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--out", type=Path, help="a folder for a copy of all results")
    parser.add_argument("--peers", type=Path, help="a folder of wheels")
    parser.add_argument("--compiled", type=Path, help="a folder of compiled kernels")
    parser.add_argument("--seconds", type=float, default=290)
    args = parser.parse_args(arguments)
    until = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the case is stopped too
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU doesn't open it in the parent
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    cases = importlib.import_module(f"{__package__}.gpu_cases")  # imports triton, which reads the environment
    if not args.rehearse and not cases.has_gpu():
        print("no CUDA device here: `make gpu` needs one; `python -m csae.bench.gpu --rehearse` tries what it can")
        return 2
    state = ROOT / "build" / ("rehearsal" if args.rehearse else "gpu")
    if args.rehearse and args.out:
        state = args.out.resolve() / "build"  # rehearsals beside one another
    if args.fresh:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        outputs = (state / "results", state / "RESULTS.md", state / "tuned.json")
    else:
        outputs = (ROOT / "bench" / "results", ROOT / "bench" / "RESULTS.md", ROOT / "kernels/triton/tuned.json")
    given = (path and path.resolve() for path in (args.out, args.peers, args.compiled))
    here = Here(args.rehearse, state, *outputs, *given)
    well = go_on(cases.listed(here), here, until, lambda line: print(line, flush=True))
    summary = cases.summary(here)
    if summary:
        print("", summary, sep="\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
