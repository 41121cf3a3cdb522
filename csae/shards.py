"""Activations on disk: a folder of *.safetensors, written whole and read a window at a time.

The format, which anyone may write. Each file holds

    activations  [windows, T, d_in]  float16, bfloat16 or float32
    mask         [windows, T]        bool or uint8, optional: true where a position takes part
    documents    [windows, T]        integer, optional: a document is a run of equal ids
    tokens       [windows, T]        integer, optional: the token ids

with the same T and d_in in all files; windows are numbered through the files in the order of their names. An
optional activations.json beside them says in a JSON object where they come from.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from csae.errors import UserError
from csae.files import write_file, write_json
from csae.progress import Progress, quiet

ABOUT_FILE = "activations.json"
ACTIVATION_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
INTEGER_DTYPES = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}
DTYPES = {"mask": {"BOOL", "U8"}, "documents": INTEGER_DTYPES, "tokens": INTEGER_DTYPES}
WINDOWS_AT_ONCE = 16


class Window(NamedTuple):
    """One window as it is stored; what its file does not have is None."""

    activations: Tensor  # [T, d_in]
    mask: Tensor | None = None  # [T]
    documents: Tensor | None = None  # [T]
    tokens: Tensor | None = None  # [T]


class ShardReader:
    """Random access to the windows in a folder of shards. The files are memory-mapped: only what is asked is read.

    n_windows, n_ctx, d_in: the sizes. dtype: of the first file's activations. has_tokens, has_mask: whether all
    files hold token ids, a mask. about: what activations.json says, or {}.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError where there is no such folder, or a file in it is not as the format wants it."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"activations {str(folder)!r}: no such folder")
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"activations {str(folder)!r}: the folder holds no *.safetensors file")
        _check_complete(files)
        self.about = _read_about(self.folder / ABOUT_FILE)
        self._shards = [_Shard(file) for file in files]
        first = self._shards[0]
        _, self.n_ctx, self.d_in = first.shape
        self.dtype = first.dtype
        for shard in self._shards:
            if shard.shape[1:] != first.shape[1:]:
                raise UserError(
                    f"{shard.file}: activations are {shard.shape}, those of {first.file.name} {first.shape}; all files "
                    "of a folder need the same T and d_in: give them folders of their own"
                )
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.shape[0])
        self.n_windows = self._starts[-1]
        if self.n_windows * self.n_ctx * self.d_in == 0:
            raise UserError(f"activations {str(folder)!r} are empty: {self.n_windows} windows of {first.shape[1:]}")
        self.has_tokens = all("tokens" in shard.names for shard in self._shards)
        self.has_mask = all("mask" in shard.names for shard in self._shards)

    def read(self, window: int) -> Window:
        """Window number `window`, 0 <= window < n_windows, as it is stored; NaN and Inf are not looked for."""
        shard, row = self._locate(window)
        return shard.read(row)

    def where(self, window: int) -> str:
        """The file that holds a window and its number in there, for messages."""
        shard, row = self._locate(window)
        return f"{shard.file}, window {row}"

    def _locate(self, window: int) -> tuple[_Shard, int]:
        if not 0 <= window < self.n_windows:
            raise IndexError(f"window: given {window}; needed 0 to {self.n_windows - 1}")
        number = bisect_right(self._starts, window) - 1
        return self._shards[number], window - self._starts[number]


class _Shard:
    """One memory-mapped file, checked when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._tensors = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no whole safetensors file ({error}); delete it and write it again") from error
        self.names = set(self._tensors.keys())
        if "activations" not in self.names:
            raise UserError(
                f"{file} holds no tensor `activations`, only {', '.join(sorted(self.names)) or 'nothing'}; "
                "give a folder of activation shards"
            )
        activations = self._tensors.get_slice("activations")
        self.shape = tuple(activations.get_shape())
        if len(self.shape) != 3:
            raise UserError(f"{file}: activations are {self.shape}; needed [windows, T, d_in]")
        if activations.get_dtype() not in ACTIVATION_DTYPES:
            raise UserError(f"{file}: activations are {activations.get_dtype()}; needed float16, bfloat16 or float32")
        self.dtype = ACTIVATION_DTYPES[activations.get_dtype()]
        for name in DTYPES.keys() & self.names:
            tensor = self._tensors.get_slice(name)
            if tuple(tensor.get_shape()) != self.shape[:2]:
                raise UserError(f"{file}: {name} is {tuple(tensor.get_shape())}; needed {self.shape[:2]}")
            if tensor.get_dtype() not in DTYPES[name]:
                needed = "bool or uint8" if name == "mask" else "an integer type"
                raise UserError(f"{file}: {name} is {tensor.get_dtype()}; needed {needed}")

    def read(self, row: int) -> Window:
        return Window(**{name: self._tensors.get_slice(name)[row] for name in Window._fields if name in self.names})


def _check_complete(files: Sequence[Path]) -> None:
    """Where files are named -00002-of-00005, as write_shards does, all five must be there."""
    numbered = (re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", file.name) for file in files)
    found = Counter((match[1], int(match[2])) for match in numbered if match)
    for (_, total), there in found.items():
        if there != total:
            raise UserError(
                f"activations {str(files[0].parent)!r}: {there} of {total} shards are there, so writing or copying "
                "them was cut short; delete the folder and write it again"
            )


def _read_about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is no JSON ({error}); repair or delete it, it is optional") from error
    if not isinstance(about, dict):
        raise UserError(f"{file} is no JSON object; repair or delete it, it is optional")
    return about


def write_shards(
    folder: str | Path,
    read: Callable[[range], dict[str, Tensor]],
    n_windows: int,
    windows_per_shard: int,
    about: dict[str, Any],
    progress: Progress = quiet,
) -> None:
    """Writes n_windows windows into a new or empty folder, all or nothing.

    read: gives the tensors of a range of windows, by their names in the format. about: for activations.json.
    Each file is written to a temporary name and then renamed. On any failure (a full disk, Ctrl-C, an error of
    `read`) what was written is deleted. Raises UserError where the folder is in use or can't be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"activations {str(folder)!r} is a file; give a new or empty folder")
    existed = folder.exists()
    if existed and any(folder.iterdir()):
        raise UserError(f"activations {str(folder)!r} is not empty; give a new or empty folder, or delete it first")
    written: list[Path] = []
    try:
        n_shards = -(-n_windows // windows_per_shard)
        for number, shard in enumerate(_shards(read, n_windows, windows_per_shard, progress), start=1):
            written.append(folder / f"activations-{number:05d}-of-{n_shards:05d}.safetensors")
            write_file(written[-1], partial(save_file, shard))
        written.append(folder / ABOUT_FILE)
        write_json(written[-1], about)
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        if not existed and folder.is_dir():
            folder.rmdir()
        raise


def _shards(
    read: Callable[[range], dict[str, Tensor]], n_windows: int, windows_per_shard: int, progress: Progress
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each shard, filled a few windows at a time, so that no more than one shard is held."""
    steps = [
        range(start, min(start + WINDOWS_AT_ONCE, first + windows_per_shard, n_windows))
        for first in range(0, n_windows, windows_per_shard)
        for start in range(first, min(first + windows_per_shard, n_windows), WINDOWS_AT_ONCE)
    ]
    shard: dict[str, Tensor] = {}
    for windows in progress(steps, "caching activations"):
        offset = windows.start % windows_per_shard
        size = min(windows_per_shard, n_windows - windows.start + offset)
        for name, tensor in read(windows).items():
            if name not in shard:
                shard[name] = torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype)
            shard[name][offset : offset + len(windows)] = tensor
        if offset + len(windows) == size:
            yield shard
            shard = {}
