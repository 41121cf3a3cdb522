"""Rows of token ids, checked: flat lists of integers, with masks that fit them."""

from __future__ import annotations

from typing import Any

import numpy as np

from csae.errors import UserError

IDS = "input_ids"
MASKS = ("attention_mask", "special_tokens_mask")


def tokens_of_row(row: dict[str, Any], where: str, n_vocab: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The token ids of a row int32, without padding, and which of them are special, bool, where it says so.

    row: a list `input_ids`; what `attention_mask` leaves out is padding, what `special_tokens_mask` marks is special;
    either may be missing. Raises UserError, which begins with `where`, where a list is no such.
    """
    ids = _token_ids(row[IDS], where, n_vocab)
    marks = {column: _marks(row[column], where, column, len(ids)) for column in MASKS if column in row}
    text = marks.get("attention_mask", np.ones(len(ids), dtype=bool))
    special = marks.get("special_tokens_mask")
    return ids[text], None if special is None else special[text]


def shown_row(row: Any) -> str:
    text = repr(row)
    return text if len(text) <= 60 else text[:57] + "..."


def _token_ids(row: Any, where: str, n_vocab: int | None) -> np.ndarray:
    """The input_ids of a row, checked: int32."""
    ids = _flat(row)
    if ids is None or (len(ids) and ids.dtype.kind not in "iu"):
        raise UserError(
            f"{where}: input_ids is {shown_row(row)}; needed a flat list of integers, the tokens of a document"
        )
    limit = 2**31 if n_vocab is None else n_vocab
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise UserError(
            f"{where}: input_ids holds {wrong}; needed token ids, 0 to {limit - 1}: tokenize it for this model"
        )
    return ids.astype(np.int32)


def _marks(row: Any, where: str, column: str, n: int) -> np.ndarray:
    """A mask of a row of n tokens, checked: bool."""
    marks = _flat(row)
    if marks is None or (len(marks) and not (marks.dtype.kind in "biuf" and np.isin(marks, (0, 1)).all())):
        raise UserError(f"{where}: {column} is {shown_row(row)}; needed a flat list of 0 and 1")
    if len(marks) != n:
        raise UserError(f"{where}: {column} has {len(marks)} entries, input_ids {n}; needed one for each token")
    return marks.astype(bool)


def _flat(row: Any) -> np.ndarray | None:
    """A list as an array of one dimension; None for anything else."""
    if not isinstance(row, list):
        return None
    try:
        array = np.asarray(row)
    except (ValueError, OverflowError):  # lists of different lengths, integers beyond any type
        return None
    return array if array.ndim == 1 and array.dtype.kind != "O" else None
