"""Building an index of features: the text is read block by block, then each feature is summed up.

Memory is that of one block (BLOCK_TOKENS positions), of one window's attention, and of the logits of some hundred
directions; it does not grow with the text. On the disk a position takes about 10 bytes for each feature that is new
or carried there, before compression.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csae.attribution import attribute
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource, Batch
from csae.data.language_model import LanguageModel
from csae.data.pieces import token_pieces
from csae.errors import UserError, shown
from csae.evaluate import run_form
from csae.features.effects import Effects, effects_of, writes_to_stream
from csae.features.index import (
    ABOUT,
    CARRIED_KIND,
    NEW,
    SCHEMA,
    TABLES,
    connect,
    pack_pieces,
    read_about,
    told,
    weights_sha256,
)
from csae.features.places import ACTIVITY, CARRIED, FRACTION, Places, whole
from csae.features.summary import summarise
from csae.files import check_writable
from csae.progress import Progress, quiet
from csae.sae import SAE, Code, Output
from csae.trained_on import TrainedOn, check_place, data_name, model_name

BLOCK_TOKENS = 65_536
BATCH_TOKENS = 16_384  # encoded at once: the exact form takes a third less time a token than at a quarter of that
IN_WORDS = {"weights": "the SAE has other weights", "text": "the text has other tokens"}  # of hashes
ROWS = 32  # positions of a window whose shares of c are made at once


@torch.no_grad()
def build_index(
    path: Path,
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    lm: LanguageModel,
    run: str,
    data: str | None = None,
    progress: Progress = quiet,
    elsewhere: bool = False,
    effects: Effects | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> None:
    """Builds an index (`csae.features.index`) at `path`; goes on where one of the same was begun.

    Args:
        windows: which of the source, in this order.
        lm: the language model that the activations are from, for the text of tokens and the effects on logits.
        run, data: what the SAE and the text are called.
        elsewhere: also where the SAE was trained on another model, layer or hook point.
        effects: of the model (`csae.features.effects`), where they are known already.

    Raises UserError where the file is something else or of something else, the source does not know its tokens, it does
    not fit the SAE, or the disk is full.
    """
    here = TrainedOn.of(source.describe())
    names = lm.hook_points.one_name
    check_place(sae.trained_on, here.model or lm.name, here.layer, here.hook, elsewhere, here.hook_to, names)
    if source.d_in != sae.d_in:
        raise UserError(f"the activations are {source.d_in} wide, the SAE {sae.d_in}: they don't belong together")
    if not len(windows):
        raise ValueError("windows: given none; needed one or more")
    described = source.describe()
    about = {
        "schema": SCHEMA,
        "weights": weights_sha256(sae),
        "arch": sae.arch,
        "k": sae.k,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "run": run,
        "model": model_name(lm.name),
        "place": here.place(),
        "data": data or data_name(described) or "a text",
        "n_ctx": source.n_ctx,
        "windows": [len(windows), int(windows[0]), int(windows[-1])],
        "text": described.get("windows_sha256"),
    }
    check_writable(path)
    with closing(connect(path)) as rows, told(path):
        rows.execute("PRAGMA locking_mode = EXCLUSIVE")
        done = _begin(rows, path, about)
        if done is None:
            return
        was_training = sae.training
        sae.eval()
        try:
            at_once = max(1, block_tokens // source.n_ctx)
            blocks = [(b, start) for b, start in enumerate(range(0, len(windows), at_once)) if b >= done]
            # As one index may follow another, bars are named.
            each = iter(progress(windows[done * at_once :], f"{shown(run)}: features, windows of text"))
            for block, start in blocks:
                _add_block(rows, block, start, sae, source, windows[start : start + at_once], lm.tokenizer, each)
            next(each, None)  # the bar ends
            effects = (effects or effects_of(lm)) if writes_to_stream(sae, lm) else None
            summarise(rows, sae, lm, effects, source.n_ctx, progress, run)
        finally:
            sae.train(was_training)


def _begin(rows: sqlite3.Connection, path: Path, about: dict[str, Any]) -> int | None:
    """How many blocks are done; None where the index is finished. Makes the tables of a new one."""
    rows.execute("BEGIN IMMEDIATE")
    known = read_about(rows)
    if not known:
        for statement in TABLES.split(";"):
            rows.execute(statement)
        rows.executemany("INSERT INTO about VALUES (?, ?)", [(name, json.dumps(about[name])) for name in ABOUT])
    else:
        wanted = json.loads(json.dumps(about))
        differing = [name for name in ABOUT if name != "run" and known.get(name) != wanted[name]]
        if differing:
            rows.execute("ROLLBACK")
            changes = "; ".join(
                IN_WORDS.get(name, f"{name}: {_short(known.get(name))}, now {_short(wanted[name])}")
                for name in differing
            )
            raise UserError(f"{path}: it is an index of something else ({changes}): give another --out, or delete it")
    rows.execute("COMMIT")
    if known.get("finished"):
        return None
    return rows.execute("SELECT count(*) FROM blocks").fetchone()[0]


def _short(value: object) -> str:
    text = shown(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _add_block(
    rows: sqlite3.Connection,
    block: int,
    first: int,
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    tokenizer: Any,
    each: Iterator[int],
) -> None:
    """Reads the windows of a block and writes what is in them, in one transaction.

    first: its first, in the index. each: gives a window each time that one is done.
    """
    found: dict[int, list[tuple[np.ndarray, ...]]] = {NEW: [], CARRIED_KIND: []}
    texts: list[tuple[int, bytes]] = []
    starts: list[np.ndarray] = []
    counted = 0
    at_once = max(1, BATCH_TOKENS // source.n_ctx)
    for start in range(0, len(windows), at_once):
        batch = source.read(windows[start : start + at_once])
        if batch.tokens is None:
            raise UserError("the activations come without token ids, so there is no text to show: cache them anew")
        at = (first + start) * source.n_ctx
        for kind, features, positions, amounts in _presence(sae, batch, each):
            tokens = batch.tokens.flatten().cpu().numpy()[positions]
            found[kind].append((features, at + positions, amounts, tokens))
        for row, tokens in enumerate(batch.tokens.tolist()):
            texts.append((first + start + row, pack_pieces(token_pieces(tokenizer, tokens))))
        documents = batch.documents.cpu()
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts.append(at + begins.flatten().nonzero().squeeze(1).numpy())
        counted += int(batch.mask.sum())
    rows.execute("BEGIN IMMEDIATE")
    try:
        packed = zlib.compress(np.concatenate(starts).astype("<i8").tobytes())
        rows.execute("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", (block, first, len(windows), counted, packed))
        rows.executemany("INSERT INTO windows VALUES (?, ?)", texts)
        for kind, parts in found.items():
            rows.executemany(
                "INSERT INTO places VALUES (?, ?, ?, ?, ?)", _packed(parts, block, kind, first * source.n_ctx)
            )
        rows.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            rows.execute("ROLLBACK")
        raise


def _packed(parts: list[tuple[np.ndarray, ...]], block: int, kind: int, first: int) -> list[tuple[Any, ...]]:
    """The rows of `places` for the arrays [feature, position, amount, token] of a block, in order of position."""
    if not parts:
        return []
    features, positions, amounts, tokens = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(features, kind="stable")
    features, positions, amounts, tokens = features[order], positions[order], amounts[order], tokens[order]
    edges = np.flatnonzero(np.diff(features, prepend=-1, append=-1))
    rows = []
    for start, end in pairwise(edges.tolist()):
        places = Places(positions[start:end], amounts[start:end], tokens[start:end])
        rows.append((int(features[start]), block, kind, end - start, places.pack(first)))
    return rows


def _presence(sae: SAE, batch: Batch, each: Iterator[int]) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Where features are new and carried in a batch: kind, features [m], positions [m] in the batch, amounts [m].

    Of a kind the positions rise, from one entry to the next too. each: see `_add_block`.
    """
    device = sae.W_dec.device
    acts, mask, documents = batch.acts.to(device), batch.mask.to(device), batch.documents.to(device)
    output = run_form(sae, acts, mask, documents, exact=True)
    if not output.x_hat.isfinite().all():
        raise UserError(f"the {sae.arch} SAE gives NaN or Inf on this text: its weights are broken")
    values, indices = output.code.values.masked_fill(~mask.unsqueeze(-1), 0), output.code.indices
    places, slot = (values > 0).flatten(0, 1).nonzero(as_tuple=True)
    found = [(NEW, *_arrays(indices.flatten(0, 1)[places, slot], places, values.flatten(0, 1)[places, slot], ACTIVITY))]
    if not isinstance(sae, ContextualSAE):
        deque(islice(each, len(acts)), maxlen=0)
        return found
    T = acts.shape[1]
    for row in range(len(acts)):
        of_row = Output(output.x_hat[row], Code(output.code.values[row], indices[row]), output.c[row])
        attribution = attribute(sae, acts[row], mask[row], documents[row], of_row)
        for start in range(0, T, ROWS):
            share = attribution.share_by_feature(start, min(T, start + ROWS))
            t, column = (share >= CARRIED).nonzero(as_tuple=True)
            positions = row * T + start + t
            found.append((CARRIED_KIND, *_arrays(attribution.features[column], positions, share[t, column], FRACTION)))
        next(each)
    return found


def _arrays(
    features: Tensor, positions: Tensor, amounts: Tensor, unit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return features.cpu().numpy(), positions.cpu().numpy(), whole(amounts.double().cpu().numpy(), unit)
