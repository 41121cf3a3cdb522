"""Rows that the package `datasets` reads: of a folder that it saved, and of the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csae import versions
from csae.data.rows import DATASET_FILES, Chunk, grouped
from csae.errors import UserError, first_line
from csae.files import reading

ROWS_AT_ONCE = 64


def import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what} needs the package datasets: {versions.pip_install('datasets')}") from error
    versions.check("datasets")
    return datasets


class SavedRows:
    """The rows of a folder that `datasets` saved: memory-mapped, and read from any row on."""

    def __init__(self, name: str, folder: Path, split: str) -> None:
        """Raises UserError where the folder can't be loaded, or has no such split."""
        datasets = import_datasets(name)
        try:
            data = datasets.load_from_disk(str(folder))
        except Exception as error:  # of nearly any kind, on a bad folder
            raise UserError(f"{name} can't be loaded ({first_line(error)}); save it again") from error
        if isinstance(data, dict):
            if split not in data:
                raise UserError(f"{name} has no split {split!r}; it has {', '.join(data)}")
            data, folder = data[split], folder / split
        self.name, self._folder = name, folder
        self._data = data.with_format(None)
        self.columns = tuple(data.column_names)

    def read(self, position: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
        done = position.get("row", 0)
        data = self._data.select_columns(list(columns))

        def rows() -> Iterator[tuple[Any, int]]:
            nonlocal done
            for start in range(done, len(data), ROWS_AT_ONCE):
                found = data[start : start + ROWS_AT_ONCE]
                for row in zip(*(found[column] for column in columns), strict=True):
                    done += 1
                    yield dict(zip(columns, row, strict=True)), sum(map(_size, row))

        yield from grouped(rows(), self.name, done, "row", lambda: {"row": done})

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in DATASET_FILES:
            if (self._folder / name).is_file():
                with reading(self._folder / name):
                    digest.update((self._folder / name).read_bytes())
        return {"rows": len(self._data), "files_sha256": digest.hexdigest()}


class HubRows:
    """The rows of a data set on the hub, streamed; NAME, or NAME:CONFIG."""

    def __init__(self, name: str, dataset: str, split: str) -> None:
        """Raises UserError where there is no such data set, or the hub does not give it."""
        self._datasets = import_datasets(name)
        self.name, self._split = name, split
        self._dataset, _, config = dataset.partition(":")
        self._config = config or None
        try:
            data = self._open()
            columns = data.column_names
            self.columns = tuple(columns if columns is not None else next(iter(data), {}))
            self._files = self._file_names(data)
        # datasets raises nearly anything on a bad name, often over many lines.
        except Exception as error:
            raise UserError(
                f"{name} can't be loaded ({first_line(error)}); give a file, a folder or a hub name, NAME:CONFIG where "
                "it has several"
            ) from error

    def read(self, position: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
        data = self._open()
        if "state" in position:
            data.load_state_dict(position["state"])
        done = position.get("row", 0)

        def rows() -> Iterator[tuple[Any, int]]:
            nonlocal done
            for row in data:
                done += 1
                kept = {column: row[column] for column in columns if column in row}
                yield kept, sum(map(_size, kept.values()))

        yield from grouped(rows(), self.name, done, "row", lambda: {"state": data.state_dict(), "row": done})

    def describe(self) -> dict[str, Any]:
        return {"files_sha256": hashlib.sha256("\n".join(self._files).encode()).hexdigest()} if self._files else {}

    def _open(self) -> Any:
        return self._datasets.load_dataset(self._dataset, self._config, split=self._split, streaming=True)

    def _file_names(self, data: Any) -> list[str]:
        """The names of its files, which say the commit that they are of; empty where `datasets` does not tell."""
        try:
            builder = self._datasets.load_dataset_builder(self._dataset, self._config)
            return [str(file) for file in builder.config.data_files[self._split]]
        except Exception:
            return []


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list) else 8
