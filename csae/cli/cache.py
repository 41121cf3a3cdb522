"""`csae cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from csae.cli.options import BOS, DATASET, DEVICE, KEEP_FIRST, LAYER, MODEL, N_CTX, TEXT, device_of, origin_of
from csae.errors import shown


@click.command()
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="A new folder.")
@MODEL
@LAYER
@TEXT
@DATASET
@N_CTX
@BOS
@KEEP_FIRST
@click.option("--max-tokens", type=int, help="Use at most so many tokens of the text.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True)
@DEVICE
def cache(**options: Any) -> None:
    """Write a language model's activations to a folder of shards, for --activations."""
    from csae.data.activations import write_cache
    from csae.data.sources import open_source
    from csae.progress import track

    source, _ = open_source(origin_of(options), device_of(options["device"]), track)
    write_cache(source, options["out"], getattr(torch, options["dtype"]), track)
    print(f"cached: {source.n_windows} windows of {source.n_ctx} positions in {shown(options['out'])}")
