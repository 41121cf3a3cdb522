"""`csae export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from csae.cli.no_effect import check_effect
from csae.cli.options import ACTIVATIONS, DATASET, DEVICE, MODEL, TEXT, device_of, given_of
from csae.errors import shown

TARGETS = ("sae_lens", "sparsify", "dictionary_learning", "gemma_scope", "neuronpedia", "delphi")


@click.command()
@click.argument("run")
@click.option("--to", type=click.Choice(TARGETS), required=True, help="Which library.")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="A new folder.")
@MODEL
@TEXT
@DATASET
@ACTIVATIONS
@click.option("--n-ctx", type=click.IntRange(2), help="Positions a window; as trained if not given.")
@click.option("--windows", type=int, default=1024, show_default=True, help="Windows of text, at most.")
@DEVICE
def export(run: str, to: str, out: Path, windows: int, **options: Any) -> None:
    """Write a trained SAE as another library takes it: its weights, or its feature activations on a text.

    sae_lens, sparsify, dictionary_learning, gemma_scope: the weights. neuronpedia: dashboards, for its importer.
    delphi: its latent cache. Model, layer and text are those of the run if not given.
    """
    from csae.export import LIBRARIES
    from csae.export import export as export_run
    from csae.progress import track

    if to in LIBRARIES:
        of_activations = ["text", "dataset", "text_column", "chat", "activations", "n_ctx", "windows"]
        check_effect(click.get_current_context(), of_activations, f"with --to {to}, which takes the weights alone")
    for path in export_run(run, to, out, given_of(options), windows, device_of(options["device"]), track):
        print(f"written: {shown(path)}")
