"""Checkpoints of a run: `RUN/checkpoint-STEP`, whole or not there, and the SAE that is in a folder.

A checkpoint is a folder that is written under a temporary name and then renamed, so a kill at any moment leaves the
one before. It is itself a saved SAE, with the optimizer's state and the step beside. A folder counts as a checkpoint of
a run only if its files say so, and only such a folder is removed again.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from csae.contextual_sae import ContextualSAE
from csae.errors import UserError, shown
from csae.files import disk_problem, read_json, reading, write_file, write_json, writing
from csae.run import RUN, identity, read_run, remove_unfinished, sync_folder
from csae.sae import SAE
from csae.saving import CARD, CONFIG, WEIGHTS, check_config
from csae.tensors import CHECKSUM, load_tensors, read_header, save_tensors
from csae.topk_sae import TopKSAE

ARCHITECTURES: dict[str, type[SAE]] = {"topk": TopKSAE, "contextual": ContextualSAE}
OPTIMIZER, STATE = "optimizer.safetensors", "training.json"
BESIDE = "training/"  # before the names of tensors that are no parameter's
FILES = frozenset({WEIGHTS, CONFIG, CARD, OPTIMIZER, STATE})
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


def load_sae(name: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE of a run, a saved folder or a hub id, of any architecture, in evaluation mode.

    A run that has not finished gives the SAE of its last checkpoint. Raises UserError where there is none, where it is
    truncated or of another program, or where its files contradict each other.
    """
    folder = Path(name)
    job: dict[str, Any] = {}
    if folder.is_dir():
        job = read_run(folder)
        if not (folder / CONFIG).is_file():
            checkpoint = last_checkpoint(folder)
            if checkpoint is None:
                raise UserError(f"{folder}: no saved SAE here ({CONFIG} and {WEIGHTS} are needed): name a run's folder")
            _read_state(checkpoint, job)
            folder = checkpoint
        config_file = folder / CONFIG
    elif folder.exists():
        raise UserError(f"{folder}: a file; needed the folder of a run, with {CONFIG} and {WEIGHTS}")
    else:
        config_file = _hub_config(str(name))
    config = read_json(config_file)
    arch = config.get("arch")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UserError(
            f"{config_file}: not an SAE of csae: arch is {shown(repr(arch))[:60]}; "
            f"needed one of {', '.join(map(repr, ARCHITECTURES))}"
        )
    check_config(config, job.get("sae", {}), config_file, RUN)
    source = folder if folder.is_dir() else name
    try:
        sae = ARCHITECTURES[arch].from_pretrained(str(source), map_location=str(device))
    except UserError:
        raise
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise UserError(f"{source}: not a saved SAE of csae: {_one_line(error)}") from error
    return sae.eval()


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    with reading(run):
        found = [path for path in run.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return max(found, key=_step_of, default=None)


def save_checkpoint(
    run: Path,
    step: int,
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    job: dict[str, Any],
    beside: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write `run/checkpoint-STEP`, and then remove older ones. beside: what `restore_checkpoint` is to give back."""
    temporary, final = run / f".checkpoint-{step}.tmp", run / f"checkpoint-{step}"
    kept = {BESIDE + name: tensor for name, tensor in (beside or {}).items()}
    check_free(run, step)
    _remove_files(temporary)
    try:
        sae.save_pretrained(temporary)
        write_file(temporary / OPTIMIZER, partial(save_tensors, _moments(sae, optimizer) | kept))
        checksums = {name: read_header(temporary / name).about[CHECKSUM] for name in (WEIGHTS, OPTIMIZER)}
        write_json(temporary / STATE, {"step": step, "run": identity(job), "sha256": checksums})
        with writing(final):
            os.rename(temporary, final)
    finally:
        _remove_files(temporary)
    sync_folder(run)
    remove_checkpoints(run, job, but=final)


def check_free(run: Path, step: int) -> None:
    """Raises UserError where the name of the checkpoint to write is taken."""
    if os.path.lexists(run / f"checkpoint-{step}"):
        raise UserError(f"{run}/checkpoint-{step}: in the way of a checkpoint of this run: move it elsewhere")


def restore_checkpoint(
    checkpoint: Path, sae: SAE, optimizer: torch.optim.Optimizer, job: dict[str, Any]
) -> tuple[int, dict[str, torch.Tensor]]:
    """Load the checkpoint's state into `sae` and `optimizer`, in place; gives its step, and what was saved beside.

    Raises UserError where it is not whole, of another run, or where its files contradict each other.
    """
    state = _read_state(checkpoint, job)
    moments = _moments(sae, optimizer)
    try:
        check_config(read_json(checkpoint / CONFIG), job["sae"], checkpoint / CONFIG, RUN)
        loaded = {
            name: _load(checkpoint / name, expected, state.get("sha256", {}).get(name))
            for name, expected in ((WEIGHTS, sae.state_dict()), (OPTIMIZER, moments))
        }
    except UserError as error:
        raise _not_whole(checkpoint, error) from error
    sae.load_state_dict(loaded[WEIGHTS])
    for name, tensor in moments.items():
        tensor.copy_(loaded[OPTIMIZER].pop(name))
    return state["step"], {name.removeprefix(BESIDE): tensor for name, tensor in loaded[OPTIMIZER].items()}


def remove_checkpoints(run: Path, job: dict[str, Any], but: Path | None = None) -> dict[Path, str]:
    """Remove the checkpoints that this run wrote, and what a kill left of them; gives what is kept, and why.

    but: one that stays. Kept is whatever else has the name of a checkpoint: a link, a file, a folder with a file that
    training did not write. Never raises.
    """
    kept = {}
    for path in sorted(_entries(run)):
        if path.name.startswith(".") and NAME.fullmatch(path.name.removeprefix(".").removesuffix(".tmp")):
            _remove_files(path)
        elif NAME.fullmatch(path.name) and path != but:
            reason = _why_not_ours(path, job)
            if reason is None:
                try:
                    # Renamed first: under its own name a checkpoint is always whole.
                    os.rename(path, leaving := run / f".{path.name}.tmp")
                    _remove_files(leaving)
                except FileNotFoundError:
                    pass  # another process removed it
                except OSError as error:
                    reason = disk_problem(error) or str(error)
            if reason is not None:
                kept[path] = reason
    return kept


def _remove_files(folder: Path) -> None:
    """Remove a folder with a checkpoint's temporary name, except files that training does not write. Never raises."""
    if folder.is_symlink() or not folder.is_dir():
        return
    remove_unfinished(folder, FILES)
    for entry in _entries(folder):
        if entry.name in FILES and _is_plain(entry):
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
        others = sorted(name for name, entry in entries.items() if name not in FILES or not _is_plain(entry))
        if others:
            return f"it holds {shown(others[0])}, which training did not write"
        if entries.keys() != FILES:
            return f"it has no {min(FILES - entries.keys())}"
        _read_state(path, job)
    except OSError as error:
        return disk_problem(error, "read") or str(error)
    except UserError:
        return f"its {STATE} is of another checkpoint"
    return None


def _is_plain(entry: Path) -> bool:
    return entry.is_file() and not entry.is_symlink()


def _read_state(checkpoint: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The content of training.json: step, run, checksums. Raises UserError where it is of another checkpoint or job."""
    try:
        state = read_json(checkpoint / STATE)
    except UserError as error:
        raise _not_whole(checkpoint, error) from error
    step, steps = state.get("step"), job.get("train", {}).get("steps")
    if isinstance(step, bool) or not isinstance(step, int) or step != _step_of(checkpoint):
        raise _not_whole(checkpoint, f"{STATE} says step {shown(repr(step))[:40]}")
    if isinstance(steps, int) and step > steps:
        raise _not_whole(checkpoint, f"the run has {steps} steps")
    if job and state.get("run", identity(job)) != identity(job):
        raise _not_whole(checkpoint, f"{STATE} names another run than {RUN}")
    if not isinstance(state.get("sha256", {}), dict):
        raise _not_whole(checkpoint, f"sha256 in {STATE} is no object")
    return state


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _moments(sae: SAE, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state, by the names of the SAE's parameters."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in sae.named_parameters()}
    return {
        f"{names[parameter]}.{key}": tensor
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def _load(file: Path, expected: dict[str, torch.Tensor], checksum: str | None) -> dict[str, torch.Tensor]:
    """The tensors of a file. Their checksum has to be that expected, and names and shapes, but of those BESIDE."""
    header = read_header(file)
    found = {name: shape for name, shape in header.shapes.items() if not name.startswith(BESIDE)}
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if found != shapes:
        name = min(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise UserError(f"{file.name}: {shown(name)} is {found.get(name)}; needed {shapes.get(name)}")
    if checksum is not None and header.about.get(CHECKSUM) != checksum:
        raise UserError(f"{file.name} is not the file that {STATE} was written with")
    return load_tensors(file)


def _not_whole(checkpoint: Path, reason: object) -> UserError:
    return UserError(
        f"{checkpoint}: not a whole checkpoint of this run ({reason}): "
        f"remove that folder to start again from the one before, or from the start"
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _hub_config(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, CONFIG))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: no such folder, and not to be had from the hub: give the folder of a run") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
