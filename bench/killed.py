"""Training on several ranks: the same FVU as in one process, and what kills of a rank leave of it.

    python -m csae.bench.killed ACTIVATIONS [--ranks 4 2 3 --kills 10 --out killed]

ACTIVATIONS is a folder of `csae cache` or of the demo. A TopK SAE and a contextual one train on it three times: in one
process; on several ranks; and on several ranks of which one is killed (SIGKILL) at random moments, each time going on
with another number of ranks. The FVU is of held-out windows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from csae.bench.endless import children_of, trained
from csae.checkpoint import load_sae
from csae.data.activations import held_out
from csae.data.shard_activations import ShardActivations
from csae.evaluate import evaluate

KILLS, RANKS = 10, (4, 2, 3)
HELD_OUT = 0.02
ARCHS = ("topk", "contextual")
# As in the demo.
SETTINGS = {"d-sae": 2304, "k": 16, "lr": 4e-3, "dead-after": 200_000}
EVERY = 0.1  # seconds between two looks
TOO_LONG = 60.0  # seconds in which all ranks are to end after one was killed


class Kill(NamedTuple):
    """Of one rank."""

    ranks: int
    """of which it was one"""
    tokens: int
    """trained on by then, as the metrics say"""
    seconds: float
    """until all processes had ended"""


def command(activations: Path, out: Path, ranks: int, tokens: int, options: Sequence[str]) -> list[str]:
    """What trains the SAEs on so many ranks; goes on where the runs are."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    archs = [part for arch in ARCHS for part in ("--arch", arch)]
    how = ["--selection", "topk", "--tokens", str(tokens), "--held-out", str(HELD_OUT)]
    how += ["--device", "cpu", "--out", str(out)]
    return [*start, "csae", "train", "--activations", str(activations), *archs, *settings, *how, *options]


def train(trains: Sequence[str], out: Path, kill_at: int | None, choose: random.Random, ranks: int) -> Kill | None:
    """Train in processes of their own; kill one of them when the first run has so many tokens."""
    killed: tuple[int, float] | None = None
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f"{out.name}.log", "a") as log:
        process = subprocess.Popen(trains, stderr=log, stdout=log)
        while process.poll() is None:
            time.sleep(EVERY)
            done = min((trained(run) for run in runs_of(out)), default=0)
            if kill_at is not None and killed is None and done >= kill_at:
                children = children_of(process.pid) if ranks > 1 else [process.pid]
                with suppress(ProcessLookupError, IndexError):  # it has ended meanwhile
                    os.kill(choose.choice(children), signal.SIGKILL)
                    killed = done, time.perf_counter()
    if killed is not None:
        return Kill(ranks, killed[0], round(time.perf_counter() - killed[1], 1))
    if process.returncode:
        raise RuntimeError(f"{out}: training on {ranks} ranks ended with status {process.returncode}; see {log.name}")
    return None


def runs_of(out: Path) -> list[Path]:
    return sorted(folder for folder in out.glob("*") if (folder / "run.json").is_file()) if out.is_dir() else []


def figures(activations: Path, out: Path) -> dict[str, float]:
    """The held-out FVU of each SAE, by its name."""
    source = ShardActivations(activations)
    windows = held_out(source.n_windows, HELD_OUT)[1]
    return {run.name: float(evaluate(load_sae(run), source, windows)["fvu"]) for run in runs_of(out)}


def run(
    activations: Path,
    ranks: Sequence[int] = RANKS,
    kills: int = KILLS,
    tokens: int | None = None,
    out: Path = Path("killed"),
    options: Sequence[str] = (),
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The three trainings, in the folder `out`. Returns their figures, and the kills."""
    source = ShardActivations(activations)
    tokens = 2 * len(held_out(source.n_windows, HELD_OUT)[0]) * source.n_ctx if tokens is None else tokens
    choose = random.Random(seed)
    found: dict[str, Any] = {"tokens": tokens, "ranks": list(ranks)}
    for name, size in (("one", 1), ("several", ranks[0])):
        began = time.perf_counter()
        train(command(activations, out / name, size, tokens, options), out / name, None, choose, size)
        seconds = round(time.perf_counter() - began, 1)
        found[name] = {"ranks": size, "seconds": seconds, "fvu": figures(activations, out / name)}
        say(f"{size} rank{'s' if size > 1 else ''}: {seconds} s, FVU {_listed(found[name]['fvu'])}")
    moments = sorted(choose.randrange(tokens // 50, tokens - tokens // 50) for _ in range(kills))
    folder, seen = out / "killed", []
    for number, moment in enumerate([*moments, None]):
        size = ranks[number % len(ranks)]
        kill = train(command(activations, folder, size, tokens, options), folder, moment, choose, size)
        if kill is not None:
            seen.append(kill)
            say(f"one of {kill.ranks} ranks killed after {kill.tokens:,} tokens; all had ended {kill.seconds} s later")
    found["killed"] = {"kills": [kill._asdict() for kill in seen], "fvu": figures(activations, folder)}
    say(f"killed {len(seen)} times: FVU {_listed(found['killed']['fvu'])}")
    if slow := [kill for kill in seen if kill.seconds > TOO_LONG]:
        say(f"NOT all ended within {TOO_LONG:.0f} s: {slow}")
    return found


def _listed(fvus: dict[str, float]) -> str:
    return ", ".join(f"{name} {fvu:.5f}" for name, fvu in fvus.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="of the first start, the next, ...")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--tokens", type=int, help="two passes over the windows if not given")
    parser.add_argument("--out", type=Path, default=Path("killed"))
    args, options = parser.parse_known_args()
    found = run(args.activations, args.ranks, args.kills, args.tokens, args.out, options)
    (args.out / "killed.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
