"""`csae demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from csae.cli.options import AT, DEVICE, TEXT
from csae.data.dtypes import LM_DTYPES


@click.command()
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
@click.option("--model", help="Any other language model than SmolLM2-135M.")
@TEXT
@click.option("--layer", type=int, help="Read the residual stream after this many blocks: 12 is --hook resid.out:11.")
@click.option("--hook", help=f"Read {AT}; `csae hooks MODEL` lists them.")
@click.option("--k", type=int, help="Active features a token.")
@click.option("--d-sae", type=int, help="Number of features.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of text to train on.")
@click.option("--epochs", type=int, help="How often each is seen.")
@click.option("--n-ctx", type=click.IntRange(2), help="Positions a window.")
@click.option("--seed", type=int, help="Of initialisation and order.")
@click.option("--lm-dtype", type=click.Choice(LM_DTYPES), help="Of the language model; auto if not given.")
@DEVICE
def demo(**options: Any) -> None:
    """Train a per-token and a contextual SAE on a real language model, compare them, write a report."""
    from csae.demo import run_demo

    run_demo(**{name: value for name, value in options.items() if value is not None})
