"""Passages of text as a contextual SAE sees them: at each token what is new, and what was carried from where.

Features have no names. What one is about shows in the tokens at which it is most active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csae.attribution import Attribution, attribute
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource
from csae.data.pieces import token_pieces
from csae.errors import UserError
from csae.evaluate import run_form
from csae.progress import Progress, quiet

BATCH_WINDOWS = 16
NEW_SHOWN = 8  # features at a token
SOURCES_SHOWN = 6  # earlier tokens at a token
CARRIED_SHOWN = 3  # features from an earlier token
EXAMPLES = 4  # of a feature, a window each
BEFORE, AFTER = 10, 4  # tokens of context around an example


@torch.no_grad()
def explain(
    sae: ContextualSAE,
    source: ActivationSource,
    windows: Sequence[int],
    tokenizer: Any,
    n_passages: int,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Some of the windows token by token, and the features that occur there; JSON as it is.

    Shown are windows with the fewest breaks between documents, and of these the ones with most letters in them:
    prose rather than tables, each from another document. The source must know its tokens.

    Returns {"passages": [...], "features": {...}}. A passage is {"window", "tokens"}, and a token

        text      its piece of the text; empty where an earlier token shows the character it is a part of
        counted   False where the mask leaves it out
        starts    True where it begins a document
        carried   c's share of the reconstruction: its projection on x_hat - b_dec, over the length of that
        missed    the share of x - b_dec that x_hat misses: squared error over squared length
        l0        how many features are active
        new       [feature, value] of the strongest of them, the value in units of normalised activations
        sources   [position, share of c, [[feature, share of c], ...]] of the earlier tokens that c is from

    and a feature, by its number as text, {"rate": share of tokens at which it is active, "examples": [[text
    before, token, text after, value], ...], strongest first, one a window at most}.
    """
    device = sae.W_dec.device
    values, indices, documents, tokens, n_counted = [], [], [], [], 0
    for start in progress(range(0, len(windows), BATCH_WINDOWS), "explaining"):
        batch = source.read(windows[start : start + BATCH_WINDOWS])
        if batch.tokens is None:
            raise UserError("the activations come without token ids, so there is no text to show: cache them anew")
        mask = batch.mask.to(device)
        code = run_form(sae, batch.acts.to(device), mask, batch.documents.to(device), exact=True).code
        values.append(code.values.masked_fill(~mask.unsqueeze(-1), 0))
        indices.append(code.indices)
        documents.append(batch.documents)
        tokens.append(batch.tokens)
        n_counted += int(mask.sum())
    pieces = _Pieces(tokenizer, torch.cat(tokens))
    passages = []
    for row in _readable(torch.cat(documents), pieces, n_passages):
        batch = source.read([windows[row]])
        acts, mask, boundaries = (part[0].to(device) for part in (batch.acts, batch.mask, batch.documents))
        found = attribute(sae, acts, mask, boundaries)
        described = _describe(sae, found, acts, mask, boundaries, pieces[row])
        passages.append({"window": int(windows[row]), "tokens": described})
    features = _features(torch.cat(values), torch.cat(indices), n_counted, _mentioned(passages), pieces)
    return {"passages": passages, "features": features}


class _Pieces:
    """The pieces of each window [N, T] of tokens, made when they are asked for."""

    def __init__(self, tokenizer: Any, tokens: Tensor) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens
        self._made: dict[int, list[str]] = {}

    def __getitem__(self, row: int) -> list[str]:
        if row not in self._made:
            self._made[row] = token_pieces(self._tokenizer, self._tokens[row].tolist())
        return self._made[row]


def _readable(documents: Tensor, pieces: _Pieces, n: int) -> list[int]:
    """Up to n rows of documents [N, T]: see `explain`."""
    boundaries = (documents[:, 1:] != documents[:, :-1]).sum(dim=1)
    fewest = (boundaries == boundaries.min()).nonzero().squeeze(1).tolist()
    letters = {row: sum(character.isalpha() for character in "".join(pieces[row])) for row in fewest}
    best_of_document: dict[int, int] = {}
    for row in sorted(fewest, key=lambda row: -letters[row]):
        best_of_document.setdefault(int(documents[row, -1]), row)
    return list(best_of_document.values())[:n]


def _describe(
    sae: ContextualSAE, found: Attribution, acts: Tensor, mask: Tensor, documents: Tensor, pieces: list[str]
) -> list[dict[str, Any]]:
    """A window, token by token; see `explain`."""
    x_hat, code, c = found.output
    b = sae.b_dec * sae.scale
    rebuilt, wanted = x_hat - b, acts - b
    carried = (c * rebuilt).sum(dim=-1) / rebuilt.square().sum(dim=-1).clamp_min(1e-12)
    missed = (acts - x_hat).square().sum(dim=-1) / wanted.square().sum(dim=-1).clamp_min(1e-12)
    described = []
    for t, piece in enumerate(pieces):
        counted = bool(mask[t])
        active = code.values[t] > 0
        described.append(
            {
                "text": piece,
                "counted": counted,
                "starts": t > 0 and bool(documents[t] != documents[t - 1]),
                "carried": round(float(carried[t]), 4) if counted else 0.0,
                "missed": round(float(missed[t]), 4) if counted else 0.0,
                "l0": int(active.sum()),
                "new": [
                    [int(feature), round(float(value), 2)]
                    for value, feature in zip(code.values[t, :NEW_SHOWN], code.indices[t, :NEW_SHOWN], strict=True)
                    if value > 0
                ],
                "sources": _sources(found, t),
            }
        )
    return described


def _sources(found: Attribution, t: int) -> list[list[Any]]:
    """The earlier positions that c[t] is from, largest share first, each with its largest features."""
    by_position = found.share[t].sum(dim=-1)  # [T]
    largest = by_position.topk(min(SOURCES_SHOWN, t))
    sources = []
    for share, j in zip(largest.values.tolist(), largest.indices.tolist(), strict=True):
        if share > 0:
            slots = found.share[t, j].topk(min(CARRIED_SHOWN, found.share.shape[-1]))
            features = [
                [int(found.output.code.indices[j, i]), round(value, 3)]
                for value, i in zip(slots.values.tolist(), slots.indices.tolist(), strict=True)
                if value > 0
            ]
            sources.append([j, round(share, 3), features])
    return sources


def _mentioned(passages: list[dict[str, Any]]) -> list[int]:
    features: set[int] = set()
    for passage in passages:
        for token in passage["tokens"]:
            features.update(feature for feature, _ in token["new"])
            features.update(feature for _, _, parts in token["sources"] for feature, _ in parts)
    return sorted(features)


def _features(
    values: Tensor, indices: Tensor, n_tokens: int, wanted: Sequence[int], pieces: _Pieces
) -> dict[str, dict[str, Any]]:
    """Rate and examples of the wanted features, from the code [N, T, k] of all windows."""
    T, k = values.shape[1:]
    active = values.flatten().nonzero().squeeze(1)
    feature, value, place = indices.flatten()[active], values.flatten()[active], active // k
    # By feature, and within a feature strongest first.
    order = value.sort(descending=True, stable=True).indices
    order = order[feature[order].sort(stable=True).indices]
    feature, value, place = feature[order], value[order], place[order]
    edges = torch.searchsorted(feature, torch.tensor([[f, f + 1] for f in wanted], device=feature.device))
    described = {}
    for name, (first, last) in zip(wanted, edges.tolist(), strict=True):
        examples: dict[int, list[Any]] = {}
        for at in range(first, last):
            row, t = divmod(int(place[at]), T)
            if row not in examples and pieces[row][t]:
                before, after = pieces[row][max(0, t - BEFORE) : t], pieces[row][t + 1 : t + 1 + AFTER]
                examples[row] = ["".join(before), pieces[row][t], "".join(after), round(float(value[at]), 2)]
                if len(examples) == EXAMPLES:
                    break
        described[str(name)] = {"rate": round((last - first) / n_tokens, 5), "examples": list(examples.values())}
    return described
