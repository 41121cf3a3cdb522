"""`csae evidence`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from csae.cli.options import DEVICE, LONG
from csae.errors import UserError, shown


@click.command()
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("evidence"), show_default=True, help="Folder."
)
@click.option("--model", help="Any other language model than SmolLM2-135M.")
@click.option("--k", "ks", type=int, multiple=True, help="Active features a token; may be repeated. [4 8 16 32 64]")
@click.option("--layer", "layers", type=int, multiple=True, help="May be repeated. [6 12 20]")
@click.option("--hook", "hooks", multiple=True, help="A hook point or a pattern (`csae hooks`); may be repeated.")
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    help="english, multilingual or documentation; may be repeated. [the first two]",
)
@click.option("--seeds", type=int, help="How many. [3]")
@click.option("--tokens", type=click.IntRange(min=1), help="Each SAE is trained on. [840000, in two passes]")
@click.option("--d-sae", type=int, help="Number of features. [2304]")
@click.option("--n-ctx", type=click.IntRange(2), help="Positions a window. [256]")
@click.option("--texts", "languages", type=click.Path(path_type=Path), help="A folder of *.txt for each language.")
@click.option("--limit", type=int, help="Train this many SAEs at most, the most telling first.")
@DEVICE
def evidence(tokens: int | None, d_sae: int | None, n_ctx: int | None, **options: Any) -> None:
    """Measure whether the contextual SAE works, beside other SAEs: figures, and a report. Goes on if stopped.

    Under torchrun, each process trains and measures a share of the SAEs.

    Needs a checkout of the repository: an installation leaves the evidence out.
    """
    if importlib.util.find_spec("csae.bench.evidence") is None:
        raise UserError(
            "csae evidence: this installation does not have it; run it in a checkout of the repository, after `make`"
        )
    from csae.bench.evidence.command import run_evidence
    from csae.bench.evidence.grid import Budget
    from csae.distributed.telling import started

    sizes = {name: size for name, size in (("tokens", tokens), ("d_sae", d_sae), ("n_ctx", n_ctx)) if size is not None}
    if tokens is not None:
        sizes["distinct"] = max(1, tokens // 2)
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    with started(options, options["device"], LONG) as ranks:
        if ranks is not None:
            given["device"] = str(ranks.device)
        run_evidence(budget=Budget(**sizes), ranks=ranks, **given)
    if ranks is None or ranks.rank == 0:
        print(f"written: {shown(options['out'])}/evidence.json, {shown(options['out'])}/report.html")
