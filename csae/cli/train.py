"""`csae train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import torch

from csae.cli.options import (
    ACTIVATIONS,
    BOS,
    DATASET,
    DEVICE,
    KEEP_FIRST,
    LAYER,
    MODEL,
    N_CTX,
    TEXT,
    device_of,
    options_of,
    origin_of,
)
from csae.config import SAEConfig, TrainConfig
from csae.errors import shown
from csae.logs import LOGS, check_logs


@click.command()
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the run; goes on if it is there."
)
@options_of(SAEConfig, "arch")
@ACTIVATIONS
@MODEL
@LAYER
@TEXT
@DATASET
@N_CTX
@BOS
@KEEP_FIRST
@click.option("--max-tokens", type=int, help="Use at most so many tokens of the text.")
@options_of(SAEConfig, "d_sae", "k", "heads", "d_head", "d_value", "d_memory", "k_mem", "query", "sweeps")
@options_of(TrainConfig, "early_sweeps", "exact_from", "gap_every")
@options_of(SAEConfig, "dead_after", "skip")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to train on; all of the data once if not given.")
@options_of(TrainConfig, "batch_windows", "lr", "look_back_lr", "warmup", "decay")
@options_of(TrainConfig, "lazy", "moments", "precision", "checkpoint_every", "log_every")
@click.option(
    "--held-out", type=float, default=0.02, show_default=True, help="Share of the windows kept for `csae eval`."
)
@options_of(TrainConfig, "seed")
@click.option("--log", "logs", type=click.Choice(LOGS), multiple=True, help="Metrics also go there; may be repeated.")
@DEVICE
def train(**options: Any) -> None:
    """Train an SAE on activations: of a language model on the fly, or saved ones."""
    from csae.data.activations import check_share, estimate_normalisation, held_out
    from csae.data.sources import check_said, open_source, remembered
    from csae.progress import track
    from csae.run import read_origin
    from csae.train import check_one_process
    from csae.train import train as run_training

    check_logs(options["logs"])
    check_share(options["held_out"])
    check_one_process()
    device = device_of(options["device"])
    origin = origin_of(options, read_origin(options["out"]))
    source, _ = open_source(origin, device, track)
    check_said(origin, source)
    origin = remembered(origin, source)
    train_windows, _ = held_out(source.n_windows, options["held_out"])
    per_step = options["batch_windows"] * source.n_ctx
    tokens = len(train_windows) * source.n_ctx if options["tokens"] is None else options["tokens"]
    which, how = (
        {field.name: options[field.name] for field in dataclasses.fields(config) if field.name in options}
        for config in (SAEConfig, TrainConfig)
    )
    config = TrainConfig(steps=max(1, tokens // max(1, per_step)), **how)
    torch.manual_seed(options["seed"])
    sae = SAEConfig(**which).make(source.d_in)
    mean, scale = estimate_normalisation(source, train_windows)[:2]
    sae.to(device).initialise(mean.to(device), scale)
    origin |= {"held_out": options["held_out"]}
    run_training(sae, source, train_windows, options["out"], config, origin, options["logs"])
    print(f"trained: {shown(options['out'])} (look at it: csae eval {shown(options['out'])})")
