"""`csae bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from csae.cli.options import DEVICE, device_of
from csae.errors import shown


@click.group(invoke_without_command=True)
@click.option("--shape", "shapes", multiple=True, help="small, cpu, A, B or C; may be repeated. [small; A B C on CUDA]")
@click.option("--case", "cases", multiple=True, help="A part of a case's name; may be repeated. [all cases]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of products. [bfloat16 on CUDA]")
@click.option("--rounds", type=click.IntRange(min=1), help="How often each is timed. [7, or 20 on CUDA]")
@click.option("--growth", is_flag=True, help="Instead: how cost grows with d_sae and k, beyond the product's.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="JSON; a plot beside it. [bench.json, growth.json]")
@DEVICE
@click.pass_context
def bench(context: click.Context, growth: bool, out: Path | None, device: str | None, **options: Any) -> None:
    """Measure the ops and training steps here, beside their floor, PyTorch, and the peers that are installed.

    What gives another result than the reference is not timed.
    """
    if context.invoked_subcommand is not None:
        return
    from csae.bench import growth as growing
    from csae.bench import harness, report

    out = out or Path("growth.json" if growth else "bench.json")
    plot = out.with_suffix(".svg")
    if growth:
        found = growing.run(device=device_of(device), rounds=options["rounds"] or growing.ROUNDS)
        print(growing.table(found))
    else:
        found = harness.run(device=device_of(device), **options)
        print(report.table(found))
    report.write(found, out)
    (growing if growth else report).draw(found, plot)
    print(f"written: {shown(out)}, {shown(plot)}")


@bench.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare(before: Path, after: Path) -> None:
    """What got faster or slower from one file of results to another."""
    from csae.bench import report

    print(report.compare(report.read(before), report.read(after)))
