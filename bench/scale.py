"""What a training step sends between processes, and how long it takes: ours beside data parallelism.

    python -m csae.bench.scale [--processes 1 2 3 4] [--d-sae 4096 16384 65536 262144] [--rounds 5] [--out scale.json]
    python -m csae.bench.scale --quick         tiny sizes, in seconds
    python -m csae.bench.scale --page          writes the tables of docs/scale.md from bench/results/scale/cpu.json

torchrun starts the processes, which talk over gloo on this machine. Every collective of a step is intercepted
(`scale_count`), and beside that stand the bytes that Linux counted at each process's sockets. Steps are those of
`scale_steps`; `scale_projection` says what the counts mean for GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from csae.distributed import Ranks, joined

from . import scale_page
from .data import Built, Skip
from .harness import Report, device_name, versions
from .measure import map_large_blocks, median_and_spread, peak_bytes
from .scale_count import Collectives, purpose, socket_bytes
from .scale_steps import IMPLEMENTATIONS, SPARSIFY, Sizes

CPU = torch.device("cpu")
PROCESSES = (1, 2, 3, 4)
D_SAE = (4096, 16384, 65536, 262144)
SMALL = Sizes(n=768, T=64, d_in=64, d_sae=0, k=16)
"""that fit many features on a machine without GPUs"""
LARGE = Sizes(n=768, T=64, d_in=4096, d_sae=2048, k=64, precision="bfloat16")
"""the width and k of the projection: what is sent and the memory are looked at, not the time"""
ROUNDS = 5
HERE = Path(__file__).resolve().parent
TIMEOUT_S = 300.0
QUICK_LARGE = Sizes(n=24, T=2, d_in=256, d_sae=512, k=16, precision="bfloat16")


class Job(NamedTuple):
    """A step to look at."""

    impl: str
    sizes: Sizes
    rounds: int
    """steps that are timed; none: the peak of memory is measured instead"""


Say = Callable[[str], None]


def run(
    processes: Sequence[int] = PROCESSES,
    d_sae: Sequence[int] = D_SAE,
    rounds: int = ROUNDS,
    small: Sizes = SMALL,
    large: Sizes = LARGE,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
    start: Callable[[int, Sequence[Job], Say], list[dict[str, Any]]] | None = None,
) -> Report:
    """Every implementation, on each number of processes, at each d_sae.

    start: gives the results of jobs on so many processes; by torchrun if not given.

    Returns device, cores, versions, rounds, and results: a dict for each job and number of processes, with `sent`
    (a list of `scale_count.Sent`) and `bytes`, `socket_bytes`, `held`, `peak`, `fvu`, `median_ms`, `spread_ms`, or
    `skipped`. What is sent is the mean over ranks, and `bytes_most` that of the rank that sends most; `held` and `peak`
    (beyond what is held before a step) are of the rank that has most.
    """
    jobs = [Job(impl, small._replace(d_sae=F), rounds) for F in d_sae for impl in IMPLEMENTATIONS]
    grown = (large, large._replace(n=2 * large.n), large._replace(d_sae=2 * large.d_sae))
    counted = [Job(impl, sizes, 0) for impl in IMPLEMENTATIONS if impl != SPARSIFY for sizes in grown]
    several = [R for R in processes if R > 1]
    few_and_many = {min(several, default=0), max(several, default=0)}
    started, results = time.perf_counter(), []
    for R in processes:
        say(f"{time.perf_counter() - started:4.0f} s  {R} processes")
        results += (start or _torchrun)(R, jobs + (counted if R in few_and_many else []), say)
    return {
        "device": device_name(CPU),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
        "rounds": rounds,
        "results": results,
    }


def _torchrun(R: int, jobs: Sequence[Job], say: Say) -> list[dict[str, Any]]:
    """The results of jobs on R processes."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "jobs.json"), Path(folder, "results.jsonl")
        asked.write_text(json.dumps([job for job in jobs]))
        # A thread a process: on a machine of few cores more would only take turns.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        }
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(R)]
        command = [*start, "-m", "csae.bench.scale", "--worker", str(asked), str(found)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        results = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
        if done.returncode != 0:
            say(done.stdout)
            raise RuntimeError(
                f"{R} processes: ended with status {done.returncode} after {len(results)} of {len(jobs)} jobs"
            )
        return results


# --- in each process -------------------------------------------------------------------------------------------------


def work(asked: Path, found: Path) -> None:
    """Do the jobs in the file `asked` on this rank, with the others; rank 0 writes a line for each to `found`."""
    jobs = [Job(impl, Sizes(*sizes), rounds) for impl, sizes, rounds in json.loads(asked.read_text())]
    with joined("cpu", TIMEOUT_S) as ranks, open(found if is_first(ranks) else os.devnull, "a") as lines:
        for job in jobs:
            lines.write(json.dumps(measure(job, ranks)) + "\n")
            lines.flush()


def is_first(ranks: Ranks | None) -> bool:
    return ranks is None or ranks.rank == 0


def measure(job: Job, ranks: Ranks | None) -> dict[str, Any]:
    """What a step sends, holds, gives and takes. All ranks call it."""
    about = {"processes": 1 if ranks is None else ranks.size, "impl": job.impl, "sizes": job.sizes._asdict()}
    try:
        step = IMPLEMENTATIONS[job.impl](job.sizes, ranks)
    except Skip as reason:
        return about | {"skipped": str(reason)}
    if not job.rounds:
        map_large_blocks()  # for the memory's sake; it takes time
    for _ in range(2):  # DDP makes its buckets anew after the first
        fvu = step.run()
    _wait(ranks)
    before = socket_bytes()
    with Collectives(purpose) as counted:
        step.run()
    _wait(ranks)  # all of it has arrived
    after = socket_bytes()
    took = []
    for _ in range(job.rounds):
        _wait(ranks)
        start = time.perf_counter()
        step.run()
        took.append(1000 * (time.perf_counter() - start))
    own = {
        "sent": counted.sent,
        "socket_bytes": None if before is None or after is None else after - before,
        "held": step.held(),
        "peak": None if job.rounds else peak_bytes(Built(step.run, dict), CPU),
        "fvu": fvu,
        "took": took,
    }
    return about | _of_all([own] if ranks is None else _everyones(own, ranks))


def _of_all(each: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of those of all ranks: means; the largest of what is held; the slowest of each round."""
    R = len(each)
    sent: dict[tuple[str, str], list[float]] = {}
    for own in each:
        for kind, purpose_, calls, n in own["sent"]:
            entry = sent.setdefault((kind, purpose_), [0, 0.0])
            entry[0], entry[1] = max(entry[0], calls), entry[1] + n / R
    found = {
        "sent": [
            dict(zip(("kind", "purpose", "calls", "bytes"), (*which, *counts), strict=True))
            for which, counts in sent.items()
        ],
        "bytes": sum(n for _, n in sent.values()),
        "bytes_most": max(sum(one[3] for one in own["sent"]) for own in each),
        "socket_bytes": None
        if any(own["socket_bytes"] is None for own in each)
        else sum(own["socket_bytes"] for own in each) / R,
        "held": {what: max(own["held"][what] for own in each) for what in each[0]["held"]},
        "peak": None if any(own["peak"] is None for own in each) else max(own["peak"] for own in each),
        "fvu": sum(own["fvu"] for own in each) / R,
    }
    slowest = [max(times) for times in zip(*(own["took"] for own in each), strict=True)]
    if slowest:
        found["median_ms"], found["spread_ms"] = median_and_spread(slowest)
    return found


def _everyones(own: dict[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    each: list[Any] = [None] * ranks.size
    dist.all_gather_object(each, own)
    return each


def _wait(ranks: Ranks | None) -> None:
    if ranks is not None:
        dist.barrier()


def table(report: Report) -> str:
    """A line for each result."""
    lines = [f"{report['device']}, {report['cores']} cores"]
    for r in report["results"]:
        start = f"{r['processes']} x {r['impl']:<24}d_in {r['sizes']['d_in']:>5}  d_sae {r['sizes']['d_sae']:>7}  "
        if "skipped" in r:
            lines.append(f"{start}{r['skipped']}")
            continue
        seen = "" if r["socket_bytes"] is None else f" ({r['socket_bytes'] / 1e6:9.3f} by its sockets)"
        took = f"  {r['median_ms']:8.1f} ms" if "median_ms" in r else ""
        lines.append(f"{start}{r['bytes'] / 1e6:9.3f} MB a rank{seen}{took}")
        lines += [
            f"    {one['kind']:<12}{one['bytes'] / 1e6:9.3f} MB {one['calls']:>3} calls  {one['purpose']}"
            for one in r["sent"]
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--d-sae", type=int, nargs="+", default=D_SAE)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="on 2 processes, in small")
    parser.add_argument("--out", type=Path, default=Path("scale.json"))
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/scale.md")
    parser.add_argument("--worker", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
    elif args.page:
        report = json.loads((HERE / "results" / "scale" / "cpu.json").read_text())
        page = HERE.parent / "docs" / "scale.md"
        page.write_text(scale_page.filled(page.read_text(), report))
    else:
        quick = ((2,), (256, 1024), 1, SMALL, QUICK_LARGE)
        found = run(*quick) if args.quick else run(args.processes, args.d_sae, args.rounds)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(table(found))


if __name__ == "__main__":
    main()
