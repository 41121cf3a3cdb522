"""The rows of one file: JSON Lines, Parquet, or plain text, which is one document in parts."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from csae import versions
from csae.errors import UserError, first_line

if TYPE_CHECKING:
    from csae.data.rows import Chunk

LINES = (".jsonl", ".ndjson", ".json")
TEXTS = (".txt", ".md", ".rst")
PARQUET = (".parquet",)
SUFFIXES = (*LINES, *(f"{suffix}.gz" for suffix in LINES), *PARQUET, *TEXTS)
LONGEST_ROW = 2**26  # bytes; a longer one is taken for damage
PART_BYTES = 2**17  # of a plain text
# Where a plain text may be cut: before a word that begins a line, so that no token lies across.
LINE_STARTS = re.compile(rb"\n(?=\S)")


def is_known(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIXES)


def kind_of(file: Path) -> str:
    """ "lines", "parquet" or "text". Raises UserError where a file's name says that it is something else."""
    name = file.name.lower().removesuffix(".gz")
    if not is_known(file):
        raise UserError(f"{file}: no file of {', '.join(SUFFIXES)}: convert it to one of these")
    return "lines" if name.endswith(LINES) else "parquet" if name.endswith(PARQUET) else "text"


def columns_of(file: Path) -> tuple[str, ...]:
    """The columns of a file's first row; a plain text has one, `text`. Empty where it has no row."""
    kind = kind_of(file)
    if kind == "parquet":
        return tuple(_open_parquet(file).schema_arrow.names)
    if kind == "text":
        _check_prose(file)
        return ("text",)
    with _opened(file) as opened:
        line = next((line for line in iter(lambda: opened.readline(LONGEST_ROW), b"") if line.strip()), b"")
    if not line:
        return ()
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its first line is no JSON; needed JSON Lines, an object in each line") from error
    if not isinstance(row, dict):
        raise UserError(f"{file}: its first line is a JSON {type(row).__name__}; needed an object in each line")
    return tuple(row)


def read(file: Path, inside: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
    """The rows from a position in the file on; `after` of a chunk is such a position."""
    kind = kind_of(file)
    if kind == "lines":
        return _json_lines(file, inside)
    return _parquet(file, inside, columns) if kind == "parquet" else _text(file, inside)


def _json_lines(file: Path, inside: dict[str, Any]) -> Iterator[Chunk]:
    from csae.data.rows import BadRow, grouped

    number = inside.get("line", 0)
    with _opened(file) as opened:
        opened.seek(inside.get("offset", 0))

        def lines() -> Iterator[tuple[Any, int]]:
            nonlocal number
            while line := opened.readline(LONGEST_ROW + 1):
                number += 1
                if len(line) <= LONGEST_ROW:
                    yield line, len(line)
                    continue
                while line and not line.endswith(b"\n"):
                    line = opened.readline(LONGEST_ROW)
                yield BadRow(f"it is longer than {LONGEST_ROW:,} bytes"), 0

        yield from grouped(lines(), str(file), number + 1, "line", lambda: {"offset": opened.tell(), "line": number})


def _parquet(file: Path, inside: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Chunk]:
    from csae.data.rows import grouped

    opened = _open_parquet(file)
    missing = [column for column in columns if column not in opened.schema_arrow.names]
    if missing:
        raise UserError(
            f"{file} has no column {missing[0]}, only {', '.join(opened.schema_arrow.names)}; files before it have one"
        )
    group, done = inside.get("group", 0), inside.get("done", 0)
    first = sum(opened.metadata.row_group(earlier).num_rows for earlier in range(group)) + done

    def rows() -> Iterator[tuple[Any, int]]:
        nonlocal group, done
        while group < opened.metadata.num_row_groups:
            to_skip = done
            batches = opened.iter_batches(64, row_groups=[group], columns=list(columns), use_threads=False)
            while (batch := _next_batch(file, group, batches)) is not None:
                skipped = min(to_skip, batch.num_rows)
                to_skip -= skipped
                size = batch.nbytes // max(1, batch.num_rows)
                for row in batch.slice(skipped).to_pylist():
                    done += 1
                    yield row, size
            group, done = group + 1, 0

    yield from grouped(rows(), str(file), first, "row", lambda: {"group": group, "done": done})


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs pyarrow: {versions.pip_install('datasets')}") from error
    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: not a whole Parquet file ({first_line(error)}): copy it again") from error


def _next_batch(file: Path, group: int, batches: Any) -> Any:
    try:
        return next(batches, None)
    except (ValueError, OSError) as error:  # OSError is how pyarrow tells of damage too
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file}: row group {group} is damaged ({first_line(error)}): copy the file again") from error


def _text(file: Path, inside: dict[str, Any]) -> Iterator[Chunk]:
    from csae.data.rows import BadRow, Chunk

    _check_prose(file)
    offset = inside.get("offset", 0)
    with open(file, "rb") as opened:
        opened.seek(offset)
        content = b""
        while content := content + opened.read(PART_BYTES - len(content)):
            end = _end_of_part(content) if len(content) == PART_BYTES else len(content)
            part, content = content[:end], content[end:]
            try:
                row: Any = part.decode("utf-8-sig" if offset == 0 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                row = BadRow(f"byte {offset + error.start} is not UTF-8")
            yield Chunk([row], str(file), offset, "byte", {"offset": offset + end}, goes_on=offset > 0)
            offset += end


def _end_of_part(content: bytes) -> int:
    """How many of the bytes to take for a part: up to the start of a line, or of a character where no line starts."""
    starts = [found.end() for found in LINE_STARTS.finditer(content)]
    if starts:
        return starts[-1]
    end = len(content) - 1
    while end > len(content) - 4 and content[end] & 0xC0 == 0x80:  # inside of a character
        end -= 1
    return end


def _check_prose(file: Path) -> None:
    with open(file, "rb") as opened:
        start = opened.read(4096)
    if b"\0" in start:
        raise UserError(f"{file}: holds zero bytes, as UTF-16 does; convert it to UTF-8, or leave it out")
    if re.match(rb'\s*\{\s*"[^"\n]*"\s*:', start):
        raise UserError(f"{file}: holds lines of JSON, and its name says plain text: name it .jsonl")


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """A file of lines, opened at its beginning; damage of a .gz file is a UserError."""
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb") as opened:
            yield cast(IO[bytes], opened)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: not a whole .gz file ({first_line(error)}): copy it again") from error
