"""Another library's files: found in a local folder or in a folder of a hub repository, and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from csae.errors import UserError
from csae.files import write_with_config
from csae.sae import SAE
from csae.trained_on import ELSEWHERE_KEY, KEY, TrainedOn, named_in


def find(name: str | Path, filename: str) -> Path:
    """The path of a file in `name`: a folder, or "org/repo" or "org/repo/folder" on the hub. UserError without it."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / filename).is_file():
            raise UserError(f"{folder}: no {filename} there; needed the folder that holds the SAE's files")
        return folder / filename
    if folder.exists():
        raise UserError(f"{folder}: a file; needed the folder of the SAE, which holds {filename}")
    org, _, rest = str(name).partition("/")
    repo, _, subfolder = rest.partition("/")
    try:
        return Path(hf_hub_download(f"{org}/{repo}", filename, subfolder=subfolder or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: no such folder, and {filename} is not to be had from the hub: "
            "give the SAE's folder, or org/repo/folder of a hub repository"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, on the CPU."""
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}): copy it again") from error


def trained_on(config: dict[str, Any], metadata: dict[str, Any], file: Path) -> TrainedOn | None:
    """What an SAE of another library's file was trained on: as we wrote it in `config`, or as `metadata` names it."""
    if config.get(ELSEWHERE_KEY) is not None:
        return TrainedOn.from_config({KEY: config[ELSEWHERE_KEY]}, str(file))
    return named_in(metadata)


def record(sae: SAE) -> dict[str, Any]:
    """What to add to the config of another library for `trained_on` to read."""
    return {} if sae.trained_on is None else {ELSEWHERE_KEY: sae.trained_on.to_config()}


def write(folder: Path, weights: str, save: Callable[[Path], object], config: str, content: dict[str, Any]) -> None:
    """`csae.files.write_with_config`. Raises UserError where content, which a user may add to, is not JSON."""
    try:
        write_with_config(folder, weights, save, config, content)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"metadata: {error}; needed what JSON can say") from error
