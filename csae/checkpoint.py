"""Checkpoints of a run: `RUN/checkpoint-STEP`, whole or not there, and the SAE that is in a folder.

A checkpoint is a folder that is written under a temporary name and then renamed, so a kill at any moment
leaves the one before. It is itself a saved SAE, with the optimizer's state and the step beside.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import safetensors
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from csae.contextual_sae import ContextualSAE
from csae.errors import UserError
from csae.files import read_json, write_file, write_json
from csae.sae import CONFIG, SAE, WEIGHTS
from csae.topk_sae import TopKSAE

ARCHITECTURES: dict[str, type[SAE]] = {"topk": TopKSAE, "contextual": ContextualSAE}
OPTIMIZER, STATE = "optimizer.safetensors", "training.json"


def load_sae(name: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE of a run, a saved folder or a hub id, whichever architecture it is, in evaluation mode.

    A run that has not finished gives the SAE of its last checkpoint. Raises UserError where there is none,
    or where it is truncated or foreign.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            checkpoint = last_checkpoint(folder)
            if checkpoint is None:
                raise UserError(f"{folder}: no saved SAE here ({CONFIG} and {WEIGHTS} are needed): name a run's folder")
            folder = checkpoint
        config_file = folder / CONFIG
    elif folder.exists():
        raise UserError(f"{folder}: a file; needed the folder of a run, with {CONFIG} and {WEIGHTS}")
    else:
        config_file = _hub_config(str(name))
    config = read_json(config_file)
    arch = config.get("arch")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{config_file}: not an SAE of csae: arch is {arch!r}; needed one of {', '.join(map(repr, ARCHITECTURES))}"
        )
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
    found = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save_checkpoint(run: Path, step: int, sae: SAE, optimizer: torch.optim.Optimizer) -> None:
    """Write `run/checkpoint-STEP`, and remove older ones only when it is there."""
    temporary, final = run / f".checkpoint-{step}.tmp", run / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in sae.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": tensor.detach().contiguous()
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }
    try:
        sae.save_pretrained(temporary)
        write_file(temporary / OPTIMIZER, lambda path: save_file(moments, path))
        write_json(temporary / STATE, {"step": step})
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for older in run.glob("checkpoint-*"):
        if older != final:
            shutil.rmtree(older)


def restore_checkpoint(checkpoint: Path, sae: SAE, optimizer: torch.optim.Optimizer) -> int:
    """Put the checkpoint's state into `sae` and `optimizer`, in place; gives the step it was written at."""
    try:
        weights = load_file(checkpoint / WEIGHTS, device=str(sae.W_dec.device))
        moments = load_file(checkpoint / OPTIMIZER, device=str(sae.W_dec.device))
        step = int(read_json(checkpoint / STATE)["step"])
        sae.load_state_dict(weights)
        for name, parameter in sae.named_parameters():
            keys = [key for key in moments if key.rpartition(".")[0] == name]
            optimizer.state[parameter] = {key.rpartition(".")[2]: moments[key] for key in keys}
    except (safetensors.SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{checkpoint}: not a whole checkpoint of this run ({_one_line(error)}): "
            f"remove that folder to start again from the one before, or from the start"
        ) from error
    return step


def _hub_config(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, CONFIG))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: no such folder, and not to be had from the hub: give the folder of a run") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
