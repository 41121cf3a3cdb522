"""The rows of a data set, one after another from any position on, in bounded memory.

A data set is a file or folder of JSON Lines (also .gz), Parquet and plain text, a folder that `datasets` saved, or a
name on the hub. A position is a dict that fits in JSON: reading on from it doesn't read what was before, but for the
part that holds it where the format has no finer access (a row group of Parquet, a .gz file, a shard of the hub).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from csae.data import row_files
from csae.errors import UserError, shown

ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 2**18
DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")  # of save_to_disk


class BadRow(NamedTuple):
    """Stands for a row that can't be read."""

    reason: str


class Chunk(NamedTuple):
    """Rows that follow each other."""

    rows: list[Any]
    """each a text, the bytes of a JSON object, a dict of columns, or a BadRow"""
    where: str
    """the file or data set that they are in"""
    first: int
    """the number of the first one there"""
    unit: str
    """what they are called there: "line", counted from 1, "row", from 0, or "byte", the place where a part begins"""
    after: dict[str, Any]
    """the position behind them"""
    goes_on: bool = False
    """the first one is more of the document that the row before it is of"""

    def place(self, row: int) -> str:
        """Where one of the rows is, in words."""
        return f"{self.where}, {self.unit} {self.first + row}"


class Rows(Protocol):
    """A data set that is read from one end to the other."""

    name: str
    columns: tuple[str, ...]
    """those of its first row"""

    def read(self, position: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
        """The rows from a position on, {} for the first, with these columns where it can tell them apart.

        Raises UserError where a file is damaged, and other errors where it can't be reached.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON: enough to see whether two are the same."""
        ...


def grouped(
    values: Iterable[tuple[Any, int]], where: str, first: int, unit: str, after: Callable[[], dict[str, Any]]
) -> Iterator[Chunk]:
    """Rows and their sizes in bytes, in chunks. after: gives the position behind the row that was taken last."""
    rows: list[Any] = []
    size = 0
    for value, length in values:
        rows.append(value)
        size += length
        if len(rows) == ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield Chunk(rows, where, first, unit, after())
            first += len(rows)
            rows, size = [], 0
    if rows:
        yield Chunk(rows, where, first, unit, after())


class FileRows:
    """The rows of files, file by file in the order given."""

    def __init__(self, name: str, files: list[Path]) -> None:
        """Raises UserError where a file is of no kind that can be read, or the first one can't be."""
        self.name, self.files = name, files
        for file in files:
            row_files.kind_of(file)
        self.columns = next(filter(None, map(row_files.columns_of, files)), ())
        if not self.columns:
            raise UserError(f"{name}: no row in it; give a file or folder that has some")

    def read(self, position: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
        inside = position.get("inside", {})
        for number in range(position.get("file", 0), len(self.files)):
            for chunk in row_files.read(self.files[number], inside, columns):
                yield chunk._replace(after={"file": number, "inside": chunk.after})
            inside = {}

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode(errors="surrogateescape"))
        return {"files": len(self.files), "files_sha256": digest.hexdigest()}


def open_rows(dataset: str | Path, split: str = "train") -> Rows:
    """The rows of a data set: a file or folder, or a name on the hub, with :CONFIG behind it where it has several.

    Raises UserError where it can't be opened.
    """
    path = Path(dataset)
    name = f"dataset {shown(repr(str(dataset)))}"
    if path.is_dir() and any((path / file).is_file() for file in DATASET_FILES):
        from csae.data.row_datasets import SavedRows

        return SavedRows(name, path, split)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if row_files.is_known(file) and file.is_file())
        if not files:
            raise UserError(f"{name}: the folder holds no file of {', '.join(row_files.SUFFIXES)}")
        return FileRows(name, files)
    if path.exists():
        return FileRows(name, [path])
    from csae.data.row_datasets import HubRows

    return HubRows(name, str(dataset), split)
