"""Documents laid end to end and cut in windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csae.data.token_rows import shown_row
from csae.errors import UserError


class TokenWindows(NamedTuple):
    """Windows of tokens."""

    tokens: Tensor  # [N, T] int32
    documents: Tensor  # [N, T] int32: which document each token is of; a document is a run of equal ids
    special: Tensor | None = None
    """[N, T] bool, None where none is: tokens that the model sees and that take no part, such as a beginning of
    sequence"""
    begin: tuple[int, ...] = ()
    """the tokens that each window begins with: a beginning of sequence, where the model is to have one"""


class Text(NamedTuple):
    """Tokens with what is known of them: arrays [n], or [N, T] where they are windows."""

    tokens: np.ndarray  # int32
    documents: np.ndarray  # int32
    special: np.ndarray  # bool

    @classmethod
    def empty(cls, *shape: int) -> Text:
        return cls(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))

    def as_windows(self, begin: Sequence[int]) -> TokenWindows:
        """[N, T] arrays as `TokenWindows`."""
        special = torch.from_numpy(self.special) if self.special.any() else None
        return TokenWindows(torch.from_numpy(self.tokens), torch.from_numpy(self.documents), special, tuple(begin))


class Packing:
    """Takes documents, and gives the windows that they fill so far; what is left over waits for the next document.

    Each window begins with the tokens `begin`, where what it is cut from does not. They are special tokens, there and
    wherever else they are found. However the documents come in, the windows are the same.
    """

    def __init__(self, n_ctx: int, begin: Sequence[int] = ()) -> None:
        """Raises UserError where windows of n_ctx hold no text."""
        least = max(2, len(begin) + 1)
        if n_ctx < least:
            raise UserError(f"n_ctx: given {n_ctx}; needed {least} or more")
        self.n_ctx, self.begin = n_ctx, tuple(begin)
        self.n_documents = 0
        self._parts = [Text.empty(0)]

    def add(self, tokens: np.ndarray, special: np.ndarray | None = None, goes_on: bool = False) -> None:
        """The tokens [n] int32 of the next document and which of them are special, bool [n].

        goes_on: they are more of the document before.
        """
        if not (goes_on and self.n_documents):
            self.n_documents += 1
        number = (self.n_documents - 1) % 2**31
        documents = np.full(len(tokens), number, dtype=np.int32)
        self._parts.append(Text(tokens, documents, np.zeros(len(tokens), bool) if special is None else special))

    def cut(self, at_end: bool = False) -> Text:
        """The whole windows [N, T] of the text since the last call, N >= 0. at_end: there is no more text."""
        text = Text(*(np.concatenate(parts) for parts in zip(*self._parts, strict=True)))
        added = len(self.begin)
        begins = _begins(text.tokens, self.begin)
        for place in range(added):
            text.special[place:] |= begins[: max(0, len(text.tokens) - place)]
        # The last tokens may be the first of `begin`, which only the next text can tell.
        sure = len(text.tokens) if at_end else len(text.tokens) - max(0, added - 1)
        spans = _spans(begins[: max(0, sure)], self.n_ctx, added)
        end = spans[-1][1] if spans else 0
        self._parts = [Text(*(part[end:] for part in text))]
        if not added:
            return Text(*(part[:end].reshape(-1, self.n_ctx) for part in text))
        windows = Text(*(np.empty((len(spans), self.n_ctx), dtype=part.dtype) for part in text))
        for row, (start, stop) in enumerate(spans):
            missing = self.n_ctx - (stop - start)
            for window, part, before in zip(windows, text, (self.begin, text.documents[start], True), strict=True):
                window[row, missing:] = part[start:stop]
                if missing:
                    window[row, :missing] = before
        return windows

    def rest(self) -> Text:
        """What no window has yet. It may share memory with what was given."""
        if len(self._parts) > 1:
            self._parts = [Text(*(np.concatenate(parts) for parts in zip(*self._parts, strict=True)))]
        return self._parts[0]

    def restore(self, rest: Text, n_documents: int) -> None:
        """Go on from what `rest` and n_documents were."""
        self._parts, self.n_documents = [rest], n_documents


def pack(
    token_lists: Iterable[Sequence[int]], n_ctx: int, max_tokens: int | None = None, begin: Sequence[int] = ()
) -> TokenWindows:
    """Documents given as token ids, laid end to end and cut in windows of n_ctx tokens, at most max_tokens in all.

    Each window begins with the tokens `begin`, where what it is cut from does not. They are special tokens, there and
    wherever else they are found, and don't count in max_tokens. Raises UserError where there is no whole window,
    ValueError where a document is no flat list of token ids.
    """
    return pack_rows(((_ids_of(document), None) for document in token_lists), n_ctx, max_tokens, begin)


def pack_rows(
    rows: Iterable[tuple[np.ndarray, np.ndarray | None]], n_ctx: int, max_tokens: int | None, begin: Sequence[int]
) -> TokenWindows:
    """`pack` of documents given as token ids int32 and, where known, which of them are special, bool."""
    packing = Packing(n_ctx, begin)
    one = n_ctx - len(begin)
    if max_tokens is not None and max_tokens < one:
        raise UserError(f"max_tokens: given {max_tokens}; needed at least one window of {one}")
    n_tokens = 0
    for ids, special in rows:
        left = None if max_tokens is None else max_tokens - n_tokens
        packing.add(ids[:left], None if special is None else special[:left])
        n_tokens += len(ids[:left])
        if n_tokens == max_tokens:
            break
    windows = packing.cut(at_end=True)
    if not len(windows.tokens):
        raise UserError(f"the text is {n_tokens} tokens long; one window takes {one}: give more text or a lower n_ctx")
    return windows.as_windows(begin)


def _ids_of(document: Sequence[int]) -> np.ndarray:
    """The token ids of a document, int32."""
    ids = np.asarray(document)
    if ids.ndim != 1 or (len(ids) and not (ids.dtype.kind in "iu" and 0 <= ids.min() <= ids.max() < 2**31)):
        raise ValueError(f"token_lists: holds {shown_row(document)}; needed flat lists of token ids, 0 to {2**31 - 1}")
    return ids.astype(np.int32)


def _begins(tokens: np.ndarray, begin: Sequence[int]) -> np.ndarray:
    """Where the tokens `begin` are found: bool, at the first of them."""
    found = np.full(len(tokens), 0 < len(begin) <= len(tokens))
    for place, token in enumerate(begin if found.any() else ()):
        found[len(tokens) - place :] = False
        found[: len(tokens) - place] &= tokens[place:] == token
    return found


def _spans(begins: np.ndarray, n_ctx: int, added: int) -> list[tuple[int, int]]:
    """Start and end of each window in the text, where `added` tokens come before one that does not begin with them."""
    spans = []
    start = 0
    while start < len(begins):
        end = start + (n_ctx if begins[start] else n_ctx - added)
        if end > len(begins):
            break
        spans.append((start, end))
        start = end
    return spans
