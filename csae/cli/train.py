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
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Read --dataset as it is trained on, whatever its length; text is if not given, token ids are not.",
)
@click.option(
    "--shuffle-buffer", type=int, default=1024, show_default=True, help="Windows of a stream that are shuffled."
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that tokenize a stream.")
@DEVICE
def train(**options: Any) -> None:
    """Train an SAE on activations: of a language model on the fly, or saved ones."""
    from csae.data.activations import ModelActivations, check_share, estimate_normalisation, held_out
    from csae.data.batches import Batches, IndexedBatches
    from csae.data.raw_text import as_stream, open_stream_batches
    from csae.data.sources import check_said, open_source, remembered
    from csae.progress import track
    from csae.run import read_origin
    from csae.train import Job, check_one_process, train_together

    check_logs(options["logs"])
    check_share(options["held_out"])
    check_one_process()
    device = device_of(options["device"])
    earlier = read_origin(options["out"])
    origin = as_stream(
        origin_of(options, earlier),
        options["stream"],
        options["tokens"],
        options["held_out"],
        options["shuffle_buffer"],
        options["seed"],
        earlier.get("held_out_windows"),
    )
    source, _ = open_source(origin, device, track)
    check_said(origin, source)
    origin = remembered(origin, source)
    batches: Batches | None = None
    if origin.get("stream"):
        assert isinstance(source, ModelActivations)
        batches, source = open_stream_batches(origin, source, options["batch_windows"], options["workers"])
        train_windows = range(source.n_windows)
    else:
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
    job = Job(sae, options["out"], config, origin | {"held_out": options["held_out"]}, logs=options["logs"])
    train_together([job], batches or IndexedBatches(source, train_windows, config))
    print(f"trained: {shown(options['out'])} (look at it: csae eval {shown(options['out'])})")
