"""From rows to token ids. This is what worker processes do: nothing here needs torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from csae.data.rows import BadRow, Chunk
from csae.data.token_rows import IDS, MASKS, shown_row, tokens_of_row
from csae.errors import UserError, first_line

TEXT, CHAT = "text", "messages"
HALF = re.compile(r"[\ud800-\udfff]")  # of a pair of UTF-16, which no tokenizer takes


class Tokenized(NamedTuple):
    """The documents of a chunk of rows."""

    tokens: np.ndarray
    """[n] int32, of all of them"""
    lengths: list[int]
    """tokens a document"""
    special: np.ndarray | None
    """[n] bool: which are special; None where no row says so"""
    n_rows: int
    bad: list[str]
    """a line for each row that was left out: where it is, and why"""
    goes_on: bool
    """the first document is more of the one before"""
    after: dict[str, Any]
    """the position behind the chunk"""


class RowTokens:
    """Makes the token ids of rows.

    tokenizer: one of transformers; it adds no special tokens. columns: of the rows; one of text, or of messages with
    `chat`, to which the tokenizer's chat template is applied; or input_ids and masks. n_vocab: how many tokens the
    model knows.
    """

    def __init__(
        self, tokenizer: Any, columns: tuple[str, ...], chat: bool = False, n_vocab: int | None = None
    ) -> None:
        """Raises UserError where the tokenizer has no chat template."""
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UserError("--chat: the model's tokenizer has no chat template: give a model that has one")
        self.columns, self.chat, self.n_vocab = columns, chat, n_vocab
        self.tokenizer = None if columns[0] == IDS else tokenizer

    def __call__(self, chunk: Chunk) -> Tokenized:
        documents: list[tuple[np.ndarray, np.ndarray | None]] = []
        if self.tokenizer is None:
            bad: list[str] = []
            for place, found in _readable(chunk, bad):
                missing = [column for column in self.columns if column not in found]
                try:
                    if missing:
                        raise UserError(f"it has no {missing[0]}")
                    documents.append(tokens_of_row(found, "it", self.n_vocab))
                except UserError as error:
                    bad.append(f"{place}: {error}")
        else:
            placed, bad = self._texts(chunk)
            documents += [(ids, None) for ids in self._tokenize(placed, bad)]
        special = None
        if any(marks is not None for _, marks in documents):
            special = np.concatenate([np.zeros(len(ids), bool) if marks is None else marks for ids, marks in documents])
        tokens = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in documents)])
        lengths = [len(ids) for ids, _ in documents]
        return Tokenized(tokens, lengths, special, len(chunk.rows), bad, chunk.goes_on, chunk.after)

    def texts(self, chunk: Chunk) -> tuple[list[str], list[str]]:
        """The texts of a chunk of rows, and a line for each row that has none."""
        placed, bad = self._texts(chunk)
        return [text for _, text in placed], bad

    def _texts(self, chunk: Chunk) -> tuple[list[tuple[str, str]], list[str]]:
        """The same, each text with its place. Blank ones are left out."""
        placed: list[tuple[str, str]] = []
        bad: list[str] = []
        for place, found in _readable(chunk, bad):
            try:
                text = self._text(found)
            except UserError as error:
                bad.append(f"{place}: {error}")
                continue
            if text.strip():
                placed.append((place, text))
        return placed, bad

    def _text(self, row: dict[str, Any]) -> str:
        """The text of a row. Raises UserError where it has none."""
        column = self.columns[0]
        value = row.get(column)
        if self.chat:
            if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
                raise UserError(f"{column} is {shown_row(value)}; needed a list of messages")
            try:
                value = self.tokenizer.apply_chat_template(value, tokenize=False)  # type: ignore[union-attr]
            except Exception as error:  # a template may raise anything
                raise UserError(f"the chat template does not take it ({first_line(error)})") from error
        if not isinstance(value, str):
            raise UserError(f"{column} is {shown_row(value)}; needed a text")
        if half := HALF.search(value):
            raise UserError(f"{column} holds {ascii(half[0])[1:-1]}, half of a character; needed whole ones")
        return value

    def _tokenize(self, placed: list[tuple[str, str]], bad: list[str]) -> list[np.ndarray]:
        try:
            return self._ids([text for _, text in placed])
        except Exception:  # of a foreign class: find the text that it does not take
            found = []
            for place, text in placed:
                try:
                    found += self._ids([text])
                except Exception as error:
                    bad.append(f"{place}: the tokenizer does not take it ({first_line(error)})")
            return found

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        # verbose=False: a document longer than the model's context is no reason to warn, it is cut in windows.
        lists: Sequence[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)[IDS]  # type: ignore[misc]
        return [np.asarray(ids, dtype=np.int32) for ids in lists]


def tell_left_out(line: str, count: int, say: Callable[[str], None]) -> None:
    """Tell of a row that was left out, the count-th: of the first ten, then each time that they are ten times as many.

    line: where it is, and why it was left out.
    """
    if count < 10:
        say(f"{line}: left out")
    elif str(count).strip("0") == "1":
        say(f"{line}: left out, one of {count:,} so far")


def _readable(chunk: Chunk, bad: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the columns of each row of a chunk; blank lines are left out. Others get a line in `bad`."""
    for number, row in enumerate(chunk.rows):
        if isinstance(row, bytes) and not row.strip():
            continue
        place = chunk.place(number)
        try:
            yield place, _columns(row)
        except UserError as error:
            bad.append(f"{place}: {error}")


def _columns(row: Any) -> dict[str, Any]:
    """The columns of a row. Raises UserError where it is no row."""
    if isinstance(row, str):
        return {TEXT: row}
    if isinstance(row, dict):
        return row
    if isinstance(row, BadRow):
        raise UserError(row.reason)
    try:
        found = json.loads(row.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"a JSON {type(found).__name__}; needed an object")
    return found


def choose_columns(name: str, found: tuple[str, ...], text_column: str | None, chat: bool) -> tuple[str, ...]:
    """The columns to read: that of the text or messages, or input_ids and its masks.

    Raises UserError where the data set has no such column, or has several that could be meant.
    """
    only = f"only {', '.join(found)}"
    if text_column is None and not chat and IDS in found:
        return tuple(column for column in (IDS, *MASKS) if column in found)
    if chat:
        column = text_column or CHAT
        if column not in found:
            raise UserError(
                f"--chat: {name} has no column {column}, {only}: name that of the messages by --text-column"
            )
        return (column,)
    column = text_column or TEXT
    if column not in found:
        advice = "give --chat" if CHAT in found and text_column is None else "name that of the text by --text-column"
        raise UserError(f"{name} has no column {column}, {only}: {advice}")
    return (column,)
