"""`csae train`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from csae.cli.config_file import CONFIG_FILE, place_of_the_command_line
from csae.cli.no_effect import OF_LOOK_BACK, OF_STREAM, check_effect
from csae.cli.options import (
    ACTIVATIONS,
    BOS,
    DATASET,
    DEVICE,
    KEEP_FIRST,
    MODEL,
    N_CTX,
    TEXT,
    TIMEOUT,
    device_of,
    options_of,
    origin_of,
    place_options,
)
from csae.config import SAEConfig, TrainConfig
from csae.data.dtypes import LM_DTYPES
from csae.errors import UserError, shown
from csae.logs import LOGS, check_logs

if TYPE_CHECKING:
    from csae.distributed.ranks import Ranks


@click.command()
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run; goes on if it is there. Of several SAEs, a folder for their runs.",
)
@CONFIG_FILE
@options_of(SAEConfig, "arch", several=True)
@ACTIVATIONS
@MODEL
@place_options(several=True)
@TEXT
@DATASET
@N_CTX
@BOS
@KEEP_FIRST
@click.option("--max-tokens", type=int, help="Use at most so many tokens of the text.")
@options_of(SAEConfig, "d_sae", "k", "selection", several=True)
@options_of(SAEConfig, "k_max")
@options_of(SAEConfig, "heads", "d_head", "d_value", "d_memory", "k_mem")
@options_of(SAEConfig, "query", several=True)
@options_of(SAEConfig, "sweeps")
@options_of(TrainConfig, "early_sweeps", "exact_from", "gap_every")
@options_of(SAEConfig, "dead_after", "skip", "prefixes")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to train on; all of the data once if not given.")
@options_of(TrainConfig, "batch_windows")
@options_of(TrainConfig, "lr", several=True)
@options_of(TrainConfig, "look_back_lr", "warmup", "decay")
@options_of(TrainConfig, "lazy", "moments", "precision", "checkpoint_every", "log_every")
@click.option(
    "--held-out", type=float, default=0.02, show_default=True, help="Share of the windows kept for `csae eval`."
)
@options_of(TrainConfig, "seed")
@click.option("--init", help="Begin with the weights of another run, a saved SAE or a hub id.")
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
@click.option(
    "--lm-dtype",
    type=click.Choice(LM_DTYPES),
    help="Of the language model; auto, the default: bfloat16 where the hardware multiplies it, else float32.",
)
@click.option("--lm-device", help="Of the language model; that of --device if not given.")
@DEVICE
@TIMEOUT
@click.option(
    "--data-ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Under torchrun: how many replicas of the SAE train side by side.",
)
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train an SAE on activations: of a language model on the fly, or saved ones.

    Several hook points, and several of --arch, --d-sae, --k, --selection, --query and --lr, give an SAE for each
    combination, all trained on the same batches. Under torchrun, each process owns the rows of some features.
    """
    from csae.data.activations import check_share
    from csae.distributed.telling import n_processes, started

    options |= place_of_the_command_line(context)
    if options["data_ranks"] > 1 and n_processes() == 1:
        raise UserError(f"--data-ranks: given {options['data_ranks']} in one process; needed torchrun, with more")
    check_logs(options["logs"])
    check_share(options["held_out"])
    if set(options["arch"]) == {"topk"}:
        check_effect(context, OF_LOOK_BACK, "with --arch topk, which does not look back")
    if options["activations"]:
        check_effect(context, ["lm_device"], "with --activations, which run no language model")
    same = {name: value for name, value in options.items() if name != "lm_device"}
    with started(same, options["device"], options["timeout"], options["data_ranks"]) as ranks:
        _train(context, options, ranks)


def _train(context: click.Context, options: dict[str, Any], ranks: Ranks | None) -> None:
    from csae.cli.several import check_folders, check_settings, jobs_of, settings_of
    from csae.data.activations import ModelActivations, held_out
    from csae.data.batches import Batches, IndexedBatches
    from csae.data.dtypes import resolved_dtype
    from csae.data.raw_text import as_stream, open_stream_batches
    from csae.data.sources import check_said, open_source
    from csae.distributed.hosts import Hosts
    from csae.distributed.same_data import check_same_data
    from csae.progress import quiet, say, track
    from csae.train import train_together

    hosts = Hosts(ranks)
    share = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    tell: Callable[[str], None] = say if hosts.is_first else lambda line: None
    device = device_of(options["device"]) if ranks is None else str(ranks.device)
    lm_device = device_of(options["lm_device"] or device, "--lm-device")
    earlier = hosts.from_first(lambda: check_folders(options["out"]))
    origin = origin_of(options, earlier)
    if "activations" in origin and options["lm_dtype"]:
        raise UserError("--lm-dtype: given with --activations, which are as they were made; needed with a model")
    if "model" in origin:
        given = options["lm_dtype"] or (earlier.get("lm_dtype") if earlier else "auto")
        origin |= {} if given is None else {"lm_dtype": resolved_dtype(given, torch.device(lm_device))}
    settings = settings_of(options)
    check_settings(settings, options)
    origin = as_stream(
        origin,
        options["stream"],
        options["tokens"],
        options["held_out"],
        options["shuffle_buffer"],
        options["seed"],
        earlier.get("held_out_windows"),
    )
    if not origin.get("stream"):
        check_effect(context, OF_STREAM, "without a data set that is streamed")
    opened: dict[str, Any] = {}
    source, _ = open_source(origin, lm_device, track if hosts.is_first else quiet, opened)
    check_said(origin, source)
    check_same_data(source, hosts)
    batches: Batches | None = None
    if origin.get("stream"):
        assert isinstance(source, ModelActivations)
        batch_windows, workers = options["batch_windows"], options["workers"]
        batches, source = open_stream_batches(origin, source, batch_windows, workers, share, opened)
        train_windows = range(source.n_windows)
    else:
        train_windows, _ = held_out(source.n_windows, options["held_out"])
    per_step = options["batch_windows"] * source.n_ctx
    tokens = len(train_windows) * source.n_ctx if options["tokens"] is None else options["tokens"]
    steps = max(1, tokens // max(1, per_step))
    began = time.perf_counter()
    jobs = jobs_of(context, settings, source, train_windows, origin, options, steps, device, ranks)
    read = min(64, len(train_windows)) * source.n_ctx
    seconds = steps * per_step * (time.perf_counter() - began) / read
    takes = "" if options["init"] else f"; to read the activations takes about {_time(seconds)} of it"
    of = f"{len(jobs)} SAEs" if len(jobs) > 1 else "one SAE"
    tell(
        f"training {of} on {steps * per_step:,} tokens: {steps:,} steps of {options['batch_windows']} windows of "
        f"{source.n_ctx}{takes}"
    )
    train_together(jobs, batches or IndexedBatches(source, train_windows, jobs[0].config, share))
    if not hosts.is_first:
        return
    runs = " ".join(shown(job.run) for job in jobs)
    print(f"trained: {runs} (look at {'them' if len(jobs) > 1 else 'it'}: csae eval {runs})")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
