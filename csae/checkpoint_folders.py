"""The checkpoints of a run as folders: `RUN/checkpoint-STEP`, which of them are ours, and their removal.

A folder counts as a checkpoint of a run only if its files say so, and only such a folder is removed.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from csae.errors import UserError, shown
from csae.exchange import CONFIG
from csae.files import disk_problem, read_json, reading
from csae.parts import METADATA, OF_RANK, WEIGHTS
from csae.run import RUN, identity, remove_unfinished
from csae.saving import CARD
from csae.tensors import CHECKSUM

OPTIMIZER, STATE = "optimizer.safetensors", "training.json"
FILES = frozenset({WEIGHTS, CONFIG, CARD, OPTIMIZER, STATE})
OF_RANKS = frozenset({METADATA, CONFIG, CARD, STATE})  # and a file of each rank
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    with reading(run):
        found = [path for path in run.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return max(found, key=_step_of, default=None)


def check_free(run: Path, step: int) -> None:
    """Raises UserError where the name of the checkpoint to write is taken."""
    if os.path.lexists(run / f"checkpoint-{step}"):
        raise UserError(f"{run}/checkpoint-{step}: in the way of a checkpoint of this run: move it elsewhere")


def remove_checkpoints(run: Path, job: dict[str, Any], but: Path | None = None) -> dict[Path, str]:
    """Remove the checkpoints that this run wrote, and what a kill left of them; gives what is kept, and why.

    but: one that stays. Kept is whatever else has the name of a checkpoint: a link, a file, a folder with a file that
    training did not write. Never raises.
    """
    kept = {}
    for path in sorted(_entries(run)):
        if path.name.startswith(".") and NAME.fullmatch(path.name.removeprefix(".").removesuffix(".tmp")):
            remove_files(path)
        elif NAME.fullmatch(path.name) and path != but:
            reason = _why_not_ours(path, job)
            if reason is None:
                try:
                    # Renamed first: under its own name a checkpoint is always whole.
                    os.rename(path, leaving := run / f".{path.name}.tmp")
                    remove_files(leaving)
                except FileNotFoundError:
                    pass  # another process removed it
                except OSError as error:
                    reason = disk_problem(error) or str(error)
            if reason is not None:
                kept[path] = reason
    return kept


def remove_files(folder: Path) -> None:
    """Remove a folder with a checkpoint's temporary name, except files that training does not write. Never raises."""
    if folder.is_symlink() or not folder.is_dir():
        return
    remove_unfinished(folder, FILES)
    for entry in _entries(folder):
        if _is_ours(entry) or entry.name == f"{METADATA}.tmp":
            with suppress(OSError):
                entry.unlink()
    with suppress(OSError):
        folder.rmdir()


def _why_not_ours(path: Path, job: dict[str, Any]) -> str | None:
    """Why something with the name of a checkpoint is not one that this run wrote; None where it is."""
    if path.is_symlink() or not path.is_dir():
        return "it is a link" if path.is_symlink() else "it is a file"
    try:
        entries = {entry.name: entry for entry in path.iterdir()}
        others = sorted(name for name, entry in entries.items() if not _is_ours(entry))
        if others:
            return f"it holds {shown(others[0])}, which training did not write"
        files = FILES
        if METADATA in entries:
            files = OF_RANKS | read_state(path, job).get(CHECKSUM, {}).keys()
        if entries.keys() != files:
            lacking, more = sorted(files - entries.keys()), sorted(entries.keys() - files)
            return f"it has no {lacking[0]}" if lacking else f"it holds {more[0]}, which is of another checkpoint"
        read_state(path, job)
    except OSError as error:
        return disk_problem(error, "read") or str(error)
    except UserError:
        return f"its {STATE} is of another checkpoint"
    return None


def _is_ours(entry: Path) -> bool:
    named = entry.name in FILES | OF_RANKS or re.fullmatch(OF_RANK, entry.name) is not None
    return named and entry.is_file() and not entry.is_symlink()


def read_state(checkpoint: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The content of training.json: step, run, checksums. Raises UserError where it is of another checkpoint or job."""
    try:
        state = read_json(checkpoint / STATE)
    except UserError as error:
        raise not_whole(checkpoint, error) from error
    step, steps = state.get("step"), job.get("train", {}).get("steps")
    if isinstance(step, bool) or not isinstance(step, int) or step != _step_of(checkpoint):
        raise not_whole(checkpoint, f"{STATE} says step {shown(repr(step))[:40]}")
    if isinstance(steps, int) and step > steps:
        raise not_whole(checkpoint, f"the run has {steps} steps")
    if job and state.get("run", identity(job)) != identity(job):
        raise not_whole(checkpoint, f"{STATE} names another run than {RUN}")
    if not isinstance(state.get("sha256", {}), dict):
        raise not_whole(checkpoint, f"sha256 in {STATE} is no object")
    return state


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def not_whole(checkpoint: Path, reason: object) -> UserError:
    return UserError(
        f"{checkpoint}: not a whole checkpoint of this run ({reason}): "
        f"remove that folder to start again from the one before, or from the start"
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
