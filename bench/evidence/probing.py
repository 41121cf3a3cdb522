"""Sparse probing: how well the best one or five features of an SAE tell what a token is.

For each label of `labels`: features are chosen on one half of the windows and measured on the other. A token is taken
for one that has the label where any chosen feature fires. F1 is that of Gurnee et al. 2023 ("Finding Neurons in a
Haystack"); they fit a classifier to the features, here their firing itself decides, so what is measured is what a
reader of features sees. For a contextual SAE, what is new (the code) and what is carried (each feature's share in c)
are probed apart, and together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csae.attribution import attribute
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource
from csae.evaluate import run_form
from csae.outputs import Code, Output
from csae.progress import Progress, quiet
from csae.sae import SAE

AT_MOST = (1, 5)
"""features"""
SHARES = (0.02, 0.1, 0.3)
"""of c: a feature is carried to a position where its share there is above one of these, each of them tried"""
LEVELS = (0.0, 0.5, 1.0)
"""of a feature's mean value where it is active: it fires above one of these, each of them tried"""
BATCH_WINDOWS = 16

Found = tuple[Tensor, Tensor, Tensor]
"""Positions, features and how much of each is there, all [n]."""


class Firings(NamedTuple):
    """Where something fires: item items[i] at position positions[i]; int64. An item is a feature and a level."""

    positions: Tensor
    items: Tensor
    n_items: int


@torch.no_grad()
def measure(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    labels: Mapping[str, Tensor],
    at_most: Sequence[int] = AT_MOST,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """The F1 of each label [N, T] on these N windows of the source, in the exact form; the result is JSON.

    An entry for each label and each part of the SAE ("new"; and "carried", "both" of a contextual one): label, part,
    share (of positions that have the label), always (F1 of always saying yes), f1 (at most so many features -> F1 on
    the half they were not chosen on).
    """
    half = len(windows) // 2
    if half < 1:
        raise ValueError(
            f"windows: given {len(windows)}; needed 2 or more, to choose on one half and measure on another"
        )
    fired, mask = _firings(sae, source, windows, progress)
    n = half * source.n_ctx
    found = []
    for name, label in labels.items():
        if tuple(label.shape) != (len(windows), source.n_ctx):
            raise ValueError(f"labels: {name} has shape {list(label.shape)}; needed {[len(windows), source.n_ctx]}")
        counts, holds = (mask & (label >= 0)).flatten(), (label == 1).flatten()
        measured = counts.clone()
        counts[n:], measured[:n] = False, False
        share = float(holds[measured].double().mean()) if measured.any() else 0.0
        for part, firings in fired.items():
            chosen = best(firings, counts, holds, max(at_most))
            f1 = {str(k): f1_of(firings, chosen[:k], measured, holds) for k in at_most}
            found.append({"label": name, "part": part, "share": share, "always": 2 * share / (1 + share), "f1": f1})
    return found


def best(fired: Firings, counts: Tensor, holds: Tensor, n: int) -> list[int]:
    """Up to n items, one after the other: each the one with which F1 rises most, where any that fires says yes.

    counts, holds: [positions] bool, what takes part, and what has the label.
    """
    open_, positions, items = counts.clone(), fired.positions, fired.items
    n_holds, hits, said = int((holds & counts).sum()), 0, 0
    chosen: list[int] = []
    score = 0.0
    for _ in range(n):
        at = open_[positions]
        yes = torch.bincount(items[at & holds[positions]], minlength=fired.n_items)
        all_ = torch.bincount(items[at], minlength=fired.n_items)
        f1 = 2 * (hits + yes) / (said + all_ + n_holds).clamp_min(1)
        item = int(f1.argmax())
        if float(f1[item]) <= score:
            break
        score = float(f1[item])
        chosen.append(item)
        hits, said = hits + int(yes[item]), said + int(all_[item])
        open_[positions[items == item]] = False
    return chosen


def f1_of(fired: Firings, chosen: Sequence[int], counts: Tensor, holds: Tensor) -> float:
    """F1 of saying yes where any of the chosen items fires."""
    yes = torch.zeros_like(counts)
    yes[fired.positions[torch.isin(fired.items, torch.tensor(list(chosen), dtype=torch.int64))]] = True
    yes &= counts
    right, n_holds = int((yes & holds).sum()), int((holds & counts).sum())
    return 2 * right / max(int(yes.sum()) + n_holds, 1)


def _firings(
    sae: SAE, source: ActivationSource, windows: Sequence[int], progress: Progress
) -> tuple[dict[str, Firings], Tensor]:
    """What fires where, by part, positions counted through all windows; and the mask [N, T]."""
    was_training = sae.training
    sae.eval()
    new: list[Found] = []
    carried: list[Found] = []
    masks = []
    try:
        for start in progress(range(0, len(windows), BATCH_WINDOWS), "probing"):
            batch = source.read(windows[start : start + BATCH_WINDOWS])
            output = run_form(sae, batch.acts, batch.mask, batch.documents, exact=True)
            masks.append(batch.mask.cpu())
            values, indices = (part.flatten(0, 1) for part in output.code)
            at, slot = (values > 0).nonzero(as_tuple=True)
            new.append((at + start * source.n_ctx, indices[at, slot], values[at, slot]))
            if isinstance(sae, ContextualSAE):
                for i, acts in enumerate(batch.acts):
                    one = Output(output.x_hat[i], Code(*(part[i] for part in output.code)), output.c[i])
                    what = attribute(sae, acts, batch.mask[i], batch.documents[i], one)
                    share = what.share_by_feature(0, source.n_ctx)
                    at, column = (share > min(SHARES)).nonzero(as_tuple=True)
                    where = at + (start + i) * source.n_ctx
                    carried.append((where, what.features[column], share[at, column]))
    finally:
        sae.train(was_training)
    fired = {"new": _by_level(new, sae.d_sae)}
    if carried:
        fired["carried"] = _by_share(carried, sae.d_sae)
        fired["both"] = _together(fired["new"], fired["carried"])
    return fired, torch.cat(masks)


def _by_level(found: list[Found], d_sae: int) -> Firings:
    """An item for each feature and each of LEVELS."""
    positions, features, values = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    total = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, features, values.double())
    mean = total / torch.bincount(features, minlength=d_sae).clamp_min(1)
    return _items(positions, features, [values > level * mean[features] for level in LEVELS], d_sae)


def _by_share(found: list[Found], d_sae: int) -> Firings:
    """An item for each feature and each of SHARES."""
    positions, features, share = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return _items(positions, features, [share > least for least in SHARES], d_sae)


def _items(positions: Tensor, features: Tensor, kept: Sequence[Tensor], d_sae: int) -> Firings:
    items = torch.cat([features[where] + number * d_sae for number, where in enumerate(kept)])
    return Firings(torch.cat([positions[where] for where in kept]), items, d_sae * len(kept))


def _together(one: Firings, other: Firings) -> Firings:
    items = torch.cat([one.items, other.items + one.n_items])
    return Firings(torch.cat([one.positions, other.positions]), items, one.n_items + other.n_items)
