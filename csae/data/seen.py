"""Which windows a run trained on: a hash of eight bytes each, by which they are recognised in other data.

    RUN/windows.bin    a kind of eight bytes, then the hashes: in the order of training while it runs, sorted
                       and each once when it is done

A window is hashed by its tokens where they are known, otherwise by its activations. It is recognised in any source, but
only as a whole: the same text cut at other places gives other windows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from csae.data.activations import ActivationSource
from csae.errors import UserError
from csae.files import reading, write_file

WINDOWS = "windows.bin"
TOKENS, ACTIVATIONS = b"tokens\0\0", b"activat\0"
HASH_BYTES = 8
ROWS = 16  # of a window's activations are hashed, the last one included, as it depends on all before it


class Seen(NamedTuple):
    """The windows that a run trained on."""

    by_tokens: bool
    """hashed by their tokens, not by their activations"""
    hashes: np.ndarray
    """[n] uint64, sorted, each once"""

    def among(self, hashes: np.ndarray) -> np.ndarray:
        """hashes [m] uint64 -> [m] bool: which of these windows were trained on."""
        if not len(self.hashes):
            return np.zeros(len(hashes), dtype=bool)
        at = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return self.hashes[at] == hashes


def window_hashes(tokens: Tensor | None, acts: Tensor) -> np.ndarray:
    """tokens [B, T] integer, or where they are not known acts [B, T, d_in] -> [B] uint64."""
    if tokens is not None:
        rows = tokens.to("cpu", torch.int64).numpy().astype("<i8", copy=False)
    else:
        chosen = torch.linspace(0, acts.shape[1] - 1, min(ROWS, acts.shape[1])).round().long()
        rows = acts[:, chosen.to(acts.device)].to("cpu", torch.float32).numpy().astype("<f4", copy=False)
    digests = [hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=HASH_BYTES).digest() for row in rows]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def hashes_of(source: ActivationSource, windows: Sequence[int]) -> tuple[np.ndarray, bool]:
    """The hashes [n] of windows of a source, and whether they are of tokens. A model is run only where it must be."""
    of = getattr(source, "tokens", None)
    tokens = None if of is None else of(windows)
    if tokens is not None:
        return window_hashes(tokens, tokens), True
    batch = source.read(windows)
    return window_hashes(batch.tokens, batch.acts), batch.tokens is not None


@contextmanager
def open_log(run: Path, windows: int) -> Iterator[BinaryIO]:
    """The file to which a run's hashes go (`log`), after those of the first `windows` that it trained on.

    Hashes after those, of an earlier start, are cut off: their steps will be done again. A run begun by a csae without
    this file stays without it. Raises UserError where some of the first hashes are missing.
    """
    file = run / WINDOWS
    wanted = len(TOKENS) + windows * HASH_BYTES if windows else 0
    there = file.stat().st_size if file.is_file() else 0
    if 0 < there < wanted:
        raise UserError(
            f"{file}: it lacks windows that the last checkpoint was trained on: put the whole file back, or remove it: "
            "which windows were trained on is then not known"
        )
    with open(file if there >= wanted else os.devnull, "ab") as opened:
        if there > wanted:
            opened.truncate(wanted)
            opened.seek(wanted)
        yield opened


def log(file: BinaryIO, hashes: bytes, by_tokens: bool) -> None:
    """Write the hashes (`window_hashes`) of a batch that is trained on."""
    if file.tell() == 0:
        file.write(TOKENS if by_tokens else ACTIVATIONS)
    file.write(hashes)


def read_seen(run: Path) -> Seen | None:
    """The windows that a run trained on; None where it does not say. Raises UserError where the file is damaged."""
    file = run / WINDOWS
    if not file.is_file():
        return None
    with reading(file):
        content = file.read_bytes()
    kind, hashes = content[: len(TOKENS)], content[len(TOKENS) :]
    if kind not in (TOKENS, ACTIVATIONS) and content:
        raise UserError(
            f"{file}: damaged: copy the run again, or remove the file: which windows were trained on is lost"
        )
    whole = len(hashes) // HASH_BYTES * HASH_BYTES  # a kill may have cut the last one
    return Seen(kind == TOKENS, np.unique(np.frombuffer(hashes[:whole], dtype="<u8")))


def settle(run: Path) -> None:
    """Sort the hashes of a run that is done, each once: windows of later epochs are the same ones."""
    seen = read_seen(run)
    if seen is not None:
        content = (TOKENS if seen.by_tokens else ACTIVATIONS) + seen.hashes.astype("<u8").tobytes()
        if (run / WINDOWS).read_bytes() != content:
            write_file(run / WINDOWS, lambda path: path.write_bytes(content))
