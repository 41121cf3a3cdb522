"""Tensors in a safetensors file, with a checksum of them in its header that is compared when they are read."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
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
BLOCK_NUMBERS = 1 << 24  # of a tensor that is read in blocks


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
        raise unreadable(file, error) from error


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
        raise unreadable(file, error) from error
    if expected is not None and checksum(tensors) != expected:
        raise _not_as_saved(file)
    return tensors


def check_tensors(file: Path) -> None:
    """Raises UserError where a file is not as it was written, as `load_tensors` does; it is read in blocks."""
    check_readable(file)

    def digest(name: str) -> str:
        with safe_open(file, framework="pt") as stored:
            rows = stored.get_slice(name)
            shape = rows.get_shape()
            if not shape or 0 in shape:
                return _checksum(stored.get_tensor(name))
            step = max(1, BLOCK_NUMBERS // math.prod(shape[1:]))
            blocks = (rows[start : start + step] for start in range(0, shape[0], step))
            return digest_of(shape, blocks)

    try:
        with safe_open(file, framework="pt") as stored:
            names, expected = sorted(stored.keys()), (stored.metadata() or {}).get(CHECKSUM)
        found = expected if expected is None else _together(names, digest)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error
    if found != expected:
        raise _not_as_saved(file)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors on the CPU, in the order of their names."""
    return _together(sorted(tensors), lambda name: _checksum(tensors[name]))


def _together(names: Sequence[str], digest: Callable[[str], str]) -> str:
    """The checksum of tensors, each with its digest; made in threads."""
    with ThreadPoolExecutor() as threads:
        return combined(dict(zip(names, threads.map(digest, names), strict=True)))


def combined(digests: Mapping[str, str]) -> str:
    """The checksum of tensors with these digests, by their names in order."""
    named = [f"{name} {part}" for name, part in digests.items()]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _checksum(tensor: Tensor) -> str:
    return digest_of(list(tensor.shape), [tensor])


def digest_of(shape: list[int], blocks: Iterable[Tensor]) -> str:
    """What a checksum has of a tensor of this shape, from one or more blocks of its rows, in order."""
    digest = None
    for block in blocks:
        digest = digest or hashlib.sha256(f"{block.dtype} {shape}".encode())
        if block.numel():  # some without elements can't be seen as bytes
            digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert digest is not None
    return digest.hexdigest()


def _not_as_saved(file: Path) -> UserError:
    return UserError(f"{file}: its tensors are not those that were saved (their checksum differs): copy it again")


def unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{file}: not a whole safetensors file ({reason}): copy or train it again")
