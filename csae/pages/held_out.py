"""Held-out text for a demo's page: passages to read along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from csae.data.activations import ActivationSource
from csae.data.pieces import token_pieces
from csae.errors import UserError
from csae.pages.view import Window
from csae.progress import Progress, quiet

BATCH_WINDOWS = 16

Batched = tuple[Tensor, Tensor, Tensor, Tensor]
"""acts [B, T, d_in], mask, documents and tokens [B, T] of some windows"""


def passages(source: ActivationSource, windows: Sequence[int], tokenizer: Any, n: int) -> list[Window]:
    """Up to n passages of these windows, each a stretch of another document, those with most letters in them.

    Letters tell prose from tables. Nothing is looked at but the text. The source must know its tokens, else UserError.
    """
    best: dict[int, tuple[int, Window]] = {}
    for batch in _batches(source, windows):
        for acts, mask, documents, tokens in zip(*batch, strict=True):
            ends = documents.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
            for start, end in pairwise([0, *ends]):
                at, document = slice(start, end), int(documents[start])
                pieces = token_pieces(tokenizer, tokens[at].tolist())
                letters = sum(character.isalpha() for character in "".join(pieces))
                if letters > best.get(document, (-1,))[0]:
                    best[document] = letters, Window(tokens[at], acts[at], mask[at], pieces)
    return [window for _, window in sorted(best.values(), key=lambda found: -found[0])[:n]]


def _batches(source: ActivationSource, windows: Sequence[int], progress: Progress = quiet) -> Iterator[Batched]:
    for start in progress(range(0, len(windows), BATCH_WINDOWS), "features in held-out text"):
        batch = source.read(windows[start : start + BATCH_WINDOWS])
        if batch.tokens is None:
            raise UserError("the activations come without token ids, so there is no text to show: cache them anew")
        yield batch.acts, batch.mask, batch.documents, batch.tokens
