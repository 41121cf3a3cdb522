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

A file's metadata may hold `sha256`, the checksum of its tensors (`csae.tensors.checksum`); `check_shards` compares it.

Several hook points of the same windows are a folder of such folders. Its activations.json holds `places`, an object
that gives for each hook point the name of its folder.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csae.data.places import name_of_layer
from csae.errors import UserError, shown
from csae.files import check_readable, check_utf8, parse_json, reading
from csae.progress import Progress, quiet
from csae.tensors import CHECKSUM, load_tensors, read_header
from csae.trained_on import RESIDUAL

ABOUT_FILE = "activations.json"
KEPT_TEXT = ".text"  # a folder of a stream's windows (`csae.data.kept_text`), while their activations are written
ACTIVATION_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
INTEGER_DTYPES = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}
DTYPES = {"mask": {"BOOL", "U8"}, "documents": INTEGER_DTYPES, "tokens": INTEGER_DTYPES}


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
            files = listed(self.folder)
        if not files:
            raise UserError(f"activations {str(folder)!r}: the folder holds no *.safetensors file")
        _check_complete(files)
        self.about = read_about(self.folder / ABOUT_FILE)
        self._shards = [Shard(file) for file in files]
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
        said = self.about.get("n_windows") if "windows_sha256" in self.about else None  # as write_cache writes them
        if isinstance(said, int) and said > self.n_windows:
            raise UserError(
                f"activations {str(folder)!r}: {self.n_windows} of {said} windows are there: copy the rest again, or "
                "write them again in a new folder"
            )

    def read(self, window: int) -> Window:
        """Window number `window`, 0 <= window < n_windows, as it is stored; NaN and Inf are not looked for."""
        shard, row = self._locate(window)
        return shard.read(row)

    def activations(self, windows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Those of windows as they are stored, [T, d_in], each with its place in `windows`; in the order of the files.

        They are the caller's, until the next one is read over it: so a window is in the processor's cache while it is
        used. Raises UserError where a file was changed, or cut short, since it was opened.
        """
        in_order = sorted((window, at) for at, window in enumerate(windows))
        for shard, group in groupby(in_order, lambda place: self._locate(place[0])[0]):
            places = list(group)
            stored = shard.activations([self._locate(window)[1] for window, _ in places])
            yield from zip((at for _, at in places), stored, strict=True)

    def tokens(self, window: int) -> Tensor:
        """The token ids [T] of a window alone; only where has_tokens."""
        shard, row = self._locate(window)
        return shard.tensors["tokens"][row]

    def prefetch(self, windows: Sequence[int]) -> None:
        """Has the system read the activations of windows that are needed soon, and doesn't wait for them."""
        rows: dict[Shard, list[int]] = defaultdict(list)
        for window in windows:
            shard, row = self._locate(window)
            rows[shard].append(row)
        for shard in rows:
            shard.prefetch(sorted(rows[shard]))

    def where(self, window: int) -> str:
        """The file that holds a window and its number in there, for messages."""
        shard, row = self._locate(window)
        return f"{shard.file}, window {row}"

    def _locate(self, window: int) -> tuple[Shard, int]:
        if not 0 <= window < self.n_windows:
            raise IndexError(f"window: given {window}; needed 0 to {self.n_windows - 1}")
        number = bisect_right(self._starts, window) - 1
        return self._shards[number], window - self._starts[number]


class Shard:
    """One memory-mapped file, checked when it is opened. tensors: by their names in the format, read when used."""

    def __init__(self, file: Path) -> None:
        self.file = file
        check_readable(file)
        try:
            with reading(file):
                self._state = _state(os.stat(file))
                opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserError(
                f"{file} is no whole safetensors file ({error}): it was cut short or damaged; delete it and "
                "write it again"
            ) from error
        names = set(opened.keys())
        if "activations" not in names:
            raise UserError(
                f"{file} holds no tensor `activations`, only {', '.join(sorted(names)) or 'nothing'}; "
                "give a folder of activation shards"
            )
        self.names = names & {"activations", *DTYPES}
        activations = opened.get_slice("activations")
        self.shape = tuple(activations.get_shape())
        if len(self.shape) != 3:
            raise UserError(f"{file}: activations are {self.shape}; needed [windows, T, d_in]")
        if activations.get_dtype() not in ACTIVATION_DTYPES:
            raise UserError(f"{file}: activations are {activations.get_dtype()}; needed float16, bfloat16 or float32")
        self.dtype = ACTIVATION_DTYPES[activations.get_dtype()]
        for name in DTYPES.keys() & self.names:
            tensor = opened.get_slice(name)
            if tuple(tensor.get_shape()) != self.shape[:2]:
                raise UserError(f"{file}: {name} is {tuple(tensor.get_shape())}; needed {self.shape[:2]}")
            if tensor.get_dtype() not in DTYPES[name]:
                needed = "bool or uint8" if name == "mask" else "an integer type"
                raise UserError(f"{file}: {name} is {tensor.get_dtype()}; needed {needed}")
        self.tensors = {name: opened.get_tensor(name) for name in self.names}
        self._starts_at: int | None = None

    def read(self, row: int) -> Window:
        return Window(**{name: tensor[row] for name, tensor in self.tensors.items()})

    def activations(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """The activations [T, d_in] of windows, in the file's dtype, each written over the one before.

        By a read and not from the map: of that each page costs a fault, and a file that was cut short ends the program.
        """
        into = torch.empty(self.shape[1:], dtype=self.dtype)
        content = into.view(torch.uint8).reshape(-1).numpy().data
        with reading(self.file), open(self.file, "rb", buffering=0) as file:
            for row in rows:
                left = content
                same = _state(os.fstat(file.fileno())) == self._state
                file.seek(self._start(file) + row * len(left)) if same else None
                while same and left:
                    count = file.readinto(left)
                    same, left = bool(count), left[count:]
                if not same:
                    raise UserError(f"{self.file} was changed since it was opened: put it back, or start again")
                yield into

    def prefetch(self, rows: Sequence[int]) -> None:
        if not hasattr(os, "posix_fadvise"):  # only some systems have it
            return
        window = self.tensors["activations"][0].nbytes
        with suppress(OSError), open(self.file, "rb", buffering=0) as file:
            for row in rows:
                at = self._start(file) + row * window
                os.posix_fadvise(file.fileno(), at, window, os.POSIX_FADV_WILLNEED)

    def _start(self, file: IO[bytes]) -> int:
        """The position of the activations in the opened file."""
        if self._starts_at is None:
            length = int.from_bytes(file.read(8), "little")
            self._starts_at = 8 + length + json.loads(file.read(length))["activations"]["data_offsets"][0]
        return self._starts_at


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class Checked(NamedTuple):
    """What `check_shards` read."""

    n_files: int
    n_windows: int
    n_bytes: int
    unknown: list[Path]
    """files without a checksum, by an earlier version or another program"""


def check_shards(folder: str | Path, progress: Progress = quiet) -> Checked:
    """Reads all shards in a folder, or in the folders of its hook points, and compares their checksums.

    Raises UserError, which names the file, at the first that is not as it was written.
    """
    folders = [Path(folder, name) for name in read_places(folder).values()] or [Path(folder)]
    readers = [ShardReader(folder) for folder in folders]
    files = [file for folder in folders for file in listed(folder)]
    unknown = []
    for file in progress(files, "checking"):
        load_tensors(file)
        if CHECKSUM not in read_header(file).about:
            unknown.append(file)
    n_windows = readers[0].n_windows
    return Checked(len(files), n_windows, sum(file.stat().st_size for file in files), unknown)


def read_places(folder: str | Path) -> dict[str, str]:
    """The hook points in a folder that holds several, and the folder of each; empty for any other folder.

    Raises UserError where its activations.json is damaged.
    """
    file = Path(folder) / ABOUT_FILE
    places = read_about(file).get("places", {})
    names = isinstance(places, dict) and all(isinstance(name, str) for name in places.values())
    if not names or any(Path(name).name != name for name in places.values()):
        raise UserError(f"{file}: places is {shown(repr(places))[:60]}; needed an object of hook points and folders")
    for hook, name in places.items():
        said = hook_of(read_about(Path(folder) / name / ABOUT_FILE))
        if said not in (None, hook):
            raise UserError(
                f"{file}: {shown(name)} is to hold {shown(hook)}, and says that it holds {shown(said)}: were folders "
                "renamed? Copy them again"
            )
    return places


def hook_of(about: dict[str, Any]) -> str | None:
    """The hook point of shards, as their activations.json says it; None where it does not."""
    hook, layer = about.get("hook"), about.get("layer")
    if isinstance(hook, str) and hook != RESIDUAL:
        return hook
    return name_of_layer(layer) if isinstance(layer, int) and layer >= 1 else None


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


def read_about(file: Path) -> dict[str, Any]:
    with reading(file):
        if not file.exists():
            return {}
        content = file.read_bytes()
    return parse_json(content, str(file), "repair or delete it, it is optional")


def listed(folder: Path) -> list[Path]:
    """The shards in a folder, by name."""
    return sorted(folder / name for name in os.listdir(folder) if name.endswith(".safetensors"))
