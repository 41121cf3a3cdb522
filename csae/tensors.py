"""Tensors in a safetensors file, with a checksum of them in its header that is compared when they are read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from csae.errors import UserError
from csae.files import check_readable

CHECKSUM = "sha256"
WORKING = ".d"


class Header(NamedTuple):
    """The header of a file of tensors."""

    shapes: dict[str, tuple[int, ...]]
    about: dict[str, str]
    """the texts that `save_tensors` was given, and the checksum"""


def save_tensors(tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device, and texts about them. For `csae.files.write_file`."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {"format": "pt", **(about or {}), CHECKSUM: checksum(stored)}
    save_plain(stored, file, texts)


def save_plain(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors on the CPU as they are. Without metadata, whose order varies, the bytes are always the same."""
    # safetensors writes to a file of a random name first. In a folder of its own, it can be found after a kill.
    folder = file.with_name(file.name + WORKING)
    folder.mkdir(exist_ok=True)
    try:
        save_file(dict(tensors), folder / "tensors", metadata=None if metadata is None else dict(metadata))
        os.replace(folder / "tensors", file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_header(file: Path) -> Header:
    """The header of a file; no tensor is read. Raises UserError where it can't be read or is cut short."""
    check_readable(file)
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
            return Header(shapes, stored.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises UserError where it is not as it was written.

    A file without a checksum, of another program or an earlier version, is taken as it is.
    """
    check_readable(file)
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            expected = (stored.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error
    if expected is not None and checksum(tensors) != expected:
        raise UserError(f"{file}: its tensors are not those that were saved (their checksum differs): copy it again")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors on the CPU, in the order of their names."""
    with ThreadPoolExecutor() as threads:
        parts = threads.map(_checksum, (tensors[name] for name in sorted(tensors)))
        named = [f"{name} {part}" for name, part in zip(sorted(tensors), parts, strict=True)]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():  # some without elements can't be seen as bytes
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{file}: not a whole safetensors file ({reason}): copy or train it again")
