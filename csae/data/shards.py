"""Activations on disk: a folder of *.safetensors, written whole and read a window at a time.

The format, which anyone may write. Each file holds

    activations  [windows, T, d_in]  float16, bfloat16 or float32
    mask         [windows, T]        bool or uint8, optional: true where a position takes part; without it
                                     csae.data.activations.sink_mask decides, and zeros are padding in any case
    documents    [windows, T]        integer, optional: a document is a run of equal ids
    tokens       [windows, T]        integer, optional: the token ids

with the same T and d_in in all files; windows are numbered through the files in the order of their names. An
optional activations.json beside them says in a JSON object where they come from: `model`, `layer` (after how many of
its blocks), `hook` (which activations there, such as "mlp_out"; the residual stream if not given), `data`, `bos` (true
where windows begin with a beginning of sequence), `keep_first` (true where position 0 and outliers take part).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csae.errors import Stopped, UserError
from csae.files import check_readable, check_utf8, parse_json, reading, write_file, write_json, writing
from csae.progress import Progress, quiet
from csae.tensors import WORKING, save_plain

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
        check_utf8(self.folder)
        with reading(self.folder):
            if not self.folder.is_dir():
                raise UserError(f"activations {str(folder)!r}: no such folder")
            files = _listed(self.folder)
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

    def tokens(self, window: int) -> Tensor:
        """The token ids [T] of a window alone; only where has_tokens."""
        shard, row = self._locate(window)
        return shard.tokens(row)

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
        check_readable(file)
        try:
            with reading(file):
                self._tensors = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserError(
                f"{file} is no whole safetensors file ({error}): it was cut short or damaged; delete it and "
                "write it again"
            ) from error
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

    def tokens(self, row: int) -> Tensor:
        return self._tensors.get_slice("tokens")[row]


def _check_complete(files: Sequence[Path]) -> None:
    """Where files are named -00002-of-00005, as write_shards does, all five must be there."""
    numbered = (re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", file.name) for file in files)
    found = Counter((match[1], int(match[2])) for match in numbered if match)
    for (_, total), there in found.items():
        if there != total:
            raise UserError(
                f"activations {str(files[0].parent)!r}: {there} of {total} shards are there, so writing or copying "
                "them was cut short; the command that wrote them goes on, or copy them again"
            )


def _read_about(file: Path) -> dict[str, Any]:
    with reading(file):
        if not file.exists():
            return {}
        content = file.read_bytes()
    return parse_json(content, str(file), "repair or delete it, it is optional")


def _listed(folder: Path) -> list[Path]:
    """The shards in a folder, by name."""
    return sorted(folder / name for name in os.listdir(folder) if name.endswith(".safetensors"))


def write_shards(
    folder: str | Path,
    read: Callable[[range], dict[str, Tensor]],
    n_windows: int,
    windows_per_shard: int,
    about: dict[str, Any],
    progress: Progress = quiet,
) -> None:
    """Writes n_windows windows into a folder: a new or empty one, or one where the same job was cut short.

    read: gives the tensors of a range of windows, by their names in the format. about: for activations.json; it
    tells one job from another.
    Each file is written to a temporary name and then renamed, so what is there after a kill, a full disk, Ctrl-C or an
    error of `read` is whole, and stays. The same call goes on from there and gives the same bytes. If no file was
    finished, the folder is left as it was.

    Raises UserError where the folder holds something else or can't be written, Stopped after Ctrl-C.
    """
    folder = Path(folder)
    check_utf8(folder)
    n_shards = -(-n_windows // windows_per_shard)
    files = [folder / f"activations-{number:05d}-of-{n_shards:05d}.safetensors" for number in range(1, n_shards + 1)]
    with writing(folder):
        existed = folder.exists()
        _check_folder(folder, files, about)
        whole = [file for file in files if file.is_file()]
    sizes = [min(windows_per_shard, n_windows - first) for first in range(0, n_windows, windows_per_shard)]
    _check_whole(whole, dict(zip(files, sizes, strict=True)), read, files, windows_per_shard)
    missing = [number for number, file in enumerate(files) if file not in whole]
    try:
        write_json(folder / ABOUT_FILE, about)
        shards = _shards(read, missing, n_windows, windows_per_shard, progress)
        for number, shard in zip(missing, shards, strict=True):
            write_file(files[number], partial(save_plain, shard))
            whole.append(files[number])
    except BaseException as error:
        if not whole:
            (folder / ABOUT_FILE).unlink(missing_ok=True)
            if not existed and folder.is_dir():
                folder.rmdir()
            raise
        there = f"{len(whole)} of {n_shards} shards are whole and stay in {folder}"
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(f"stopped; {there}: the same command goes on from there") from error
        if isinstance(error, UserError):
            raise UserError(f"{error}; {there}") from error
        raise


def _check_folder(folder: Path, files: Sequence[Path], about: dict[str, Any]) -> None:
    """Raises UserError unless the folder is free or holds a part of this job; removes what a kill left half-written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"activations {str(folder)!r} is a file; give a new or empty folder")
    ours = {file.name for file in (*files, folder / ABOUT_FILE)}
    for name in os.listdir(folder):
        half_written = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", name.removesuffix(WORKING))
        if half_written and half_written[1] in ours and not _is_running(int(half_written[2])):
            shutil.rmtree(folder / name) if name.endswith(WORKING) else (folder / name).unlink()
    if not os.listdir(folder):
        return
    another = "give a new or empty folder, or delete it first"
    if not (folder / ABOUT_FILE).is_file():
        raise UserError(f"activations {str(folder)!r} is not empty; {another}")
    earlier, now = _read_about(folder / ABOUT_FILE), json.loads(json.dumps(about))
    differing = sorted(name for name in earlier.keys() | now.keys() if earlier.get(name) != now.get(name))
    if differing:
        changes = ", ".join(f"{name}: {earlier.get(name)!r}, now {now.get(name)!r}" for name in differing)
        raise UserError(f"activations {str(folder)!r} is not empty, it holds others ({changes}); {another}")
    for file in _listed(folder):
        if file.name not in ours:
            raise UserError(f"activations {str(folder)!r} is not empty, {file.name} is none of these; {another}")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


def _check_whole(
    whole: Sequence[Path],
    sizes: dict[Path, int],
    read: Callable[[range], dict[str, Tensor]],
    files: Sequence[Path],
    windows_per_shard: int,
) -> None:
    """Raises UserError unless the shards of an earlier start are of this job: their sizes, and the last one's content.

    The first few windows of the last shard are read again and compared: this catches what `about` does not hold, such
    as other weights.
    """
    other = "of another job; give a new or empty folder, or delete it first"
    shards = [_Shard(file) for file in whole]
    for shard in shards:
        if shard.shape[0] != sizes[shard.file]:
            raise UserError(f"{shard.file} holds {shard.shape[0]} windows, not {sizes[shard.file]}: it is {other}")
    if shards:
        first = files.index(shards[-1].file) * windows_per_shard
        count = min(WINDOWS_AT_ONCE, shards[-1].shape[0])
        there = [shards[-1].read(row) for row in range(count)]
        for name, tensor in read(range(first, first + count)).items():
            stored = [getattr(window, name) for window in there]
            if any(part is None for part in stored) or not _alike(torch.stack(stored), tensor.cpu()):
                raise UserError(f"{shards[-1].file} holds other {name} than are to be written: it is {other}")


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, or activations of the same from another machine."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool((one.float() - other.float()).norm() <= 0.02 * other.float().norm())


def _shards(
    read: Callable[[range], dict[str, Tensor]],
    numbers: Sequence[int],
    n_windows: int,
    windows_per_shard: int,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """The tensors of shards, filled a few windows at a time, so that no more than one shard is held."""
    steps = [
        range(start, min(start + WINDOWS_AT_ONCE, first + windows_per_shard, n_windows))
        for first in (number * windows_per_shard for number in numbers)
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
