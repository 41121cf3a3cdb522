"""Training: windows in, a run folder out, the same bits however often it was stopped on the way.

A step is a function of the parameters, the optimizer's state and the step's number alone: the order of
windows comes from the seed, the learning rate from the step, and no other random number is drawn. So a
checkpoint is the parameters, the moments and the step.

    RUN/run.json           what was trained on what, and how
    RUN/metrics.jsonl      a line a step: step, tokens, loss, fvu, aux, l0, dead, lr, tokens_per_s; of a contextual
                           SAE, each `gap_every` steps, also fvu_exact and gap
    RUN/windows.bin        which windows were trained on (csae.seen)
    RUN/checkpoint-STEP    the last checkpoint (csae.checkpoint)
    RUN/model.safetensors, RUN/config.json    the trained SAE, when it is done
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor

from csae.activations import ActivationSource, Batch, window_order
from csae.adam import Adam
from csae.checkpoint import last_checkpoint, restore_checkpoint, save_checkpoint
from csae.contextual_sae import ContextualSAE
from csae.errors import Stopped, UserError
from csae.files import write_file, write_json
from csae.progress import bar as progress_bar
from csae.sae import CONFIG, SAE, Losses, fraction_unexplained
from csae.seen import log, open_log, settle
from csae.trained_on import TrainedOn

PRECISIONS = ("float32", "bfloat16")
RUN, METRICS = "run.json", "metrics.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    steps: int
    batch_windows: int = 8
    """windows a step"""
    lr: float = 1e-3
    """peak learning rate of Adam"""
    look_back_lr: float = 0.5
    """that of a contextual SAE's look-back, as a share of it"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises from zero"""
    decay: float = 0.2
    """share of the steps, the last ones, in which it falls to zero"""
    early_sweeps: int = 1
    """sweeps of a contextual SAE before the decay, where its own `sweeps` are more: it trains on the memory that it
    will run on when that matters, and more cheaply before"""
    exact_from: float = 1.0
    """share of the steps from which on a contextual SAE's sweeps start at its exact codes, and are as few as before
    the decay. The recurrence is then run in each step, and what is trained is what runs. For features that last so long
    that sweeps don't settle: see csae.bench.evidence.synthetic. On text it was no gain (from 0.8; layer 12 of
    SmolLM2-135M, k = 16: an exact FVU of 0.1509 against 0.1501 with query="past", 0.1348 both ways with "current")"""
    gap_every: int = 100
    """steps from one comparison of a contextual SAE's exact form with its sweeps to the next"""
    lazy: bool = False
    """leave the rows of features that did not fire as they are (`csae.adam.Adam`): cheaper, and not Adam"""
    moments: str = "float32"
    """of the tables: "float32", or "bfloat16" with stochastic rounding"""
    precision: str = "float32"
    """"float32", or "bfloat16" for autocast with float32 parameters"""
    checkpoint_every: int = 500
    """steps"""
    seed: int = 0
    """of the order of windows"""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_windows", 1),
            ("early_sweeps", 0),
            ("gap_every", 1),
            ("checkpoint_every", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}: given {getattr(self, name)}; needed at least {least}")
        for name in ("lr", "look_back_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}: given {getattr(self, name)}; needed a positive number")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise UserError(
                f"warmup, decay: given {self.warmup} and {self.decay}; needed shares that add up to 1 at most"
            )
        if not 0 <= self.exact_from <= 1:
            raise UserError(f"exact_from: given {self.exact_from}; needed a share of the steps, 0 to 1 (never)")
        for name in ("precision", "moments"):
            if getattr(self, name) not in PRECISIONS:
                raise UserError(
                    f"{name}: given {getattr(self, name)!r}; needed one of {', '.join(map(repr, PRECISIONS))}"
                )


def train(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    run: Path | str,
    config: TrainConfig,
    origin: dict[str, Any] | None = None,
) -> None:
    """Train `sae` in place on windows of `source`, and save it in the folder `run`.

    Goes on from the last checkpoint where the folder holds one of the same job; returns at once where that
    job is done. `sae` is initialised by the caller (`SAE.initialise`), and on the device to train on.
    `origin` (JSON) is kept in run.json: where the source can be opened again (`csae.sources`).

    Raises:
        UserError: the folder holds another job; activations or the loss are not finite; the disk is full.
        Stopped: after Ctrl-C (SIGINT) or SIGTERM, with a checkpoint written.
    """
    run = Path(run)
    if len(windows) < config.batch_windows:
        raise UserError(
            f"batch_windows: given {config.batch_windows}, but there are {len(windows)} windows to train on; "
            f"needed as many: give more text, or a smaller batch"
        )
    job = {
        "sae": sae.config,
        "n_params": sae.n_params,
        "train": dataclasses.asdict(config),
        "data": source.describe(),
        "n_windows": len(windows),
        "n_ctx": source.n_ctx,
        "origin": origin,
    }
    _claim(run, job)
    optimizer = adam(sae, config)
    sae.trained_on = TrainedOn.of(job["data"], origin)
    if (run / CONFIG).is_file():
        done = type(sae).from_pretrained(str(run))
        sae.load_state_dict(done.state_dict())
        sae.trained_on = done.trained_on
        sae.eval()
        return
    checkpoint = last_checkpoint(run)
    first = 0 if checkpoint is None else restore_checkpoint(checkpoint, sae, optimizer)
    _drop_later_metrics(run / METRICS, first)
    sae.train()
    sweeps = getattr(sae, "sweeps", 0)
    try:
        with (
            open(run / METRICS, "a", encoding="utf-8") as metrics,
            open_log(run, first * config.batch_windows) as seen,
            _stop_signal() as stop,
        ):
            train_fvu = _steps(sae, optimizer, source, windows, run, config, first, metrics, seen, stop)
    finally:
        if isinstance(sae, ContextualSAE):
            sae.sweeps, sae.from_exact = sweeps, False
    settle(run)
    sae.trained_on = dataclasses.replace(sae.trained_on, train_fvu=train_fvu)
    sae.save_pretrained(run)
    sae.eval()
    for leftover in run.glob("checkpoint-*"):
        shutil.rmtree(leftover)


def _steps(
    sae: SAE,
    optimizer: Adam,
    source: ActivationSource,
    windows: Sequence[int],
    run: Path,
    config: TrainConfig,
    first: int,
    metrics: TextIO,
    seen: BinaryIO,
    stop: threading.Event,
) -> float | None:
    """Trains; gives the FVU of the last batch, of a contextual SAE in its exact form."""
    line: dict[str, Any] = {}
    device = sae.W_dec.device
    sweeps = sae.sweeps if isinstance(sae, ContextualSAE) else 0
    gap = ""
    with progress_bar(total=config.steps, initial=first, desc=run.name, unit="step") as bar:
        for step in range(first, config.steps):
            began = time.perf_counter()
            batch = source.read(batch_of(windows, step, config))
            log(seen, batch.tokens, batch.acts)
            lr = learning_rate(step, config)
            if isinstance(sae, ContextualSAE):
                set_sweeps(sae, step, config, sweeps)
            losses, dead = train_step(sae, optimizer, batch, lr, config, device)
            figures = _figures(sae, losses, batch, dead)
            if not figures["loss"] < float("inf"):
                raise UserError(
                    f"{run}: the loss is {figures['loss']} at step {step}: train again with a smaller --lr "
                    f"(given {config.lr}); the last checkpoint is kept"
                )
            tokens = batch.mask.numel()
            line = {"step": step, "tokens": (step + 1) * tokens, **figures, "lr": lr}
            line["tokens_per_s"] = round(tokens / (time.perf_counter() - began), 1)
            if isinstance(sae, ContextualSAE) and (step % config.gap_every == 0 or step + 1 == config.steps):
                line["fvu_exact"], line["gap"] = exact_gap(sae, batch)
                gap = f" gap {line['gap']:+.1%}"
            metrics.write(json.dumps(line) + "\n")
            bar.set_postfix_str(
                f"loss {line['loss']:.4f} fvu {line['fvu']:.4f}{gap} l0 {line['l0']:.1f} dead {line['dead']:.1%} "
                f"{line['tokens_per_s']:,.0f} tokens/s",
                refresh=False,
            )
            bar.update()
            done = step + 1
            if stop.is_set() or (done % config.checkpoint_every == 0 and done < config.steps):
                metrics.flush()
                seen.flush()
                save_checkpoint(run, done, sae, optimizer)
            if stop.is_set():
                raise Stopped(
                    f"{run}: stopped after step {done} of {config.steps}; the same command goes on from there"
                )
    return line.get("fvu_exact", line.get("fvu"))


def train_step(
    sae: SAE, optimizer: Adam, batch: Batch, lr: float, config: TrainConfig, device: torch.device
) -> tuple[Losses, Tensor]:
    """One step of Adam on a batch; gives the losses before it, and the dead features [n_dead]."""
    acts, mask, documents = (
        tensor.to(device, non_blocking=True) for tensor in (batch.acts, batch.mask, batch.documents)
    )
    dead = sae.dead_features()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"):
        losses, gradients = sae.gradients(acts, mask, documents, dead)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    optimizer.update(gradients)
    sae.track(losses.code, mask)
    return losses, dead


def adam(sae: SAE, config: TrainConfig) -> Adam:
    """The optimizer that `config` asks for."""
    return Adam(sae, config.lr, config.look_back_lr, lazy=config.lazy, moments=getattr(torch, config.moments))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rises from zero over the warm-up, stays at the peak, falls to zero at the end."""
    rise = (step + 1) / max(1.0, config.warmup * config.steps)
    fall = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.lr * min(1.0, rise, fall)


def set_sweeps(sae: ContextualSAE, step: int, config: TrainConfig, sweeps: int) -> None:
    """How often a contextual SAE looks back in a step, where its own sweeps are as given, and from where.

    In the decay every second step has one less. With a fixed number, an SAE can learn to be right after just so many
    sweeps: a feature that suppresses itself at the next position is on and off in turns, sweep by sweep, and then
    position by position where it runs exactly. That was seen on synthetic windows, with four sweeps: an exact FVU of
    0.14 against 0.03.
    """
    late = step >= min((1 - config.decay) * config.steps, config.steps - 1)
    sae.from_exact = step >= config.exact_from * config.steps
    if late and not sae.from_exact:
        sae.sweeps = max(sweeps - (config.steps - 1 - step) % 2, min(sweeps, 1))
    else:
        sae.sweeps = min(sweeps, config.early_sweeps)


@torch.no_grad()
def exact_gap(sae: ContextualSAE, batch: Batch) -> tuple[float, float]:
    """The FVU of a batch in the exact form, and by how much it is above that of the sweeps, as a share of it."""
    acts, mask, documents = (tensor.to(sae.W_dec.device) for tensor in (batch.acts, batch.mask, batch.documents))
    forms = (sae(acts, mask, documents, exact=exact).x_hat.double() for exact in (True, False))
    x, weight = acts.double(), mask.double()  # a small difference is to be seen
    exact, swept = (float(fraction_unexplained(x, x - x_hat, weight)) for x_hat in forms)
    return exact, exact / swept - 1 if swept > 0 else 0.0


def batch_of(windows: Sequence[int], step: int, config: TrainConfig) -> list[int]:
    """The windows of a step: each epoch goes through all of them in an order of its own, and drops the rest."""
    epoch, place = divmod(step, len(windows) // config.batch_windows)
    order = window_order(len(windows), config.seed, epoch)
    start = place * config.batch_windows
    return [windows[int(at)] for at in order[start : start + config.batch_windows]]


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


def read_origin(run: Path) -> dict[str, Any]:
    """Where the activations of a run came from; empty where it does not say."""
    try:
        return json.loads((run / RUN).read_text(encoding="utf-8")).get("origin") or {}
    except (OSError, ValueError, AttributeError):
        return {}


def read_trained_on(run: Path) -> dict[str, Any]:
    """The model, layer, n_ctx, bos and keep_first of what a run was trained on (`csae.sources`); what it knows."""
    try:
        job = json.loads((run / RUN).read_text(encoding="utf-8"))
        known = (job.get("data") or {}) | (job.get("origin") or {})
    except (OSError, ValueError, AttributeError):
        return {}
    return {
        name: known[name] for name in ("model", "layer", "n_ctx", "bos", "keep_first") if known.get(name) is not None
    }


def _claim(run: Path, job: dict[str, Any]) -> None:
    """Make `run` the folder of this job; an earlier one there must be the same."""
    file = run / RUN
    for unfinished in run.glob(".*.tmp"):  # a kill cut their writing short
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    if file.is_file():
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}): remove the folder, or give another one") from error
        now = json.loads(json.dumps(job))
        differing = sorted(key for key in now.keys() | earlier.keys() if now.get(key) != earlier.get(key))
        if differing:
            raise UserError(
                f"{run}: holds another run (it differs in {', '.join(differing)}): "
                f"give another folder, or the options that it was started with"
            )
        return
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run}: not empty, and no run of csae: give another folder")
    write_json(file, job)


def _drop_later_metrics(file: Path, first: int) -> None:
    """Keep the lines of the steps before `first`: what came after the checkpoint will be done again."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] >= first:
                break
        except (ValueError, KeyError):  # the line that a kill cut short
            break
        kept.append(line + "\n")
    write_file(file, lambda path: path.write_text("".join(kept), encoding="utf-8"))


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that the step ends whole; a second one interrupts."""
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
