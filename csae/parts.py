"""The weights of a folder: in one safetensors file, or in several with an index of where each tensor's rows are.

Several ranks save a file each, `model-00001-of-00004.safetensors`, with the names of huggingface/transformers. The rows
of a table are in all of them. A part of a tensor says in its name which rows it holds: `W_enc[0:1024]` are rows 0 to
1,023 of W_enc. The parts in the order of their rows, put together along the first dimension, are the tensor.

`model.safetensors.index.json` maps each of these names to its file, and has the checksums of the files: so those of two
saves are not taken for one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csae.errors import UserError, shown
from csae.files import read_json
from csae.tensors import CHECKSUM, Header, check_tensors, load_tensors, read_header, unreadable

if TYPE_CHECKING:
    from csae.distributed.ranks import Ranks

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The files of a checkpoint that several ranks wrote (`csae.distributed.checkpoint`).
METADATA, OF_RANK = ".metadata", r"__\d+_\d+\.distcp"
SHARD = r"model(\.\d{1,9})?-\d{5}-of-\d{5}\.safetensors"
# The config.json of weights that are about to take their names (`csae.exchange`).
NEXT = ".config.json.next"
AGAIN = "copy the folder again"
_PART = re.compile(r"(.+)\[(0|[1-9]\d*):(0|[1-9]\d*)\]")


class Part(NamedTuple):
    """Some rows of a tensor, in a file."""

    file: Path
    name: str
    """which they have there"""
    rows: range
    """which of the tensor; one for a scalar"""


@dataclass(frozen=True)
class Weights:
    """Where tensors are."""

    shapes: dict[str, tuple[int, ...]]
    """of whole tensors, by name"""
    parts: dict[str, list[Part]]
    """in the order of rows"""
    headers: dict[Path, Header]
    """of the files"""

    def load(self, own: Mapping[str, range], ranks: Ranks | None = None) -> dict[str, Tensor]:
        """All tensors, on the CPU; of those named in `own` these rows only.

        ranks: each compares some of the files with their checksums, in blocks. So they have to agree afterwards.

        Raises UserError where a file is not as it was written.
        """
        if ranks is None and not own:
            return self._whole()
        for file in list(self.headers)[0 if ranks is None else ranks.rank :: 1 if ranks is None else ranks.size]:
            check_tensors(file)
        return self._rows(own)

    def _whole(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        names = {(part.file, part.name): (name, part.rows) for name, of in self.parts.items() for part in of}
        for file in self.headers:
            for stored, tensor in load_tensors(file).items():
                name, rows = names[file, stored]
                if tensor.shape == self.shapes[name]:
                    tensors[name] = tensor
                    continue
                if name not in tensors:
                    tensors[name] = tensor.new_empty(self.shapes[name])
                tensors[name][rows.start : rows.stop] = tensor
        return tensors

    def _rows(self, own: Mapping[str, range]) -> dict[str, Tensor]:
        with ExitStack() as opened:
            files = {}
            for file in self.headers:
                try:
                    files[file] = opened.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise unreadable(file, error) from error
            tensors = {}
            for name, parts in self.parts.items():
                rows = own.get(name, range(parts[-1].rows.stop))
                pieces = []
                for part in parts:
                    start, stop = max(part.rows.start, rows.start), min(part.rows.stop, rows.stop)
                    if len(part.rows) == stop - start:
                        pieces.append(files[part.file].get_tensor(part.name))
                    elif start < stop:
                        stored = files[part.file].get_slice(part.name)
                        pieces.append(stored[start - part.rows.start : stop - part.rows.start])
                if not pieces:  # no rows are this rank's
                    some = files[parts[0].file].get_slice(parts[0].name)[:1]
                    pieces.append(some.new_empty((0, *some.shape[1:])))
                tensors[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            return tensors


def shard_name(number: int, of: int, again: int = 0) -> str:
    """The name of a file, the first has number 0. again: the files beside it have those of a smaller one."""
    return f"model{f'.{again}' if again else ''}-{number + 1:05}-of-{of:05}.safetensors"


def unused_names(of: int, used: Collection[str]) -> list[str]:
    """Names for so many files, none of them among those used."""
    every = ([shard_name(number, of, again) for number in range(of)] for again in itertools.count())
    return next(names for names in every if not any(name in used for name in names))


def part_name(name: str, rows: range) -> str:
    return f"{name}[{rows.start}:{rows.stop}]"


def index_of(files: Mapping[str, Header], n_bytes: int) -> dict[str, Any]:
    """The content of the index. files: headers, by their names; n_bytes: of all tensors."""
    return {
        "metadata": {
            "total_size": n_bytes,
            CHECKSUM: {file: header.about[CHECKSUM] for file, header in files.items()},
        },
        "weight_map": {name: file for file, header in files.items() for name in header.shapes},
    }


def whole_files(files: Iterable[Path]) -> Weights:
    """The tensors of files that hold each of them whole, under names of their own."""
    headers = {file: read_header(file) for file in files}
    named = [(name, shape, file) for file, header in headers.items() for name, shape in header.shapes.items()]
    parts = {name: [Part(file, name, _all_rows(shape))] for name, shape, file in named}
    return Weights({name: shape for name, shape, _ in named}, parts, headers)


def indexed(index: Path, find: Callable[[str], Path]) -> Weights:
    """The tensors of the files that an index names. find: gives the path of a file by its name.

    Raises UserError where a file is missing, damaged or of another save, and where rows are missing or there twice.
    """
    content = read_json(index)
    about, weight_map = content.get("metadata"), content.get("weight_map")
    checksums = about.get(CHECKSUM) if isinstance(about, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(checksums, dict):
        raise UserError(f"{index}: not an index that csae wrote (it has no weight_map and {CHECKSUM}): {AGAIN}")
    named = {str(file) for file in weight_map.values()}
    if named != checksums.keys() or not all(re.fullmatch(SHARD, file) for file in named):
        raise UserError(f"{index}: it names other files than {CHECKSUM} in it, or none of csae's: {AGAIN}")
    headers: dict[Path, Header] = {}
    parts: dict[str, list[Part]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(named):
        file = find(name)
        headers[file] = header = read_header(file)
        if header.about.get(CHECKSUM) != checksums[name]:
            raise UserError(f"{file}: not the file that {INDEX} was written with, but of another save: {AGAIN}")
        if header.shapes.keys() != {of for of, where in weight_map.items() if where == name}:
            raise UserError(f"{index}: it names other tensors in {name} than are there: {AGAIN}")
        for stored, shape in header.shapes.items():
            of, rows = _rows_of(stored, shape)
            if rows is None or (of in shapes and shapes[of][1:] != shape[1:]):
                raise UserError(f"{file}: {shown(stored)} is of shape {list(shape)}, which its name denies: {AGAIN}")
            parts.setdefault(of, []).append(Part(file, stored, rows))
            shapes.setdefault(of, shape)
    for of, found in parts.items():
        found.sort(key=lambda part: part.rows.start)
        stops = [0, *(part.rows.stop for part in found)]
        if any(part.rows.start != stop for part, stop in zip(found, stops, strict=False)):
            raise UserError(f"{index}: rows of {shown(of)} are missing, or there twice: {AGAIN}")
        if shapes[of]:
            shapes[of] = (stops[-1], *shapes[of][1:])
    return Weights(shapes, parts, headers)


def remove_shards(folder: Path, before: Collection[str], but: Collection[str] = ()) -> None:
    """Remove the files of other saves: those that an index named before, and what a kill left. Never raises.

    but: those that stay, with their index.
    """
    if not but:
        with suppress(OSError):
            (folder / INDEX).unlink()
    with suppress(OSError):
        for file in [*folder.iterdir()]:
            if re.fullmatch(SHARD, file.name) and file.name not in but and (file.name in before or _is_ours(file)):
                file.unlink()


def _is_ours(file: Path) -> bool:
    try:
        return CHECKSUM in read_header(file).about
    except UserError:
        return False


def shards_of(folder: Path) -> set[str]:
    """The names of the files that a folder's index names; none where it has no index. Never raises."""
    if not (folder / INDEX).is_file():
        return set()
    try:
        weight_map = read_json(folder / INDEX).get("weight_map")
    except UserError:
        return set()
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    return {file for file in named if isinstance(file, str) and re.fullmatch(SHARD, file)}


def _all_rows(shape: tuple[int, ...]) -> range:
    return range(shape[0] if shape else 1)


def _rows_of(stored: str, shape: tuple[int, ...]) -> tuple[str, range | None]:
    """The tensor that a part belongs to, and which rows it is; None where its shape contradicts its name."""
    found = _PART.fullmatch(stored)
    if found is None:
        return stored, _all_rows(shape)
    rows = range(int(found[2]), int(found[3]))
    return found[1], rows if shape and shape[0] == len(rows) else None
