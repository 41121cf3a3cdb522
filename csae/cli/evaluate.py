"""`csae eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from csae.cli.options import (
    ACTIVATIONS,
    BOS,
    DATASET,
    DEVICE,
    ELSEWHERE,
    KEEP_FIRST,
    LONG,
    MODEL,
    TEXT,
    device_of,
    given_of,
    place_options,
)
from csae.errors import UserError

if TYPE_CHECKING:
    from csae.distributed.ranks import Ranks
    from csae.sae import SAE

AT_ONCE_BYTES = 4e9  # of SAEs that are in memory together


@click.command(name="eval")
@click.argument("runs", nargs=-1, required=True)
@ACTIVATIONS
@MODEL
@place_options()
@TEXT
@DATASET
@click.option("--n-ctx", type=click.IntRange(2), help="Positions a window; as trained if not given.")
@BOS
@KEEP_FIRST
@click.option("--windows", type=int, default=256, show_default=True, help="Windows to evaluate on, at most.")
@click.option("--ce-windows", type=int, default=16, show_default=True, help="Windows to run the language model on.")
@click.option("--trained-windows", is_flag=True, help="Evaluate also on windows that the run trained on.")
@ELSEWHERE
@DEVICE
def evaluate(
    runs: tuple[str, ...], windows: int, ce_windows: int, trained_windows: bool, elsewhere: bool, **options: Any
) -> None:
    """Evaluate trained SAEs: a table, and eval.json in each run's folder.

    On the windows that a run held out; or on other activations or text if given, without the windows that the run
    trained on. With a language model also the next-token cross-entropy with the reconstruction spliced in. Under
    torchrun, each process evaluates whole SAEs on a share of the windows.
    """
    from csae.distributed.telling import started

    for name, count in (("--windows", windows), ("--ce-windows", ce_windows)):
        if count < 1:
            raise UserError(f"{name}: given {count}; needed at least 1")
    counts = {"windows": windows, "ce_windows": ce_windows}
    how = {"trained_windows": trained_windows, "elsewhere": elsewhere}
    with started({**options, **counts, **how, "runs": runs}, options["device"], LONG) as ranks:
        _evaluate(runs, options, ranks, windows, ce_windows, **how)


def _evaluate(
    runs: Sequence[str],
    options: dict[str, Any],
    ranks: Ranks | None,
    windows: int,
    ce_windows: int,
    **how: bool,
) -> None:
    from csae.distributed.hosts import Hosts
    from csae.evaluate import EVAL, table
    from csae.evaluate_run import evaluate_runs, keep_held_out_fvu
    from csae.files import check_writable, write_json
    from csae.progress import quiet, track

    hosts = Hosts(ranks)
    device = device_of(options["device"]) if ranks is None else str(ranks.device)
    given, progress = given_of(options), track if hosts.is_first else quiet
    folders = [Path(run) for run in runs if Path(run).is_dir()]

    def check_folders() -> None:
        for folder in folders:
            check_writable(folder / EVAL)

    hosts.from_first(check_folders)
    results = []
    opened: dict[str, Any] = {}
    for some in _at_once(runs, device, ranks):
        every = evaluate_runs(
            some, given, windows, ce_windows, **how, device=device, progress=progress, opened=opened, ranks=ranks
        )
        for (run, sae), found in zip(some, every, strict=True) if hosts.is_first else ():
            if Path(run) in folders:
                write_json(Path(run) / EVAL, found)
                keep_held_out_fvu(Path(run), sae, found)
            results.append({"name": Path(run).name or Path(run).resolve().name} | found)
    if hosts.is_first:
        Console().print(table(results))


def _at_once(runs: Sequence[str], device: str, ranks: Ranks | None) -> Iterator[list[tuple[str, SAE]]]:
    """The runs with their SAEs, as many at once as fit into AT_ONCE_BYTES, but one at least."""
    from csae.checkpoint import load_sae
    from csae.memory import check_loads

    some: list[tuple[str, SAE]] = []
    size = 0
    for run in runs:
        check_loads(run, device, ranks)
        sae = load_sae(run, device)
        of_sae = sum(tensor.nbytes for tensor in sae.state_dict().values())
        if some and size + of_sae > AT_ONCE_BYTES:
            yield some
            some, size = [], 0
        some.append((run, sae))
        size += of_sae
    yield some
