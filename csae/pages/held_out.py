"""Held-out text for a demo's page: passages to read along, and where in all of it each feature is most active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from csae.data.activations import ActivationSource
from csae.data.pieces import token_pieces
from csae.errors import UserError
from csae.evaluate import run_form
from csae.pages.view import Window
from csae.progress import Progress, quiet
from csae.sae import SAE

BATCH_WINDOWS = 16
EXAMPLES = 4  # of a feature, a window each
BEFORE, AFTER = 10, 4  # tokens of context around an example

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


@torch.no_grad()
def examples(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    tokenizer: Any,
    features: Sequence[int],
    progress: Progress = quiet,
) -> dict[str, dict[str, Any]]:
    """Where in these windows each of the features is most active, in the SAE's exact form; JSON as it is.

    Returns feature -> {"rate": share of tokens at which it is active, "examples": [[text before, token, text after,
    activity in units of normalised activations], ...], strongest first, one a window at most}.
    """
    device = sae.W_dec.device
    parts, n_tokens = [], 0
    for acts, counted, documents, of_batch in _batches(source, windows, progress):
        mask = counted.to(device)
        code = run_form(sae, acts.to(device), mask, documents.to(device), exact=True).code
        parts.append((code.values.masked_fill(~mask.unsqueeze(-1), 0), code.indices, of_batch))
        n_tokens += int(mask.sum())
    values, indices, tokens = (torch.cat(part) for part in zip(*parts, strict=True))  # [N, T, k] twice, [N, T]
    T, k = values.shape[1:]
    active = values.flatten().nonzero().squeeze(1)
    feature, value, place = indices.flatten()[active], values.flatten()[active], active // k
    # By feature, and within a feature strongest first.
    order = value.sort(descending=True, stable=True).indices
    order = order[feature[order].sort(stable=True).indices]
    feature, value, place = feature[order], value[order], place[order]
    ends = torch.searchsorted(feature, torch.tensor([[f, f + 1] for f in features], device=device)).tolist()
    pieces: dict[int, list[str]] = {}
    found = {}
    for name, (first, last) in zip(features, ends, strict=True):
        shown: dict[int, list[Any]] = {}
        for at in range(first, last):
            row, t = divmod(int(place[at]), T)
            if row not in pieces:
                pieces[row] = token_pieces(tokenizer, tokens[row].tolist())
            of = pieces[row]
            if row not in shown and of[t]:
                before, after = "".join(of[max(0, t - BEFORE) : t]), "".join(of[t + 1 : t + 1 + AFTER])
                shown[row] = [before, of[t], after, round(float(value[at]), 2)]
                if len(shown) == EXAMPLES:
                    break
        found[str(name)] = {"rate": round((last - first) / n_tokens, 5), "examples": list(shown.values())}
    return found


def _batches(source: ActivationSource, windows: Sequence[int], progress: Progress = quiet) -> Iterator[Batched]:
    for start in progress(range(0, len(windows), BATCH_WINDOWS), "features in held-out text"):
        batch = source.read(windows[start : start + BATCH_WINDOWS])
        if batch.tokens is None:
            raise UserError("the activations come without token ids, so there is no text to show: cache them anew")
        yield batch.acts, batch.mask, batch.documents, batch.tokens
