"""One text as an SAE sees it, token by token: what is new, what is carried, from where, and what each feature does.

The text is read in windows of up to `n_ctx` tokens, of equal length. After a cut all features begin again, and look new
though they are not; so `csae view` takes windows LONGER times as long as in training. The exact form has held on
windows that long (csae.bench.evidence.long_windows); `fvu_beyond` tells whether it does on this text. A window costs
its attention weights, [n_heads, T, T].

Features have no names: the tokens at which a feature is new show what it is about.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csae.attribution import attribute
from csae.contextual_sae import ContextualSAE
from csae.data.language_model import LanguageModel
from csae.data.pieces import token_pieces
from csae.errors import UserError
from csae.features.effects import (
    AT_ONCE,
    Best,
    Effects,
    effects_of,
    scores,
    similar,
    strongest_tokens,
    writes_to_stream,
)
from csae.features.places import ACTIVITY, CARRIED, FRACTION
from csae.pages.windows import Window, read_windows
from csae.progress import Progress, quiet
from csae.sae import SAE
from csae.trained_on import check_place

__all__ = ["Window", "read_windows", "view"]

LONGER = 8  # times the windows that were trained on
PARTS_SHOWN = 12  # of c, at a token
ROWS = 40  # of a timeline
SIMILAR = 6
RAISING = 5  # features that raise a token of the text
EFFECTS_SHOWN = 4000  # features, those that add most
VARIES = 1e-10  # variance over mean square: where it is less, activations differ by rounding, and FVU says nothing
# With an entry for each token.
LISTS = ("new", "carried", "gathered", "rest", "parts", "others", "remainder", "c", "missed")


@torch.no_grad()
def view(
    sae: SAE,
    windows: Sequence[Window],
    lm: LanguageModel,
    trained_on: int | None = None,
    beside: SAE | None = None,
    progress: Progress = quiet,
    elsewhere: bool = False,
    effects: Effects | None = None,
) -> dict[str, Any]:
    """A text under an SAE, in its exact form; JSON as it is.

    Args:
        sae: a contextual SAE, or a per-token one, which carries nothing.
        windows: of the text, from `read_windows`.
        lm: the language model that the activations are from.
        trained_on: positions of a window in training, for `fvu_beyond`.
        beside: a per-token SAE of the same activations, to compare with.
        elsewhere: also where an SAE was trained on another model (`sae.trained_on`).
        effects: of the model (`csae.features.effects`), where they are known already.

    Returns a dictionary, in which `T` entries are one for each token of the text, and a position counts from 0 through
    all windows:
        tokens: T pieces, which join to the text. cuts: the positions at which a window begins, but 0. left_out:
            positions out of the mask, where all of the lists below are empty.
        new: T lists [feature, activity, feature, activity, ...], the most active first, in 1/ACTIVITY of the unit of
            normalised activations.
        carried: T lists [feature, share, ...]: the features with a share of CARRIED or more of c, all their parts
            together, largest first, in 1/FRACTION. threshold: CARRIED in the same unit.
        gathered: T lists: of how many parts each entry of `carried` is the sum. rest: T pairs [how many features there
            are beside those, their share in 1/FRACTION].
        parts: T lists [position, feature, share, ...]: the PARTS_SHOWN single parts of c that are largest in share,
            whatever its sign, in 1/FRACTION.
        others: T pairs [how many parts there are beside those, their share in 1/FRACTION].
        remainder: T numbers: the length of c less all its parts, over the length of c.
        c: T numbers, the share of c in the reconstruction: its projection on x_hat - b_dec, over the length of that.
            missed: squared error over the squared length of x - b_dec. Both in 1/FRACTION.
        rows: the features that add most to the text, newly and carried, by where in the text they do it.
        features: feature -> {"new", "carried", "cosine", "similar"}, for the EFFECTS_SHOWN that add most. new: what it
            does to the next token where it is new, carried: what all that it carried in this text does, nothing where
            that is noise (`csae.features.effects`); cosine: of the two directions. Without "carried" and "cosine" where
            it carried nothing, without "new" too where it does not write to the residual stream. similar: [feature,
            cosine of the two decoder rows in hundredths, ...].
        noise: the score above which logits are told; None where none are. raises: piece of the text -> [feature, score,
            ...], those that raise the logit of its token most, as far as they are above noise.
        figures: arch, k, d_sae; fvu: squared error over variance, both on this text, None where nothing varies;
            fvu_beyond: the same where a window goes on beyond the positions that were trained on, None where none
            does; mean_run: for how many positions in a row a feature is present, that is new or carried; new_in_run:
            at how many of them it is new.
        beside: None, or {"new", "rows", "missed", "figures", "features"} as above, for the features in `rows` only.

    Raises UserError where an SAE does not fit the activations, was trained on another model, or gives NaN or Inf;
    ValueError where there are no windows.
    """
    if not windows:
        raise ValueError("windows: given none; needed those of a text, from read_windows")
    for one in (sae, beside):
        if one is not None:
            check_place(one.trained_on, lm.name, None, elsewhere=elsewhere)
    for name, one in (("the SAE", sae), ("the SAE beside it", beside)):
        if one is None:
            continue
        if one.d_in != windows[0].acts.shape[1]:
            raise UserError(
                f"{name} is {one.d_in} wide; needed {windows[0].acts.shape[1]}, as wide as the activations: it is of "
                "another model"
            )
        if one.is_transcoder != (windows[0].target is not None) or one.d_out != windows[0].wanted.shape[1]:
            width = f"{windows[0].wanted.shape[1]} numbers a position"
            what = f"{width}, its input" if windows[0].target is None else f"a transcoder that gives {width}"
            kind = "a transcoder to" if one.is_transcoder else "an SAE of"
            raise UserError(f"{name} is {kind} {one.d_out} numbers; needed {what}: read it where it was trained")
    if isinstance(beside, ContextualSAE):
        raise UserError("the SAE beside it is a contextual one; needed one per token, that carries nothing")
    read = _read(sae, windows, progress)
    pieces = [
        piece for window in windows for piece in window.pieces or token_pieces(lm.tokenizer, window.tokens.tolist())
    ]
    effects = (effects or effects_of(lm)) if writes_to_stream(sae, lm) else None
    found = {
        "tokens": pieces,
        "cuts": _starts(windows)[1:],
        "left_out": (~torch.cat([window.mask for window in windows])).nonzero().squeeze(1).tolist(),
        "threshold": _fraction(CARRIED),
        **read.lists,
        "rows": _rows(read),
        "features": _effects(sae, effects, lm.tokenizer, read, sorted(_largest(_added(read), EFFECTS_SHOWN))),
        "noise": None if effects is None else round(effects.noise, 1),
        "raises": _raises(sae, effects, windows, pieces),
        "figures": _figures(sae, read, windows, trained_on),
    }
    if beside is None:
        return found | {"beside": None}
    read = _read(beside, windows, progress)
    rows, figures = _rows(read), _figures(beside, read, windows, trained_on)
    new, missed = _only(rows, read.lists["new"]), read.lists["missed"]
    features = _effects(beside, effects, lm.tokenizer, read, sorted(rows))
    other = {"new": new, "rows": rows, "missed": missed, "figures": figures, "features": features}
    return found | {"beside": other}


class _Reading(NamedTuple):
    """What an SAE makes of the N tokens of a text."""

    lists: dict[str, list[Any]]  # those of `view` that are named in LISTS, [N] each
    lengths: list[float]  # [N]: of c, in normalised units
    errors: Tensor  # [N] float64, squared
    written: dict[int, Tensor]  # feature -> [d_out], the sum of all that it carried


def _read(sae: SAE, windows: Sequence[Window], progress: Progress) -> _Reading:
    lists: dict[str, list[Any]] = {name: [] for name in LISTS}
    lengths: list[float] = []
    errors: list[Tensor] = []
    written: dict[int, Tensor] = {}
    b = sae.b_dec * sae.out_scale
    for start, window in zip(_starts(windows), windows, strict=True):
        acts, wanted, mask = window.acts.to(b), window.wanted.to(b), window.mask.to(b.device)
        found = attribute(sae, acts, mask) if isinstance(sae, ContextualSAE) else None
        x_hat, code, c = found.output if found else sae(acts, mask)
        if not x_hat.isfinite().all():
            raise UserError(f"the {sae.arch} SAE gives NaN or Inf on this text: its weights are broken")
        values = code.values.masked_fill(~mask[:, None], 0)
        error = (wanted - x_hat).square().sum(dim=-1)
        of_c = (c * (x_hat - b)).sum(dim=-1) / (x_hat - b).square().sum(dim=-1).clamp_min(1e-12)
        missed = error / (wanted - b).square().sum(dim=-1).clamp_min(1e-12)
        lengths += (c.norm(dim=-1) / sae.out_scale).tolist()
        errors.append(error.double().cpu())
        for t, counted in enumerate(mask.tolist()):
            lists["new"].append(_pairs(code.indices[t], values[t], 0, ACTIVITY))
            lists["c"].append(_fraction(of_c[t]) if counted else 0)
            lists["missed"].append(_fraction(missed[t]) if counted else 0)
        if found is None:
            for name in ("carried", "gathered", "parts"):
                lists[name] += [[]] * len(acts)
            for name in ("rest", "others"):
                lists[name] += [[0, 0]] * len(acts)
            lists["remainder"] += [0] * len(acts)
            continue
        features, row = code.indices.unique(return_inverse=True)
        for t in progress(range(len(acts)), "attributing"):
            share = found.share_at(t)
            carried = share.new_zeros(len(features)).index_add_(0, row.flatten(), share.flatten())
            counts = row[share != 0].bincount(minlength=len(features))  # parts of each feature
            listed, others = _parts(share, code.indices, start)
            lists["carried"].append(_pairs(features, carried, CARRIED, FRACTION))
            gathered = counts[torch.searchsorted(features, torch.tensor(lists["carried"][-1][::2]).to(features))]
            lists["gathered"].append(gathered.tolist())
            left = carried.double().sum() - carried[carried >= CARRIED].double().sum()
            lists["rest"].append([int((counts > 0).sum()) - len(gathered), _fraction(left)])
            lists["parts"].append(listed)
            lists["others"].append(others)
        lists["remainder"] += [float(f"{missing:.0e}") for missing in found.remainder().tolist()]
        for feature, wrote in zip(features.tolist(), found.written()[1], strict=True):
            written[feature] = written.get(feature, 0) + wrote
    return _Reading(lists, lengths, torch.cat(errors), written)


def _starts(windows: Sequence[Window]) -> list[int]:
    """The position in the text at which each window begins."""
    return [0, *itertools.accumulate(len(window.tokens) for window in windows)][:-1]


def _parts(share: Tensor, indices: Tensor, start: int) -> tuple[list[int], list[int]]:
    """The largest parts at a position, and what the others are; share, indices [T, k], of a window from start on."""
    flat, k = share.flatten(), share.shape[1]
    count = int((flat != 0).sum())
    largest = flat.abs().topk(min(PARTS_SHOWN, count)).indices
    listed: list[int] = []
    for at, value in zip(largest.tolist(), flat[largest].tolist(), strict=True):
        listed += [start + at // k, int(indices[at // k, at % k]), _fraction(value)]
    return listed, [count - len(largest), _fraction(flat.double().sum() - flat[largest].double().sum())]


def _rows(read: _Reading) -> list[int]:
    """The ROWS features that add most, in the order of the position at which half of that is added."""
    added = _added(read)

    def middle(feature: int) -> int:
        sums = list(itertools.accumulate(amount for _, amount in added[feature]))
        return added[feature][bisect.bisect_left(sums, sums[-1] / 2)][0]

    return sorted(_largest(added, ROWS), key=middle)


def _largest(added: dict[int, list[tuple[int, float]]], n: int) -> list[int]:
    """The n features of `_added` that add most in all, the most first."""
    total = {feature: sum(amount for _, amount in at) for feature, at in added.items()}
    return sorted(total, key=lambda feature: (-total[feature], feature))[:n]


def _added(read: _Reading) -> dict[int, list[tuple[int, float]]]:
    """For each feature [position, length that it adds to the reconstruction], newly or carried, in normalised units."""
    added: dict[int, list[tuple[int, float]]] = {}
    for t, (new, carried, length) in enumerate(
        zip(read.lists["new"], read.lists["carried"], read.lengths, strict=True)
    ):
        for feature, activity in zip(new[::2], new[1::2], strict=True):
            added.setdefault(feature, []).append((t, activity / ACTIVITY))
        for feature, share in zip(carried[::2], carried[1::2], strict=True):
            added.setdefault(feature, []).append((t, share / FRACTION * length))
    return added


def _only(rows: list[int], new: list[list[int]]) -> list[list[int]]:
    """The lists `new` without the features that are not in rows."""
    kept = set(rows)
    return [
        [number for pair in zip(here[::2], here[1::2], strict=True) if pair[0] in kept for number in pair]
        for here in new
    ]


def _figures(sae: SAE, read: _Reading, windows: Sequence[Window], trained_on: int | None) -> dict[str, Any]:
    """See `view`."""
    mask = torch.cat([window.mask for window in windows]).cpu()
    place = torch.cat([torch.arange(len(window.tokens)) for window in windows])
    wanted = torch.cat([window.wanted for window in windows]).double().cpu()

    def fvu(chosen: Tensor) -> float | None:
        there = wanted[chosen]
        variance = (there - there.mean(dim=0)).square().sum()
        return float(read.errors[chosen].sum() / variance) if variance > VARIES * there.square().sum() else None

    runs = present = fresh = 0
    before: set[int] = set()
    for t, (new, carried) in enumerate(zip(read.lists["new"], read.lists["carried"], strict=True)):
        here = {*new[::2], *carried[::2]}
        runs += len(here if place[t] == 0 else here - before)
        present += len(here)
        fresh += len(new) // 2
        before = here
    return {
        "arch": sae.arch,
        "k": sae.k,
        "d_sae": sae.d_sae,
        "fvu": fvu(mask),
        "fvu_beyond": None if trained_on is None else fvu(mask & (place >= trained_on)),
        "mean_run": present / max(1, runs),
        "new_in_run": fresh / max(1, runs),
    }


def _pairs(features: Tensor, amounts: Tensor, least: float, unit: int) -> list[int]:
    """[feature, amount, ...] where the amount is positive and not below least, largest first, in 1/unit."""
    chosen = ((amounts > 0) & (amounts >= least)).nonzero().squeeze(1)
    chosen = chosen[amounts[chosen].argsort(descending=True, stable=True)]
    pairs = zip(features[chosen].tolist(), amounts[chosen].tolist(), strict=True)
    return [number for feature, amount in pairs for number in (feature, round(unit * amount))]


def _fraction(value: Tensor | float) -> int:
    return round(FRACTION * float(value))


def _effects(
    sae: SAE, effects: Effects | None, tokenizer: Any, read: _Reading, features: list[int]
) -> dict[str, dict[str, Any]]:
    """What features do to the next token, and which are like them; see `view`."""
    found: dict[str, dict[str, Any]] = {str(feature): {} for feature in features}
    cosines, others = similar(sae.W_dec, torch.tensor(features, dtype=torch.int64, device=sae.W_dec.device), SIMILAR)
    for feature, of, rows in zip(features, cosines.tolist(), others.tolist(), strict=True):
        alike = zip(rows, of, strict=True)
        found[str(feature)]["similar"] = [number for row, value in alike for number in (row, round(100 * value))]
    if effects is None:
        return found
    for feature, new in zip(features, strongest_tokens(effects, tokenizer, sae.W_dec[features]), strict=True):
        found[str(feature)]["new"] = new
    wrote = [feature for feature in features if feature in read.written and read.written[feature].any()]
    if wrote:
        written = torch.stack([read.written[feature] for feature in wrote])
        cosine = nn.functional.cosine_similarity(written, sae.W_dec[wrote], dim=-1).tolist()
        told = strongest_tokens(effects, tokenizer, written)
        for feature, carried, own in zip(wrote, told, cosine, strict=True):
            found[str(feature)] |= {"carried": carried, "cosine": round(own, 2)}
    return found


def _raises(
    sae: SAE, effects: Effects | None, windows: Sequence[Window], pieces: Sequence[str]
) -> dict[str, list[Any]]:
    """For each piece of the text the RAISING features that raise its token most, where that is above noise."""
    if effects is None:
        return {}
    text = dict(zip(torch.cat([window.tokens for window in windows]).tolist(), pieces, strict=True))
    tokens = torch.tensor([token for token in text if token < effects.by_dimension.shape[1]])
    best = Best.of_none(len(tokens), effects.spread.device)
    for start in range(0, sae.d_sae, AT_ONCE):
        best = best.joined(scores(effects, sae.W_dec[start : start + AT_ONCE], tokens), start, RAISING)
    found: dict[str, list[Any]] = {}
    for token, of, rows in zip(tokens.tolist(), best.scores.tolist(), best.rows.tolist(), strict=True):
        strong = [(row, score) for row, score in zip(rows, of, strict=True) if score > effects.noise]
        if strong and text[token]:
            found[text[token]] = [number for row, score in strong for number in (row, round(score, 1))]
    return found
