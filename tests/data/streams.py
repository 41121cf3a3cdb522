"""Data sets in all forms that are read in a stream, and how they are read."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny_model import PROSE, make_tokenizer

from csae.data.row_tokens import RowTokens, choose_columns
from csae.data.rows import Chunk, open_rows
from csae.data.stream import TokenStream

WORDS = PROSE.split()
TOKENIZER = make_tokenizer()


def texts_of(n: int, seed: int = 0) -> list[str]:
    """n texts, each with its number in it."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(n)]


def write_lines(file: Path, rows: list[Any]) -> Path:
    content = "".join(f"{json.dumps(row)}\n" if not isinstance(row, str) else f"{row}\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def as_rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "id": i} for i, text in enumerate(texts)]


def stream_of(dataset: Path | str, n_ctx: int = 16, chat: bool = False, **how: Any) -> TokenStream:
    rows = open_rows(dataset)
    columns = choose_columns(rows.name, rows.columns, how.pop("text_column", None), chat)
    to_tokens = RowTokens(how.pop("tokenizer", TOKENIZER), columns, chat, how.pop("n_vocab", None))
    how = {"workers": 0, "shuffle": 8, "say": lambda line: None} | how
    return TokenStream(rows, to_tokens, n_ctx, **how)


def same_windows(one: Any, other: Any) -> bool:
    for part, expected in zip(one[:3], other[:3], strict=True):
        if (part is None) != (expected is None) or (part is not None and not torch.equal(part, expected)):
            return False
    return True


def values(chunks: Any) -> list[Any]:
    """The rows in chunks."""
    return [row for chunk in chunks for row in chunk.rows]


def chunks_of(dataset: Path, columns: tuple[str, ...], position: dict[str, Any] | None = None) -> list[Chunk]:
    return list(open_rows(dataset).read(position or {}, columns))
