"""The second part of a build: what is known of each feature, in one row, from where it is new and carried."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from csae.data.language_model import LanguageModel
from csae.data.pieces import token_piece
from csae.errors import shown
from csae.features.effects import AT_ONCE, Best, Effects, scores, similar, tokens_of
from csae.features.filler import is_filler
from csae.features.index import read_places
from csae.features.places import LARGEST, Places, spans
from csae.progress import Progress
from csae.sae import SAE

BINS = 20  # of a histogram
PASSAGES = 20  # where it is new; as many where it is carried
WORDS = 10
SIMILAR = 6
RAISING = 8  # features for a token of the vocabulary


def summarise(
    rows: sqlite3.Connection,
    sae: SAE,
    lm: LanguageModel,
    effects: Effects | None,
    n_ctx: int,
    progress: Progress,
    run: str,
) -> None:
    """Fills the tables that are made of `places`, and marks the index finished: in one transaction.

    effects: of the model; None where features do not write to its residual stream. run: what the SAE is called.
    """
    fillers: dict[int, tuple[str, bool]] = {}

    def text_of(token: int) -> tuple[str, bool]:
        if token not in fillers:
            piece = token_piece(lm.tokenizer, token)
            fillers[token] = piece, is_filler(piece)
        return fillers[token]

    # The features that are new somewhere.
    numbers = [
        number for (number,) in rows.execute("SELECT DISTINCT feature FROM places WHERE kind = 0 ORDER BY feature")
    ]
    directions = sae.W_dec.detach()
    n_tokens = 0 if effects is None else effects.by_dimension.shape[1]
    raising = Best.of_none(n_tokens, lm.device)
    rows.execute("BEGIN IMMEDIATE")
    try:
        for table in ("features", "words", "raised"):
            rows.execute(f"DELETE FROM {table}")
        for start in progress(range(0, len(numbers), AT_ONCE), f"{shown(run)}: features, one by one"):
            some = torch.tensor(numbers[start : start + AT_ONCE], device=directions.device)
            logits: list[dict[str, list[Any]]] = [{"up": [], "down": []}] * len(some)
            if effects is not None:
                found = scores(effects, directions[some])  # [at most AT_ONCE, vocabulary]
                logits = tokens_of(found, lm.tokenizer, effects.noise)
                raising = raising.joined(found, start, RAISING)
            near = [part.tolist() for part in similar(directions, some, SIMILAR)]
            for number, effect, cosines, others in zip(some.tolist(), logits, *near, strict=True):
                row, words = _summed_up(read_places(rows, number, n_ctx), n_ctx, text_of)
                alike = [[other, round(cosine, 3)] for other, cosine in zip(others, cosines, strict=True)]
                rows.execute(
                    "INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (number, *row, _json(effect), _json(alike)),
                )
                rows.executemany(
                    "INSERT INTO words VALUES (?, ?, ?)", [(word, number, share) for word, share in words.items()]
                )
        _add_raised(rows, raising, lm, numbers)
        noise = None if effects is None else effects.noise
        rows.execute("INSERT OR REPLACE INTO about VALUES ('noise', ?)", (json.dumps(noise),))
        rows.execute("INSERT OR REPLACE INTO about VALUES ('finished', 'true')")
        rows.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            rows.execute("ROLLBACK")
        raise


def _summed_up(blocks: Iterator[tuple[Places, Places, np.ndarray]], n_ctx: int, text_of: Any) -> tuple[Any, ...]:
    """The columns of a feature from `new` to `carried_passages`, and its words in lower case with their shares."""
    n_new = n_carried = n_spans = 0
    counts = np.zeros(LARGEST + 1, np.int64)
    activity: dict[int, float] = {}
    strongest: list[tuple[bool, int, int]] = []  # whether it is a filler, minus the amount, the position
    largest_share: list[tuple[bool, int, int]] = []
    for new, carried, starts in blocks:
        only = ~np.isin(carried.positions, new.positions, assume_unique=True)
        n_new += len(new.positions)
        n_carried += int(only.sum())
        n_spans += len(spans(new, carried, starts).begins)
        counts += np.bincount(new.amounts, minlength=LARGEST + 1)
        tokens, which = np.unique(new.tokens, return_inverse=True)
        for token, amount in zip(tokens.tolist(), np.bincount(which, new.amounts).tolist(), strict=True):
            activity[token] = activity.get(token, 0) + amount
        strongest = _best(strongest, new, n_ctx, text_of)
        largest_share = _best(largest_share, Places(*(part[only] for part in carried)), n_ctx, text_of)
    largest = int(counts.nonzero()[0][-1])
    bins = np.minimum(np.arange(largest + 1) * BINS // largest, BINS - 1)
    histogram = np.bincount(bins, counts[: largest + 1], BINS).astype(int).tolist()
    total = sum(activity.values())
    order = sorted(activity, key=lambda token: (text_of(token)[1], -activity[token], token))
    words = [[text_of(token)[0], round(activity[token] / total, 4)] for token in order[:WORDS]]
    # Spaces and case don't count in a search.
    searched: dict[str, float] = {}
    for piece, share in words:
        word = piece.strip().lower()
        if word:
            searched[word] = searched.get(word, 0) + share
    passages = [[[at, -minus] for _, minus, at in found] for found in (strongest, largest_share)]
    columns = (n_new, n_carried, n_spans, largest, _json(histogram), _json(words), *map(_json, passages))
    return columns, searched


def _best(before: list[tuple[bool, int, int]], places: Places, n_ctx: int, text_of: Any) -> list[tuple[bool, int, int]]:
    """The PASSAGES strongest places of those before and these, one a window; fillers come last."""
    order = np.lexsort((places.positions, -places.amounts.astype(np.int64)))
    windows: set[tuple[int, bool]] = set()
    found: dict[bool, int] = {False: 0, True: 0}
    kept = list(before)
    for at in order:
        filler = text_of(int(places.tokens[at]))[1]
        window = int(places.positions[at]) // n_ctx, filler
        if window in windows or found[filler] == PASSAGES:
            continue
        windows.add(window)
        found[filler] += 1
        kept.append((filler, -int(places.amounts[at]), int(places.positions[at])))
        if found[False] == PASSAGES:
            break
    return sorted(kept)[:PASSAGES]


def _add_raised(rows: sqlite3.Connection, raising: Best, lm: LanguageModel, numbers: list[int]) -> None:
    """For each token of the vocabulary the features that raise it most."""
    if not numbers:
        return
    for token, (score, row) in enumerate(zip(raising.scores.tolist(), raising.rows.tolist(), strict=True)):
        best = [number for of, at in zip(score, row, strict=True) for number in (numbers[at], round(of, 2))]
        piece = token_piece(lm.tokenizer, token)
        rows.execute("INSERT OR IGNORE INTO raised VALUES (?, ?)", (piece, _json(best)))


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))
