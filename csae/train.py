"""Training: windows in, run folders out. However often it is stopped on the way, a run ends with the same bits.

A step is a function of the parameters, the optimizer's state, the dead features and the step's number alone: the order
of windows comes from the seed, the learning rate from the step, and no other random number is drawn. Several SAEs train
on the same batches, each as if it were alone.

    RUN/run.json           what was trained on what, and how
    RUN/metrics.jsonl      a line for each `log_every` steps, with the step's number: loss, fvu, aux and l0 are means
                           over the steps since the line before, without those that were skipped, because fewer than two
                           of their positions are in the mask (null where all were); tokens, so far; dead, the share of
                           features that AuxK trained; lr; tokens_per_s, of all that is done, and sae_tokens_per_s, of
                           this SAE's steps alone (on a GPU: of what the host does for them); for a contextual SAE also
                           fvu_exact and gap, of the batch at hand, each `gap_every` steps
    RUN/windows.bin        which windows were trained on (csae.data.seen)
    RUN/checkpoint-STEP    the last checkpoint (csae.checkpoint)
    RUN/model.safetensors, RUN/config.json    the trained SAE, when it is done
    RUN/source.safetensors    where a stream of text was at the end, for a run that is extended
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from csae.config import TrainConfig
from csae.data.activations import ActivationSource
from csae.data.background import ready_steps
from csae.data.batches import Batches, IndexedBatches
from csae.distributed.hosts import Hosts, ranks_of
from csae.distributed.in_step import in_step
from csae.errors import FailedElsewhere, Stopped, UserError, shown
from csae.progress import bar as progress_bar
from csae.progress import say
from csae.sae import SAE
from csae.step import train_step
from csae.training import Job, Sample, Training

SAME_SIGNAL = 5.0  # seconds between signals that are one

__all__ = ["Job", "train", "train_step", "train_together"]


def train(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    run: Path | str,
    config: TrainConfig,
    origin: dict[str, Any] | None = None,
    logs: Sequence[str] = (),
) -> None:
    """Train `sae` in place on windows of `source`, and save it in the folder `run`.

    Continues from the last checkpoint where the folder holds one of the same job; returns at once where that job is
    done; extends it where it is done and config.steps are more (`csae.extend`). The caller has initialised `sae`
    (`SAE.initialise`), and moved it to the device to train on. `origin` (JSON) is kept in run.json: where the source
    can be opened again (`csae.data.sources`). `logs` are names of `csae.logs`: where else the metrics go.

    Of a sharded SAE (`csae.distributed`) all ranks call this with the same arguments. Each reads its share of the
    windows; rank 0 writes what is not a part of the SAE.

    Raises:
        UserError: the folder holds another job, or files that contradict each other; another process trains it;
            activations or the loss are not finite; the disk is full.
        Stopped: after Ctrl-C (SIGINT) or SIGTERM, with a checkpoint written.
        FailedElsewhere: another rank raised one of the others.
    """
    ranks = ranks_of(sae)
    share = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    train_together([Job(sae, run, config, origin, logs=logs)], IndexedBatches(source, windows, config, share))


def train_together(jobs: Sequence[Job], batches: Batches) -> None:
    """Train several SAEs on the same batches, each in a folder of its own, with the same bits as alone.

    All have the same steps, batch_windows and seed, and lie on one device, or are sharded over the same ranks; then
    `batches` are this rank's share (`csae.data.share`). Runs that are further than others, after a
    kill between their checkpoints, wait for those. Where one fails, the others get a checkpoint, and all stop.

    Raises UserError and Stopped as `train` does; the message names the run.
    """
    _check_alike(jobs)
    runs = [Training(job, batches) for job in jobs]
    with ExitStack() as stack:
        for run in runs:
            if not run.trained:
                stack.enter_context(run.opened())
        open_runs = [run for run in runs if not run.trained]
        if open_runs:
            stop = stack.enter_context(_stop_signal(runs[0].hosts.alone))
            _steps(open_runs, batches, stop)
        for run in runs:
            if run not in open_runs:
                run.load_finished()
    for run in runs:
        run.tidy()


def _check_alike(jobs: Sequence[Job]) -> None:
    """Raises UserError where jobs can't have the same batches, or would write to the same folder."""
    if not jobs:
        raise UserError("jobs: none given; needed at least one SAE to train")
    for name in ("steps", "batch_windows", "seed"):
        values = sorted({getattr(job.config, name) for job in jobs})
        if len(values) > 1:
            raise UserError(f"{name}: given {values}; needed the same for all SAEs that train on the same batches")
    folders = [Path(job.run).resolve() for job in jobs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: given for two SAEs; needed a folder for each")
    if len({id(ranks_of(job.sae)) for job in jobs}) > 1:
        raise UserError("sae: given sharded SAEs and whole ones, or of other ranks; needed all on the same ranks")
    devices = {str(job.sae.W_dec.device) for job in jobs}
    if len(devices) > 1:
        raise UserError(f"sae: given SAEs on {', '.join(sorted(devices))}; needed all on one device")


def _steps(runs: Sequence[Training], batches: Batches, stop: threading.Event) -> None:
    """All steps of these runs that are left, and the saving of each at its end."""
    first, last = min(run.first for run in runs), runs[0].config.steps
    state = next(run.state for run in runs if run.first == first)
    device, places = runs[0].sae.W_dec.device, {run.place for run in runs}
    problems: list[tuple[Training, Exception]] = []
    hosts = runs[0].hosts
    sample = Sample(batches, hosts, last)
    for run in runs:
        run.begin(sample)
    name = shown(runs[0].run.name) if len(runs) == 1 else f"{len(runs)} SAEs"
    with (
        progress_bar(total=last, initial=first, desc=name, unit="step", disable=not hosts.is_first) as bar,
        ready_steps(batches, first, last, state, device, places) as own_steps,
    ):
        steps = in_step(own_steps, hosts, stop)
        for run in runs:
            run.restart_clock(max(first, run.first))
        for step in range(first, last):
            done = step
            try:
                for ready, asked in steps:
                    if ready.step.batches:
                        break
                    _checkpoints(runs, step, state, batches, problems)  # it may wait for long
                    if problems or asked:
                        break
                else:
                    raise UserError(f"the data end before step {step} of {last}: give more, or fewer --tokens")
            except (UserError, BrokenPipeError, FailedElsewhere):
                _checkpoints(runs, step, state, batches, problems)
                raise
            if ready.step.batches and (hosts.alone or not asked):
                state, done = ready.step.state, step + 1
                for run in runs:
                    if run.first <= step:
                        _attempt(problems, run, run.step, step, ready, batches)
            try:
                _show(bar, runs, done)
            except BrokenPipeError:  # whoever read it is gone: as after Ctrl-C
                stop.set()
            if hosts.alone:  # several ranks agree before a step: one more could take too long for torchrun
                asked = stop.is_set()
            if problems or asked:
                _checkpoints(runs, done, state, batches, problems)
            elif done < last:
                due = [run for run in runs if done % run.config.checkpoint_every == 0]
                _checkpoints(due, done, state, batches, problems)
            if problems:
                raise _reported(problems, runs, done)
            if asked:
                raise Stopped(
                    f"{_named(runs)}: stopped after step {done} of {last}; the same command goes on from there"
                )
    _say_thresholds(sum(run.has_threshold for run in runs), hosts)
    for run in runs:
        _attempt(problems, run, run.finish, state, sample)
    if problems:
        raise _reported(problems, runs, last)


def _say_thresholds(count: int, hosts: Hosts) -> None:
    """Say what is done after the last step, which may take as long as many steps and draws no bar."""
    if count and hosts.is_first:
        what = "the threshold" if count == 1 else f"the thresholds of {count} SAEs"
        with suppress(BrokenPipeError):
            say(f"setting {what} on the first tokens of training")


def _attempt(problems: list[tuple[Training, Exception]], run: Training, do: Any, *given: Any) -> None:
    """`do(*given)`; an error of it is kept with the run that it is of.

    Of several ranks only if all of them have it. Otherwise the others wait, and end when this one does.
    """
    try:
        do(*given)
    except (UserError, FailedElsewhere) as error:
        problems.append((run, error))
    except Exception as error:
        if not run.hosts.alone:
            raise
        problems.append((run, error))


def _checkpoints(
    runs: Sequence[Training],
    done: int,
    state: dict[str, Tensor] | None,
    batches: Batches,
    problems: list[tuple[Training, Exception]],
) -> None:
    """A checkpoint after `done` steps of each run that did not fail, and has none of so many steps or more."""
    for run in runs:
        if run.saved < done and all(run is not failed for failed, _ in problems):
            _attempt(problems, run, run.checkpoint, done, state, batches)


def _reported(problems: list[tuple[Training, Exception]], runs: Sequence[Training], done: int) -> Exception:
    """The error to raise: that of the run that failed first, and what became of the others."""
    run, error = problems[0]
    others = len(runs) - len({id(failed) for failed, _ in problems})
    if not isinstance(error, UserError):
        error.add_note(f"(in the training of {run.run})")
        return error
    if len(runs) == 1:
        return error
    told = UserError(f"{error} (the other {others} of {len(runs)} SAEs go on from step {done} by the same command)")
    told.__cause__ = error
    return told


def _named(runs: Sequence[Training]) -> str:
    return str(runs[0].run) if len(runs) == 1 else f"{len(runs)} SAEs in {runs[0].run.parent}"


def _show(bar: Any, runs: Sequence[Training], done: int) -> None:
    """The last lines of metrics, behind the bar."""
    lines = [run.line for run in runs if run.line.get("loss") is not None]
    if lines and lines[0]["step"] + 1 == done:
        if len(runs) == 1:
            (line,) = lines
            gap = f" gap {line['gap']:+.1%}" if "gap" in line else ""
            figures = f"loss {line['loss']:.4f} fvu {line['fvu']:.4f}{gap} l0 {line['l0']:.1f} dead {line['dead']:.1%}"
        else:
            figures = "fvu " + " ".join(f"{line['fvu']:.3f}" for line in lines)
        bar.set_postfix_str(f"{figures} {lines[0]['tokens_per_s']:,.0f} tokens/s", refresh=False)
    bar.update()


@contextmanager
def _stop_signal(alone: bool) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that the step is finished; a later one interrupts.

    Ctrl-C under torchrun comes twice: from the terminal, and from torchrun.
    """
    asked, when = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: object) -> None:
        nonlocal when
        if not asked.is_set():
            when = time.monotonic()
        elif alone or time.monotonic() - when > SAME_SIGNAL:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
