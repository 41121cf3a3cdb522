"""Training: windows in, a run folder out. However often a run is stopped on the way, it ends with the same bits.

A step is a function of the parameters, the optimizer's state and the step's number alone: the order of windows comes
from the seed, the learning rate from the step, and no other random number is drawn. So a checkpoint is the parameters,
the moments and the step.

    RUN/run.json           what was trained on what, and how
    RUN/metrics.jsonl      a line a step: step, tokens, loss, fvu, aux, l0, dead, lr, tokens_per_s; for a contextual
                           SAE also fvu_exact and gap, each `gap_every` steps. loss, fvu, aux and l0 are null in a step
                           that was skipped, because fewer than two of its positions are in the mask
    RUN/windows.bin        which windows were trained on (csae.data.seen)
    RUN/checkpoint-STEP    the last checkpoint (csae.checkpoint)
    RUN/model.safetensors, RUN/config.json    the trained SAE, when it is done
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from csae.adam import Adam
from csae.checkpoint import check_free, last_checkpoint, remove_checkpoints, restore_checkpoint, save_checkpoint
from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource, Batch
from csae.data.batches import batch_of
from csae.data.seen import log, open_log, settle
from csae.errors import Stopped, UserError, shown
from csae.files import read_json
from csae.progress import bar as progress_bar
from csae.run import (
    FILES,
    METRICS,
    RUN,
    append_line,
    check_job,
    check_metrics,
    drop_later_metrics,
    locked,
    remove_unfinished,
    sync,
)
from csae.sae import SAE, Losses
from csae.saving import CONFIG, check_config
from csae.step import adam, exact_gap, learning_rate, sweeps_at, train_step
from csae.trained_on import TrainedOn

SUSPICIOUS = 1e6  # from this loss on the batch is checked: an SAE that explains nothing has a loss of about 1


def train(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    run: Path | str,
    config: TrainConfig,
    origin: dict[str, Any] | None = None,
) -> None:
    """Train `sae` in place on windows of `source`, and save it in the folder `run`.

    Continues from the last checkpoint where the folder holds one of the same job; returns at once where that job is
    done. The caller has initialised `sae` (`SAE.initialise`), and moved it to the device to train on.
    `origin` (JSON) is kept in run.json: where the source can be opened again (`csae.data.sources`).

    Raises:
        UserError: the folder holds another job, or files that contradict each other; another process trains it, or
            this is one of several; activations or the loss are not finite; the disk is full.
        Stopped: after Ctrl-C (SIGINT) or SIGTERM, with a checkpoint written.
    """
    run = Path(run)
    check_one_process()
    if len(windows) < config.batch_windows:
        raise UserError(
            f"batch_windows: given {config.batch_windows}, but there are {len(windows)} windows to train on; "
            f"needed as many: give more text, or a smaller batch"
        )
    frozen = sorted(name for name, parameter in sae.named_parameters() if not parameter.requires_grad)
    if len(frozen) == len(list(sae.parameters())):
        raise UserError("sae: all of its parameters are frozen: give one with requires_grad=True to train")
    described = source.describe()
    job = {
        "sae": sae.config,
        "n_params": sae.n_params,
        "train": dataclasses.asdict(config),
        "data": described,
        "n_windows": len(windows),
        "n_ctx": source.n_ctx,
        "origin": origin,
    }
    if frozen:
        job["frozen"] = frozen
    check_job(run, job)
    sae.trained_on = TrainedOn.of(described, origin)
    finished = (run / CONFIG).is_file()
    if not finished:
        with locked(run, job) as metrics:
            finished = (run / CONFIG).is_file()  # another process may have finished it meanwhile
            if not finished:
                _train(sae, source, windows, run, config, job, metrics)
    if finished:
        _load_finished(sae, run, config, job)
        remove_unfinished(run, FILES)
    sae.eval()
    try:
        settle(run)  # not earlier: after a kill, the steps after the checkpoint are done again
    except UserError as error:  # the SAE is trained nevertheless
        print(error, file=sys.stderr)
    for path, reason in remove_checkpoints(run, job).items():
        print(f"{path}: kept: {reason}", file=sys.stderr)


def check_one_process() -> None:
    """Raises UserError where this is one of several processes, as torchrun starts them."""
    given = os.environ.get("WORLD_SIZE", "")
    size = int(given) if given.isdecimal() and len(given) < 10 else 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = max(size, torch.distributed.get_world_size())
    if size > 1:
        raise UserError(
            f"training runs in one process, and this is one of {size} (WORLD_SIZE, as torchrun sets it): "
            f"start it without torchrun, or unset WORLD_SIZE where each process trains a run of its own"
        )


def _train(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    run: Path,
    config: TrainConfig,
    job: dict[str, Any],
    metrics: FileIO,
) -> None:
    remove_unfinished(run, FILES)
    broken = _not_finite(sae)
    if broken:
        raise UserError(f"sae: {broken} holds NaN or Inf: initialise it (SAE.initialise) from finite activations")
    optimizer = adam(sae, config)
    checkpoint = last_checkpoint(run)
    first = 0 if checkpoint is None else restore_checkpoint(checkpoint, sae, optimizer, job)
    optimizer.forget_steps()
    every = config.checkpoint_every
    for step in range(first - first % every + every, config.steps, every):
        check_free(run, step)
    drop_later_metrics(run, metrics, first, "no checkpoint" if checkpoint is None else checkpoint.name)
    sae.train()
    with open_log(run, first * config.batch_windows) as seen, _stop_signal() as stop:
        train_fvu = _steps(sae, optimizer, source, windows, run, config, job, first, metrics, seen, stop)
    if all(not state["step"] for state in optimizer.state.values()):
        raise UserError(
            f"the mask lets no two positions of a step take part, in any of {config.steps}: nothing to train on"
        )
    _check_trained(sae, run, config)
    assert sae.trained_on is not None
    sae.trained_on = dataclasses.replace(sae.trained_on, train_fvu=train_fvu)
    sae.save_pretrained(run)


def _load_finished(sae: SAE, run: Path, config: TrainConfig, job: dict[str, Any]) -> None:
    """Load a trained SAE into `sae`, if all files of its run agree that it is this one."""
    check_config(read_json(run / CONFIG), job["sae"], run / CONFIG, RUN)
    length = check_metrics(run, config.steps, CONFIG)
    if (run / METRICS).stat().st_size != length:
        raise UserError(f"{run / METRICS}: it goes on after the last of {config.steps} steps: take those lines out")
    loaded = type(sae).from_pretrained(str(run))
    sae.load_state_dict(loaded.state_dict())
    sae.trained_on = loaded.trained_on


def _steps(
    sae: SAE,
    optimizer: Adam,
    source: ActivationSource,
    windows: Sequence[int],
    run: Path,
    config: TrainConfig,
    job: dict[str, Any],
    first: int,
    metrics: FileIO,
    seen: BinaryIO,
    stop: threading.Event,
) -> float | None:
    """Trains; gives the FVU of the last batch, in the exact form for a contextual SAE."""
    line: dict[str, Any] = {}
    gap = ""
    with progress_bar(total=config.steps, initial=first, desc=shown(run.name), unit="step") as bar:
        for step in range(first, config.steps):
            began = time.perf_counter()
            chosen = batch_of(windows, step, config)
            batch = source.read(chosen)
            log(seen, batch.tokens, batch.acts)
            tokens = batch.mask.numel()
            line = {"step": step, "tokens": (step + 1) * tokens}
            if int(batch.mask.sum()) > 1:
                losses, dead = train_step(sae, optimizer, batch, step, config)
                line |= _figures(sae, losses, batch, dead)
                if not line["loss"] < SUSPICIOUS:
                    _check_loss(sae, batch, chosen, line, run, config)
            else:  # there is no variance to explain
                line |= dict.fromkeys(("loss", "fvu", "aux", "l0")) | {"dead": len(sae.dead_features()) / sae.d_sae}
            line["lr"] = learning_rate(step, config)
            line["tokens_per_s"] = round(tokens / (time.perf_counter() - began), 1)
            if line["loss"] is not None:
                if isinstance(sae, ContextualSAE) and (step % config.gap_every == 0 or step + 1 == config.steps):
                    line["fvu_exact"], line["gap"] = exact_gap(sae, batch, sweeps_at(step, config, sae))
                    gap = f" gap {line['gap']:+.1%}"
                bar.set_postfix_str(
                    f"loss {line['loss']:.4f} fvu {line['fvu']:.4f}{gap} l0 {line['l0']:.1f} dead {line['dead']:.1%} "
                    f"{line['tokens_per_s']:,.0f} tokens/s",
                    refresh=False,
                )
            append_line(metrics, line)
            bar.update()
            done = step + 1
            if stop.is_set() or (done % config.checkpoint_every == 0 and done < config.steps):
                _check_trained(sae, run, config)
                sync(metrics)  # a checkpoint is never ahead of its metrics
                sync(seen)
                save_checkpoint(run, done, sae, optimizer, job)
            if stop.is_set():
                raise Stopped(
                    f"{run}: stopped after step {done} of {config.steps}; the same command goes on from there"
                )
    sync(metrics)
    return line.get("fvu_exact", line.get("fvu"))


def _not_finite(sae: SAE) -> str | None:
    """A tensor of an SAE that holds NaN or Inf, or None."""
    return next((name for name, tensor in sae.state_dict().items() if not tensor.isfinite().all()), None)


def _check_trained(sae: SAE, run: Path, config: TrainConfig) -> None:
    """Raises UserError where weights are not finite, before they replace the last checkpoint."""
    broken = _not_finite(sae)
    if broken:
        raise UserError(f"{run}: {broken} holds NaN or Inf: {_smaller_lr(config)}")


def _smaller_lr(config: TrainConfig) -> str:
    return f"train again in another folder, with a smaller --lr (given {config.lr}); the last checkpoint is kept"


def _check_loss(
    sae: SAE, batch: Batch, chosen: Sequence[int], line: dict[str, Any], run: Path, config: TrainConfig
) -> None:
    """Raises UserError where a loss is not finite, or its batch can't be reconstructed: why, and what to do."""
    x = batch.acts[batch.mask].double()  # [tokens, d_in]
    where = f"windows {', '.join(map(str, chosen[:8]))}{', ...' if len(chosen) > 8 else ''}"
    scale, loss, step = float(sae.scale), line["loss"], line["step"]
    reason = None
    if not x.isfinite().all():
        reason = f"NaN or Inf in the activations of {where}: make them again, or leave those windows out"
    elif not (x - x.mean(dim=0)).square().sum() > 1e-12 * x.square().sum():  # below this it is rounding only
        reason = f"all positions of {where} that take part have the same activations: leave those windows out"
    elif (x / scale).square().sum() > torch.finfo(torch.float32).max / 4:
        reason = (
            f"activations as large as {float(x.abs().max()):.3g} in {where}, at a scale of {scale:.3g}: their squares "
            f"are too large for float32: make them again, or leave those windows out"
        )
    elif not math.isfinite(loss) and step == 0:  # this is the loss before the first update
        reason = f"the loss is {loss} before the first step: initialise the SAE (SAE.initialise) from these activations"
    elif not math.isfinite(loss):
        reason = f"the loss is {loss} at step {step}: {_smaller_lr(config)}"
    if reason:
        raise UserError(f"{run}: {reason}")


@torch.no_grad()
def _figures(sae: SAE, losses: Losses, batch: Batch, dead: Tensor) -> dict[str, float]:
    mask = batch.mask.to(losses.code.values.device)
    active = ((losses.code.values > 0).sum(dim=-1) * mask).sum() / mask.sum().clamp_min(1)
    return {
        "loss": losses.loss.item(),
        "fvu": losses.fvu.item(),
        "aux": losses.aux.item(),
        "l0": active.item(),
        "dead": dead.numel() / sae.d_sae,
    }


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that the step is finished; a second one interrupts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
