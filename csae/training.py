"""One run while it trains: its SAE, optimizer, files and figures. `csae.train` leads runs through the steps."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from csae.checkpoint import (
    check_free,
    last_checkpoint,
    remove_checkpoints,
    restore_checkpoint,
    save_checkpoint,
    written,
)
from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import Batch, Place
from csae.data.background import Ready
from csae.data.batches import Batches, Step
from csae.data.seen import log, open_log, settle
from csae.distributed import check_replicas
from csae.distributed.hosts import Hosts, ranks_of
from csae.errors import UserError
from csae.extend import Earlier, earlier_job, extend, keep_source, of_source, source_of
from csae.figures import Figures, logged_steps, mean
from csae.files import read_json
from csae.logs import check_logs, open_logs
from csae.progress import say
from csae.run import (
    FILES,
    METRICS,
    RUN,
    append_line,
    as_json,
    check_job,
    check_metrics,
    differences,
    drop_later_metrics,
    locked,
    remove_unfinished,
    sync,
    write_options,
)
from csae.sae import SAE
from csae.saving import CONFIG, check_config
from csae.step import adam, exact_gap, learning_rate, step_graphs, sweeps_at, train_step
from csae.trained_on import TrainedOn

CALIBRATION_TOKENS = 1 << 15
NOT_REACHED = 0.02  # share of k; of a small sample one feature more may be a percent
SUSPICIOUS = 1e6  # from this loss on the batch is checked: an SAE that explains nothing has a loss of about 1


class Sample:
    """The first steps of training, read once, where a run asks for them."""

    def __init__(self, batches: Batches, hosts: Hosts, most: int) -> None:
        self._batches, self._hosts, self._most = batches, hosts, most
        self._steps: list[Step] | None = None

    def steps(self, tokens: int) -> list[Step]:
        """So many that they have as many tokens on all ranks together, up to `most` steps."""
        if self._steps is None:
            with self._hosts.together():
                found = (step for step in self._batches.start(0, None) if step.batches)
                first = next(found)
                each = next(iter(first.batches.values())).mask.numel()
                ranks = 1 if self._hosts.ranks is None else self._hosts.ranks.size
                needed = min(self._most, -(-tokens // (each * ranks)))
                self._steps = [first, *itertools.islice(found, needed - 1)]
        return self._steps


@dataclass
class Job:
    """An SAE to train, and how; trained in place, on the device that it is on. Its caller has initialised it."""

    sae: SAE
    run: Path | str
    """the folder of the run"""
    config: TrainConfig
    origin: dict[str, Any] | None = None
    """JSON for run.json: where the source can be opened again (`csae.data.sources`)"""
    place: Place | None = None
    """where it reads; None where the batches have one place"""
    logs: Sequence[str] = ()
    """where else its metrics go (`csae.logs`)"""
    init: dict[str, Any] | None = None
    """JSON for run.json: which SAE it begins from, where it was not `initialise`d; None otherwise"""
    asked: dict[str, Any] | None = None
    """options of `csae train` for config.yaml"""


class Training:
    """One run, from a look at its folder to the trained SAE in it."""

    def __init__(self, job: Job, batches: Batches) -> None:
        """Looks at the folder, and writes nothing. Raises UserError where it holds another job, or something else."""
        self.hosts = Hosts(ranks_of(job.sae))
        self.sae, self.run, self.logs, self.asked = job.sae, Path(job.run), job.logs, job.asked
        self.place = _place(job, batches)
        frozen = sorted(name for name, parameter in self.sae.named_parameters() if not parameter.requires_grad)
        if len(frozen) == len(list(self.sae.parameters())):
            raise UserError("sae: all of its parameters are frozen: give one with requires_grad=True to train")
        described = batches.describe(self.place)
        about = {
            "sae": self.sae.config,
            "n_params": self.sae.n_params,
            "train": dataclasses.asdict(job.config),
            "data": described,
            "n_windows": batches.n_windows,
            "n_ctx": batches.n_ctx,
            "origin": job.origin,
        }
        about |= {"frozen": frozen} if frozen else {}
        about |= {"init": job.init} if job.init else {}
        _check_same_job(about, self.hosts)
        self.earlier = self.hosts.from_first(lambda: self._look(about))
        self.about = self.earlier.about
        self.config = dataclasses.replace(job.config, **self.earlier.train)
        self.sae.trained_on = TrainedOn.of(described, job.origin)
        self.first = 0
        """steps that were done before"""
        self.saved = 0
        """steps that the last checkpoint holds"""
        self.writing: Future[None] = written()
        """the last checkpoint, which may still be being written"""
        self.state: dict[str, Tensor] | None = None
        """of the batches after those"""
        self.trained = self.is_finished()

    def _look(self, about: dict[str, Any]) -> Earlier:
        """What the folder says."""
        check_logs(self.logs)
        earlier = earlier_job(self.run, about)
        check_job(self.run, earlier.before or earlier.about)
        return earlier

    def is_finished(self) -> bool:
        earlier = self.earlier
        return self.hosts.from_first(
            lambda: (self.run / CONFIG).is_file() and earlier.before is None and not earlier.cut_short
        )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder and load the last checkpoint; `trained` where another process has finished it meanwhile."""
        with ExitStack() as files:
            with self.hosts.together():
                if self.hosts.is_first:
                    self.metrics = files.enter_context(locked(self.run, self.earlier.before or self.about))
            self.trained = self.is_finished()
            if not self.trained:
                self._prepare()
                files.callback(lambda: self.writing.result())  # while the folder is locked
                with self.hosts.together():
                    if self.hosts.is_first:
                        hashes = self.earlier.seen_by(self.first, self.config)
                        self.seen = files.enter_context(open_log(self.run, hashes))
                        self.log_to = files.enter_context(open_logs(self.logs, self.run, self.about))
            yield

    def _prepare(self) -> None:
        sae, run, config, is_first = self.sae, self.run, self.config, self.hosts.is_first
        with self.hosts.together():
            if is_first and self.asked is not None:
                write_options(run, self.asked)
            if is_first:
                remove_unfinished(run, FILES)
            broken = _not_finite(sae)
            if broken:
                raise UserError(
                    f"sae: {broken} holds NaN or Inf: initialise it (SAE.initialise) from finite activations"
                )
        self.optimizer = adam(sae, config)
        extend(self.earlier, run, sae, self.optimizer)
        checkpoint = self.hosts.from_first(lambda: last_checkpoint(run))
        beside: dict[str, Tensor] = {}
        if checkpoint is not None:
            self.first, beside = restore_checkpoint(checkpoint, sae, self.optimizer, self.about)
        self.saved = self.first
        self.optimizer.forget_steps()
        self.state = source_of(beside)
        every = config.checkpoint_every
        with self.hosts.together():
            if is_first:
                for step in range(self.first - self.first % every + every, config.steps, every):
                    check_free(run, step)
                logged = logged_steps(config, self.first, self.earlier.ends)
                by = "no checkpoint" if checkpoint is None else checkpoint.name
                drop_later_metrics(run, self.metrics, logged, by)
        self.device = sae.W_dec.device
        self.graphs = step_graphs(sae)
        self.figures = Figures(config.log_every, self.device, self.hosts.ranks)
        self._take_dead(sae.dead_features())
        if "dead" in beside:
            self._take_dead(beside["dead"].to(self.device))
            self.figures.restore(beside)
        self.line: dict[str, Any] = {}
        self.restart_clock(self.first)
        sae.train()

    def _take_dead(self, dead: Tensor) -> None:
        """Train these features [n_dead] by AuxK from here on: of a sharded SAE those of this rank's rows."""
        self.dead = dead
        ranks = self.hosts.ranks
        self.n_dead = sum(self.hosts.gather(len(dead))) // (1 if ranks is None else ranks.n_data)

    def begin(self, sample: Sample) -> None:
        """Give thresholds that are trained where to begin: where k features a token are active."""
        threshold = self.sae.threshold
        if self.first == 0 and isinstance(threshold, Parameter) and not any(self.hosts.gather(bool(threshold.any()))):
            self.calibrate(sample)

    @property
    def has_threshold(self) -> bool:
        """Whether the SAE has a threshold, and it is not frozen."""
        frozen = isinstance(self.sae.threshold, Parameter) and not self.sae.threshold.requires_grad
        return self.sae.selection != "topk" and not frozen

    def calibrate(self, sample: Sample) -> float:
        """Set the SAE's threshold by the first windows of training, where it has one that is not frozen.

        Gives the mean number of features a token that is reached; k where nothing is set.
        """
        sae = self.sae
        if not self.has_threshold:
            return sae.k
        return sae.calibrate([batch.batches[self.place] for batch in sample.steps(CALIBRATION_TOKENS)])

    def restart_clock(self, step: int) -> None:
        """Measure the speed from this step on."""
        self.since, self.began, self.busy = step, time.perf_counter(), 0.0

    def step(self, step: int, ready: Ready, batches: Batches) -> None:
        """Step number `step`, with a line of metrics where it is time for one.

        Raises UserError where the loss is not finite, or the disk is full.
        """
        batch = ready.step.batches[self.place]
        if step == self.first:
            self.before_line = step, self.state
        if self.hosts.is_first:
            log(self.seen, *ready.hashes[self.place])
        began = time.perf_counter()
        if ready.positions[self.place] > 1:  # else there is no variance to explain
            with self.optimizer.copies.used():  # nothing else writes the tables between steps
                how = step, self.config, self.dead, self.graphs
                losses, _ = train_step(self.sae, self.optimizer, batch, *how)
            self.figures.add(step, losses, batch.mask)
        self.busy += time.perf_counter() - began
        if (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps:
            self._log(step, batch, batches)
            self.before_line = step + 1, ready.step.state

    def _log(self, step: int, batch: Batch, batches: Batches) -> None:
        """A line of metrics of the steps since the last one; looks again for dead features."""
        config, sae = self.config, self.sae
        found = self.checked(batches)
        tokens = config.batch_windows * batches.n_ctx
        line: dict[str, Any] = {"step": step, "tokens": (step + 1) * tokens} | mean(found)
        line["dead"] = self.n_dead / sae.d_sae
        line["lr"] = learning_rate(step, config)
        trained = (step + 1 - self.since) * tokens
        line["tokens_per_s"] = round(trained / (time.perf_counter() - self.began), 1)
        line["sae_tokens_per_s"] = round(trained / max(self.busy, 1e-9), 1)
        due = step // config.gap_every > (step - config.log_every) // config.gap_every or step + 1 == config.steps
        trained_now = bool(self.figures.steps) and self.figures.steps[-1] == step
        if isinstance(sae, ContextualSAE) and due and trained_now:
            line["fvu_exact"], line["gap"] = exact_gap(sae, batch, sweeps_at(step, config, sae))
        self.figures.clear()
        self._take_dead(sae.dead_features())
        with self.hosts.together():
            if self.hosts.is_first:
                append_line(self.metrics, line)
                for log_line in self.log_to:
                    log_line(line)
        self.line = line
        self.restart_clock(step + 1)

    def checked(self, batches: Batches) -> list[dict[str, float]]:
        """The figures of the steps since the last line. Raises UserError where a loss is not finite, and says why."""
        found = self.figures.read()
        for step, figures in zip(self.figures.steps, found, strict=True):
            if not figures["loss"] < SUSPICIOUS:
                self._explain(step, figures["loss"], batches)
        return found

    def _explain(self, step: int, loss: float, batches: Batches) -> None:
        """Raises UserError where a loss is not finite, or its batch can't be reconstructed: why, and what to do."""
        # The batch is gone: it is made again, from the last place that is known.
        start, state = self.before_line
        with self.hosts.together():
            steps = (again for again in batches.start(start, state) if again.batches)
            again = next(itertools.islice(steps, step - start, None))
            batch, where = again.batches[self.place], again.where
            x = batch.acts[batch.mask].double()  # [tokens, d_in]
            scale = float(self.sae.scale)
            if not x.isfinite().all():
                self._refuse(f"NaN or Inf in the activations of {where}: make them again, or leave those windows out")
            if (x / scale).square().sum() > torch.finfo(torch.float32).max / 4:
                self._refuse(
                    f"activations as large as {float(x.abs().max()):.3g} in {where}, at a scale of {scale:.3g}: their "
                    f"squares are too large for float32: make them again, or leave those windows out"
                )
        of_ranks = self.hosts.gather(x[:1].cpu())
        first = next((of for of in of_ranks if len(of)), x)
        spread = sum(self.hosts.gather(float((x - first.to(x.device)).square().sum())))
        with self.hosts.together():
            # Below this it is rounding only.
            if not spread > 1e-12 * sum(self.hosts.gather(float(x.square().sum()))):
                self._refuse(
                    f"all positions of {where} that take part have the same activations: leave those windows out"
                )
            if not math.isfinite(loss) and step == 0:  # this is the loss before the first update
                self._refuse(
                    f"the loss is {loss} before the first step: initialise the SAE (SAE.initialise) from these "
                    "activations"
                )
            if not math.isfinite(loss):
                self._refuse(f"the loss is {loss} at step {step}: {_smaller_lr(self.config)}")

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.run}: {reason}")

    def checkpoint(self, done: int, state: dict[str, Tensor] | None, batches: Batches) -> None:
        """Write a checkpoint after `done` steps. state: of the batches then. Raises UserError as `step` does."""
        self.checked(batches)
        self._check_trained()
        with self.hosts.together():
            if self.hosts.is_first:
                sync(self.metrics)  # a checkpoint is never ahead of its metrics
                sync(self.seen)
        beside = {"dead": self.dead, **self.figures.state(), **of_source(state)}
        self.writing.result()  # one at a time
        self.writing = save_checkpoint(self.run, done, self.sae, self.optimizer, self.about, beside)
        self.saved = done

    def finish(self, state: dict[str, Tensor] | None, sample: Sample) -> None:
        """Calibrate and save the trained SAE. state: of the batches, after the last step."""
        self.writing.result()
        with self.hosts.together():
            if self.hosts.is_first:
                sync(self.metrics)
            if all(not state["step"] for state in self.optimizer.state.values()):
                raise UserError(
                    f"the mask lets no two positions of a step take part, in any of {self.config.steps}: "
                    f"nothing to train on"
                )
        self._check_trained()
        l0 = self.calibrate(sample)
        if abs(l0 / self.sae.k - 1) > NOT_REACHED and self.hosts.is_first:
            say(
                f"{self.run}: {l0:.3g} features a token in use, where k is {self.sae.k}: no threshold comes nearer, on "
                "the first windows of training"
            )
        assert self.sae.trained_on is not None
        train_fvu = self.line.get("fvu_exact", self.line.get("fvu"))
        self.sae.trained_on = dataclasses.replace(self.sae.trained_on, train_fvu=train_fvu)
        with self.hosts.together():
            if self.hosts.is_first:
                keep_source(self.run, state)
        self.sae.save_pretrained(self.run)
        self.trained = True

    def load_finished(self) -> None:
        """Load the trained SAE, if all files of its run agree that it is this one."""
        run, sae = self.run, self.sae
        self.hosts.from_first(self._check_finished)
        loaded = type(sae).from_pretrained(str(run), shard=sae.shard)
        sae.load_state_dict(loaded.state_dict())
        sae.trained_on = loaded.trained_on
        self.hosts.from_first(lambda: remove_unfinished(run, FILES))

    def _check_finished(self) -> None:
        run = self.run
        check_config(read_json(run / CONFIG), self.about["sae"], run / CONFIG, RUN)
        length = check_metrics(run, logged_steps(self.config, self.config.steps, self.earlier.ends), CONFIG)
        if (run / METRICS).stat().st_size != length:
            raise UserError(
                f"{run / METRICS}: it goes on after the last of {self.config.steps} steps: take those lines out"
            )

    def tidy(self) -> None:
        """What is left to do when the SAE is saved. Never raises: it says what it could not do."""
        self.sae.eval()
        if not self.hosts.is_first:
            return
        try:
            settle(self.run)  # not earlier: after a kill, the steps after the checkpoint are done again
        except UserError as error:  # the SAE is trained nevertheless
            say(str(error))
        for path, reason in remove_checkpoints(self.run, self.about).items():
            say(f"{path}: kept: {reason}")

    def _check_trained(self) -> None:
        """Raises UserError where weights are not finite, or ranks differ, before they replace the last checkpoint."""
        with self.hosts.together():
            broken = _not_finite(self.sae)
            if broken:
                raise UserError(f"{self.run}: {broken} holds NaN or Inf: {_smaller_lr(self.config)}")
        check_replicas(self.sae, self.optimizer)


def _place(job: Job, batches: Batches) -> Place:
    if job.place is None and len(batches.places) > 1:
        raise UserError(f"place: not given for {job.run}; needed one of {', '.join(map(str, batches.places))}")
    if job.place is not None and job.place not in batches.places:
        raise UserError(f"place: given {job.place} for {job.run}; needed one of {', '.join(map(str, batches.places))}")
    return batches.places[0] if job.place is None else job.place


def _check_same_job(about: dict[str, Any], hosts: Hosts) -> None:
    """Raises UserError where a rank has another job than rank 0, or other data."""
    first, *others = hosts.gather(as_json(about))
    for rank, other in enumerate(others, 1):
        if other == first:
            continue
        if other["n_windows"] != first["n_windows"]:
            raise UserError(
                f"n_windows: rank {rank} has {other['n_windows']} windows to train on, rank 0 has "
                f"{first['n_windows']}; needed the same data on all ranks"
            )
        differing = "; ".join(differences(first, other)).replace("the run has", "rank 0 has")
        raise UserError(
            f"rank {rank} trains on other data or in another way ({differing}); needed the same on all ranks"
        )


def _not_finite(sae: SAE) -> str | None:
    """A tensor of an SAE that holds NaN or Inf, or None."""
    return next((name for name, tensor in sae.state_dict().items() if not tensor.isfinite().all()), None)


def _smaller_lr(config: TrainConfig) -> str:
    return f"train again in another folder, with a smaller --lr (given {config.lr}); the last checkpoint is kept"
