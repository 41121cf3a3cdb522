"""`csae eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from csae.cli.options import (
    ACTIVATIONS,
    BOS,
    DATASET,
    DEVICE,
    ELSEWHERE,
    KEEP_FIRST,
    MODEL,
    TEXT,
    device_of,
    given_of,
    place_options,
)
from csae.errors import UserError


@click.command(name="eval")
@click.argument("runs", nargs=-1, required=True)
@ACTIVATIONS
@MODEL
@place_options()
@TEXT
@DATASET
@click.option("--n-ctx", type=int, help="Positions a window; as trained if not given.")
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
    trained on. With a language model also the next-token cross-entropy with the reconstruction spliced in.
    """
    from csae.checkpoint import load_sae
    from csae.evaluate import EVAL, table
    from csae.evaluate_run import evaluate_run, keep_held_out_fvu
    from csae.files import check_writable, write_json
    from csae.progress import track

    device = device_of(options["device"])
    for name, count in (("--windows", windows), ("--ce-windows", ce_windows)):
        if count < 1:
            raise UserError(f"{name}: given {count}; needed at least 1")
    given, how = given_of(options), {"trained_windows": trained_windows, "elsewhere": elsewhere}
    folders = [Path(run) for run in runs if Path(run).is_dir()]
    for folder in folders:
        check_writable(folder / EVAL)
    opened: dict[str, Any] = {}
    results = []
    for run in runs:
        sae = load_sae(run, device)
        found = evaluate_run(run, sae, given, windows, ce_windows, **how, device=device, progress=track, opened=opened)
        if Path(run) in folders:
            write_json(Path(run) / EVAL, found)
            keep_held_out_fvu(Path(run), sae, found)
        results.append({"name": Path(run).name or Path(run).resolve().name} | found)
    Console().print(table(results))
