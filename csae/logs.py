"""The metrics of a run where people look: Weights & Biases, trackio, TensorBoard.

A line of metrics.jsonl is logged as it is, at its step, without what is null. The config is run.json. A run that goes
on is logged where it was: RUN/logs.json keeps the id under which it is known.

    wandb        project csae, or that of WANDB_PROJECT. Files in RUN/wandb, or in WANDB_DIR. WANDB_MODE=offline works
    trackio      project csae, or that of TRACKIO_PROJECT. On this machine, unless TRACKIO_SPACE_ID is set
    tensorboard  events in RUN itself: `tensorboard --logdir` takes the folder of the run, or one above it

What fails after training has begun is said once, on stderr, and training goes on without it.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from csae import versions
from csae.errors import UserError, first_line, shown
from csae.files import read_json, write_json
from csae.progress import say

LOGS = ("wandb", "trackio", "tensorboard")
LOGS_FILE = "logs.json"
PROJECT = "csae"

Log = Callable[[dict[str, Any]], None]


def check_logs(names: Sequence[str]) -> None:
    """Raises UserError where a name is none of LOGS, or its package is not installed. Nothing is imported."""
    for name in names:
        if name not in LOGS:
            raise UserError(f"--log: given {name!r}; needed one of {', '.join(LOGS)}")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is none: wandb makes one itself
            raise UserError(f"--log {name}: the package {name} is not installed: {versions.pip_install(name)}")
        versions.check(name)


@contextlib.contextmanager
def open_logs(names: Sequence[str], run: Path | str, job: dict[str, Any]) -> Iterator[list[Log]]:
    """Opens the logs of one run; several runs may be open at once.

    Args:
        names: of LOGS.
        run: its folder, which is there. Its name is the name of the run.
        job: the content of run.json.

    Gives a callable for each name, which takes a line of metrics: {"step": int, name: number or None, ...}.
    Raises UserError where one can't be opened.
    """
    check_logs(names)
    run = Path(run)
    openers = {"wandb": _wandb, "trackio": _trackio, "tensorboard": _tensorboard}
    with contextlib.ExitStack() as stack:
        about = _known_as(run) if names else {}
        tries = {name: _Try(name) for name in names}
        yield [
            partial(tries[name], stack.enter_context(openers[name](run, job, about, tries[name])))
            for name in dict.fromkeys(names)
        ]


class _Try:
    """Calls a log, until it fails once; what a dashboard does wrong is no reason to end a training."""

    def __init__(self, name: str) -> None:
        self.name, self.failed = name, False

    def __call__(self, call: Callable[..., Any], *given: Any, **named: Any) -> None:
        if self.failed:
            return
        try:
            call(*given, **named)
        except Exception as error:
            self.failed = True
            self._tell(error, "training goes on, and is logged there no more")

    def end(self, call: Callable[..., Any], **named: Any) -> None:
        """The last call, which is tried also where one has failed; then it may fail too."""
        try:
            call(**named)
        except Exception as error:
            if not self.failed:
                self._tell(error, "its last lines may be missing there")

    def _tell(self, error: Exception, what: str) -> None:
        say(f"--log {self.name}: {shown(first_line(error))}: {what}; metrics.jsonl has all of it")


def _known_as(run: Path) -> dict[str, Any]:
    """The id under which a run is logged, and which logs have it already."""
    file = run / LOGS_FILE
    if not file.is_file():
        return {"id": uuid.uuid4().hex[:8], "begun": []}
    about = read_json(file)
    if not isinstance(about.get("id"), str) or not isinstance(about.get("begun"), list):
        raise UserError(f"{file}: it has no id and list `begun`: remove it, and the run is logged as a new one")
    return about


def _begun(run: Path, about: dict[str, Any], name: str) -> None:
    if name not in about["begun"]:
        about["begun"].append(name)
        write_json(run / LOGS_FILE, about)


@contextlib.contextmanager
def _wandb(run: Path, job: dict[str, Any], about: dict[str, Any], tried: _Try) -> Iterator[Log]:
    import wandb

    try:
        logged = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(run),
            id=about["id"],
            resume="allow",
            reinit="create_new",
            config=job,
            allow_val_change=True,  # a run that is extended has more steps
            dir=os.environ.get("WANDB_DIR", run),
            settings=wandb.Settings(console="off"),
        )
    except Exception as error:
        raise UserError(
            f"--log wandb: it can't start ({first_line(error)}): run `wandb login`, or set WANDB_MODE=offline"
        ) from error
    _begun(run, about, "wandb")

    def log(line: dict[str, Any]) -> None:
        if line["step"] >= logged.step:  # a run that goes on repeats the steps since its checkpoint, to the same bits
            logged.log(_numbers(line), step=line["step"])

    try:
        yield log
    except BaseException:
        tried.end(logged.finish, exit_code=1)
        raise
    tried.end(logged.finish)


@contextlib.contextmanager
def _trackio(run: Path, job: dict[str, Any], about: dict[str, Any], tried: _Try) -> Iterator[Log]:
    import trackio

    # A context of its own: trackio.init ends the run that it finds in the context, which may be another of ours.
    context = contextvars.Context()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            logged = context.run(
                trackio.init,
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{_name(run)}-{about['id']}",  # trackio finds a run to resume by its name
                resume="allow" if "trackio" in about["begun"] else "never",
                config=json.loads(json.dumps(job)),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except Exception as error:
            raise UserError(f"--log trackio: it can't start ({first_line(error)})") from error
    _begun(run, about, "trackio")
    try:
        yield lambda line: logged.log(_numbers(line), step=line["step"])
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            tried.end(logged.finish)


@contextlib.contextmanager
def _tensorboard(run: Path, job: dict[str, Any], about: dict[str, Any], tried: _Try) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def log(line: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            # A run that goes on repeats the steps since its checkpoint: from here on what was logged is hidden.
            writer = SummaryWriter(str(run), purge_step=line["step"])
            writer.add_text("config", f"```json\n{json.dumps(job, indent=2)}\n```", line["step"])
        for name, value in _numbers(line).items():
            writer.add_scalar(name, value, line["step"])

    try:
        yield log
    finally:
        if writer is not None:
            tried.end(writer.close)


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}


def _name(run: Path) -> str:
    return shown(run.resolve().name)
