"""Another library's files: found in a local folder or in a folder of a hub repository, and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from csae.errors import UserError
from csae.files import write_file


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


def write(folder: Path, weights: str, save: Callable[[Path], object], config: str, content: dict[str, Any]) -> None:
    """`save` fills the file `weights` of the folder, `content` goes to the file `config`: both, or neither.

    Raises UserError where content is not JSON, or the folder can't be written; what was there is still there then.
    """
    try:
        text = json.dumps(content, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"metadata: {error}; needed what JSON can say") from error

    def write_both(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        # Beside the config of another SAE, weights can mean something else: they take their name when it is ready.
        write_file(folder / weights, save)

    write_file(folder / config, write_both)
