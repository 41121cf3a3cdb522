"""Files that are whole or not there: written under a temporary name, then renamed; and JSON read back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from csae.errors import UserError


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its name at once.

    Raises UserError where the disk is full or the folder can't be written; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        reason = _disk_problem(error)
        if reason:
            raise UserError(f"{path}: not written: {reason}; nothing half-written was left") from error
        raise


def check_writable(path: Path) -> None:
    """Raises UserError now where `write_file` would after the work; a folder that it makes on the way stays."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: it is a folder: give the name of a file")
    trial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{path}: can't be written: {_disk_problem(error) or error}") from error


def write_with_config(
    folder: Path, weights: str, save: Callable[[Path], object], config: str, content: dict[str, Any]
) -> None:
    """`save` fills the file `weights` of the folder, `content` goes to the file `config` as JSON: both, or neither.

    Beside the config of another SAE, weights can mean something else. Raises as `write_file` does; what was there is
    still there then.
    """
    text = json.dumps(content, indent=2) + "\n"

    def write_both(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        write_file(folder / weights, save)  # it takes its name when the config is ready to

    write_file(folder / config, write_both)


def write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): copy the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: given a JSON {type(content).__name__}; needed an object")
    return content


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _disk_problem(error: BaseException) -> str | None:
    # safetensors reports a full disk in the text of an error of its own.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return "the disk is full: free some space, or choose another folder"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "it is larger than this file system or its limits allow: choose another folder"
    if isinstance(error, PermissionError):
        return "no permission to write there: choose another folder"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "a part of that path is a file, not a folder: choose another folder"
    if isinstance(error, IsADirectoryError):
        return "it is a folder: give the name of a file"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: choose another folder"
    return None
