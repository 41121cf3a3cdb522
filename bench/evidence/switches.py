"""Language switches: how an SAE represents the language of a text, where, and what it carries.

The language is the same over a whole region of a window. A per-token SAE has to represent it at each token. A
contextual SAE could do so once, after the switch, and carry it from there. All SAEs are measured in the same way, in
the exact form. Features are chosen and classifiers fitted on one half of the windows; the other half is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csae.attribution import attribute
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource, Batch
from csae.evaluate import run_form
from csae.progress import Progress, quiet
from csae.sae import SAE, Output

BATCH_WINDOWS = 16
ATTRIBUTED_WINDOWS = 16
START = 8  # the positions of a region that count as just after the switch
RIDGE = 1e-3  # of the mean square of an input


@torch.no_grad()
def measure(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    regions: Tensor,
    languages: Tensor,
    names: Sequence[str],
    batch_windows: int = BATCH_WINDOWS,
    attributed_windows: int = ATTRIBUTED_WINDOWS,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """The figures of an SAE on windows whose language switches; the result is JSON.

    Args:
        sae: any SAE. It keeps its mode.
        windows: windows of the source, four or more.
        regions: [n, T] integer, for the n windows: the region of each position, counted from 0.
        languages: [n, T] integer: the language of a position, an index into `names`.
        names: the languages.
        attributed_windows: how many of the measured windows are attributed (contextual SAE only).

    Returns:
        An offset is the number of positions since the last switch. A figure by offset is a list with an entry for each
        offset, over the regions after a switch; None where there was no position. Only positions in the mask count.

        arch, k, d_sae, names, chosen_on and measured_on: the number of windows of the two halves; start: START.
        flicker: over all features. changes_per_active: how often features switch on or off from one position to the
            next inside a region, divided by the number of active features: 2 if each is active for one position, 0 if
            nothing changes. mean_run: for how many positions a feature stays active.
        energy: mean squared norm by offset of the activations minus b_dec ("acts"), of what the code adds ("code") and
            of c ("carried"), in units of the activations' mean. error: mean squared error by offset, in the same
            units.
        readable: how well a linear classifier (ridge regression) reads the language off the activations ("acts"), off
            what the code of one position adds ("code") and off c ("carried"): accuracy, by_offset. chance: the share of
            the most frequent language.
        marks: an entry for each language and criterion: of the features that fire more often in the language than
            elsewhere, the one with the most mutual information with it, in bits. Criteria: "region": it fires anywhere
            in a region; "position": at a position; "start": in the first START positions of a region. See
            `_figures_of_mark`.
        mean_marks: criterion -> the same figures, each a mean over the languages; and rate_start, rate_later: the mean
            of rate_by_offset before and from START on.
        carried: for a contextual SAE, see `_carried`; otherwise None.
    """
    shape = (len(windows), source.n_ctx)
    for name, tensor in (("regions", regions), ("languages", languages)):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: given shape {list(tensor.shape)}; needed [n, T] = {list(shape)}")
    if len(windows) < 4:
        raise ValueError(
            f"windows: given {len(windows)}; needed 4 or more, to choose on one half and measure on another"
        )
    was_training = sae.training
    sae.eval()
    try:
        half = len(windows) // 2
        chosen_on, measured_on = (
            _Half(sae, source, windows[part], regions[part], languages[part], len(names))
            for part in (slice(half), slice(half, None))
        )
        batches = progress(range(0, half, batch_windows), "choosing marks")
        classifiers = _fit(chosen_on, batches, batch_windows)
        batches = progress(range(0, len(windows) - half, batch_windows), "measuring switches")
        result = {
            "arch": sae.arch,
            "k": sae.k,
            "d_sae": sae.d_sae,
            "names": list(names),
            "chosen_on": half,
            "measured_on": len(windows) - half,
            "start": START,
        } | _measured(measured_on, classifiers, batches, batch_windows)
        chosen = _marks(chosen_on)
        marks = [
            {"language": names[language], "criterion": criterion, "feature": feature, "bits": bits}
            | _figures_of_mark(measured_on, language, feature)
            for language, criterion, feature, bits in chosen
        ]
        result |= {"marks": marks, "mean_marks": _means(marks)}
        result["carried"] = None
        if isinstance(sae, ContextualSAE):
            count = min(attributed_windows, len(measured_on.windows))
            result["carried"] = _carried(sae, measured_on, chosen, names, progress(range(count), "attributing"))
    finally:
        sae.train(was_training)
    return result


class _Half:
    """Half of the windows with the results of the SAE, which `run` fills in batch by batch.

    values, indices: [n, T, k], the codes. mask: [n, T]. offset: [n, T], positions since the region began.
    region: [n, T], numbered through all windows. after_switch: [n, T] bool.
    """

    def __init__(
        self,
        sae: SAE,
        source: ActivationSource,
        windows: Sequence[int],
        regions: Tensor,
        languages: Tensor,
        n_languages: int,
    ) -> None:
        self.sae, self.source, self.windows = sae, source, windows
        self.languages, self.n_languages = languages.cpu().long(), n_languages
        regions = regions.cpu().long()
        begins = torch.ones_like(regions, dtype=torch.bool)
        begins[:, 1:] = regions[:, 1:] != regions[:, :-1]
        position = torch.arange(regions.shape[1]).expand(regions.shape)
        self.offset = position - torch.where(begins, position, 0).cummax(dim=1).values
        self.region = begins.flatten().cumsum(0).reshape(regions.shape) - 1
        self.after_switch = begins.long().cumsum(dim=1) > 1
        self.n_offsets = int(self.offset.max()) + 1
        self.values = torch.empty(0)
        self.indices = torch.empty(0, dtype=torch.int64)
        self.mask = torch.empty(0, dtype=torch.bool)

    def run(self, start: int, count: int) -> tuple[Batch, Output]:
        """Run the next windows through the SAE; to be called in order."""
        part = slice(start, start + count)
        device = self.sae.W_dec.device
        batch = self.source.read(self.windows[part])
        batch = batch._replace(
            acts=batch.acts.to(device), mask=batch.mask.to(device), documents=batch.documents.to(device)
        )
        output = run_form(self.sae, batch.acts, batch.mask, batch.documents, exact=True)
        values = torch.where(batch.mask[..., None], output.code.values, 0)
        self.values = torch.cat([self.values, values.float().cpu()])
        self.indices = torch.cat([self.indices, output.code.indices.cpu()])
        self.mask = torch.cat([self.mask, batch.mask.cpu()])
        return batch, output

    def fires(self, feature: int) -> Tensor:
        """Where a feature is active: [n, T] bool."""
        return ((self.indices == feature) & (self.values > 0)).any(dim=-1)

    def by_offset(self, amount: Tensor, where: Tensor) -> list[float | None]:
        """The mean of amount [n, T] at each offset, over the positions `where` [n, T] bool."""
        at = self.offset[: len(where)][where]
        total = torch.bincount(at, amount[where].double(), self.n_offsets)
        return _ratios(total, torch.bincount(at, minlength=self.n_offsets))


def _parts(sae: SAE, batch: Batch, output: Output) -> dict[str, Tensor]:
    """What is compared, each [B, T, d_in], minus b_dec, divided by the scale. acts = code + carried + error."""
    parts = {"acts": batch.acts / sae.scale - sae.b_dec, "code": (output.x_hat - output.c) / sae.scale - sae.b_dec}
    return parts | ({"carried": output.c / sae.scale} if isinstance(sae, ContextualSAE) else {})


def _fit(half: _Half, starts: Any, count: int) -> dict[str, Tensor]:
    """Run a half, and fit a linear classifier of the language to each part: [d_in + 1, languages]."""
    squares: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    for start in starts:
        batch, output = half.run(start, count)
        mask = batch.mask
        languages = half.languages[start : start + count].to(mask.device)[mask]
        target = torch.nn.functional.one_hot(languages, half.n_languages).double()
        for name, part in _parts(half.sae, batch, output).items():
            inputs = _with_one(part[mask])
            squares[name] = squares.get(name, 0) + inputs.T @ inputs
            products[name] = products.get(name, 0) + inputs.T @ target
    classifiers = {}
    for name, square in squares.items():
        ridge = RIDGE * square.diagonal().mean().clamp_min(1e-30)
        classifiers[name] = torch.linalg.solve(square + ridge * torch.eye(len(square)).to(square), products[name])
    return classifiers


def _with_one(inputs: Tensor) -> Tensor:
    return torch.nn.functional.pad(inputs.double(), (0, 1), value=1.0)


def _measured(half: _Half, classifiers: dict[str, Tensor], starts: Any, count: int) -> dict[str, Any]:
    """Run a half; returns flicker, energy, error and readable of `measure`."""
    right: dict[str, list[Tensor]] = {name: [] for name in classifiers}
    energy: dict[str, list[Tensor]] = {name: [] for name in [*classifiers, "error"]}
    for start in starts:
        batch, output = half.run(start, count)
        languages = half.languages[start : start + count]
        for name, part in _parts(half.sae, batch, output).items():
            guess = (_with_one(part) @ classifiers[name]).argmax(dim=-1).cpu()
            right[name].append(guess == languages)
            energy[name].append(part.square().sum(dim=-1).cpu())
        energy["error"].append(((batch.acts - output.x_hat) / half.sae.scale).square().sum(dim=-1).cpu())
    seen, after = half.mask, half.mask & half.after_switch
    unit = torch.cat(energy["acts"])[seen].double().mean().clamp_min(1e-30)
    by_offset = {name: half.by_offset(torch.cat(parts) / unit, after) for name, parts in energy.items()}
    share = torch.bincount(half.languages[seen], minlength=half.n_languages) / seen.sum().clamp_min(1)
    readable: dict[str, Any] = {"chance": float(share.max())}
    for name, parts in right.items():
        hit = torch.cat(parts)
        readable[name] = {
            "accuracy": float(hit[seen].double().mean()),
            "by_offset": half.by_offset(hit, after),
        }
    return {
        "flicker": _flicker(half),
        "energy": {name: values for name, values in by_offset.items() if name != "error"},
        "error": by_offset["error"],
        "readable": readable,
    }


def _flicker(half: _Half) -> dict[str, float | None]:
    """How often features switch on and off inside regions, over all features."""
    active = half.values > 0
    pairs = half.mask[:, 1:] & half.mask[:, :-1] & (half.region[:, 1:] == half.region[:, :-1])
    same = (half.indices[:, 1:, :, None] == half.indices[:, :-1, None, :]) & active[:, 1:, :, None]
    kept = (same & active[:, :-1, None, :]).sum(dim=(-2, -1))[pairs].sum()
    before, now = active[:, :-1].sum(dim=-1)[pairs].sum(), active[:, 1:].sum(dim=-1)[pairs].sum()
    return {
        "changes_per_active": _ratio(before + now - 2 * kept, now),
        "mean_run": _ratio(now, now - kept),
    }


def _marks(half: _Half) -> list[tuple[int, str, int, float]]:
    """Language, criterion, feature and bits of the features that mark a language."""
    d_sae, L = half.sae.d_sae, half.n_languages
    active = (half.values > 0).nonzero()
    feature = half.indices[half.values > 0]
    n, t = active[:, 0], active[:, 1]
    n_regions = int(half.region.max()) + 1
    language_of = torch.zeros(n_regions, dtype=torch.int64)
    language_of[half.region.flatten()] = half.languages.flatten()
    # For each criterion: the number of units (regions or positions) by language, and of those where a feature fires.
    early = half.offset[n, t] < START
    per_region = torch.bincount(language_of, minlength=L)
    counts = {
        "region": (per_region, _count(half.region[n, t], feature, language_of, d_sae, L)),
        "position": (
            torch.bincount(half.languages[half.mask], minlength=L),
            torch.bincount(feature * L + half.languages[n, t], minlength=d_sae * L).reshape(d_sae, L),
        ),
        "start": (per_region, _count(half.region[n, t][early], feature[early], language_of, d_sae, L)),
    }
    found = []
    for criterion, (units, fired) in counts.items():
        bits = information(fired, units)
        for language in range(L):
            best = int(bits[:, language].argmax())
            found.append((language, criterion, best, float(bits[best, language])))
    return sorted(found)


def _count(region: Tensor, feature: Tensor, language_of: Tensor, d_sae: int, L: int) -> Tensor:
    """In how many regions of each language a feature fires: [d_sae, L]. region, feature: a pair for each firing."""
    once = torch.unique(region * d_sae + feature)
    cell = once % d_sae * L + language_of[once // d_sae]
    return torch.bincount(cell, minlength=d_sae * L).reshape(d_sae, L)


def information(fired: Tensor, units: Tensor) -> Tensor:
    """The mutual information, in bits, of "this feature fires" and "this is the language": [d_sae, L].

    fired [d_sae, L]: in how many units of each language a feature fires. units [L]: how many units there are. Zero for
    a feature that fires less often in the language than elsewhere.
    """
    fired, units = fired.double(), units.double()
    n = units.sum()
    fires, n_fires = fired, fired.sum(dim=1, keepdim=True)
    table = {
        (1, 1): fires,
        (1, 0): n_fires - fires,
        (0, 1): units - fires,
        (0, 0): n - units - n_fires + fires,
    }
    of_feature, of_language = {1: n_fires, 0: n - n_fires}, {1: units, 0: n - units}
    bits = torch.zeros_like(fired)
    for (f, g), count in table.items():
        expected = of_feature[f] * of_language[g] / n
        bits += torch.where(count > 0, count / n * torch.log2(count / expected.clamp_min(1e-300)), 0)
    return torch.where(fires * n > n_fires * units, bits.clamp_min(0), 0)


def _figures_of_mark(half: _Half, language: int, feature: int) -> dict[str, Any]:
    """How well a feature marks a language, on the half on which it was not chosen.

    recall, false_alarms: the share of the language's regions, and of the other regions, in which it fires. auc: the
    area under the ROC curve of this yes or no, (1 + recall - false_alarms) / 2. active_share, active_elsewhere: the
    share of positions at which it is active in the language's regions, and in others. In the language's regions:
    flicker: how often it switches on or off in 100 positions; rate_by_offset: the share of regions in which it is
    active at an offset; first_by_offset: the share in which it first fires there; median_first: the median of that
    offset. at_once, at_once_elsewhere: the share of the language's regions after a switch, and of other such regions,
    in which it fires in the first START positions. again: how many times more it fires in a region of the language in
    which it fired at once, the mean.
    """
    fires, here = half.fires(feature), half.languages == language
    seen = half.mask & here
    n_regions = int(half.region.max()) + 1
    fired_in = torch.zeros(n_regions, dtype=torch.bool)
    fired_in[half.region[fires]] = True
    of_language = torch.zeros(n_regions, dtype=torch.bool)
    of_language[half.region[here]] = True
    recall = _ratio(fired_in[of_language].sum(), of_language.sum())
    false_alarms = _ratio(fired_in[~of_language].sum(), (~of_language).sum())
    pairs = seen[:, 1:] & seen[:, :-1] & (half.region[:, 1:] == half.region[:, :-1])
    changes = (fires[:, 1:] != fires[:, :-1]) & pairs
    first = torch.full((n_regions,), half.n_offsets).scatter_reduce(0, half.region[fires], half.offset[fires], "amin")
    is_first = fires & (half.offset == first[half.region])
    after = seen & half.after_switch
    firsts = half.offset[is_first & after]
    times = torch.bincount(half.region[fires], minlength=n_regions)
    switched = torch.zeros(n_regions, dtype=torch.bool)
    switched[half.region[half.after_switch]] = True
    at_once = switched & (first < START)
    here_at_once, elsewhere = at_once & of_language, switched & ~of_language
    return {
        "recall": recall,
        "false_alarms": false_alarms,
        "auc": None if recall is None or false_alarms is None else (1 + recall - false_alarms) / 2,
        "active_share": _ratio(fires[seen].sum(), seen.sum()),
        "active_elsewhere": _ratio(fires[half.mask & ~here].sum(), (half.mask & ~here).sum()),
        "flicker": _ratio(100 * changes.sum(), pairs.sum()),
        "rate_by_offset": half.by_offset(fires, after),
        "first_by_offset": half.by_offset(is_first, after),
        "median_first": float(firsts.double().quantile(0.5)) if len(firsts) else None,
        "at_once": _ratio(here_at_once.sum(), (switched & of_language).sum()),
        "at_once_elsewhere": _ratio((at_once & elsewhere).sum(), elsewhere.sum()),
        "again": _ratio((times - 1)[here_at_once].sum(), here_at_once.sum()),
    }


def _means(marks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Criterion -> the figures of its marks, each a mean over the languages that have it."""
    means: dict[str, dict[str, Any]] = {}
    for criterion in dict.fromkeys(mark["criterion"] for mark in marks):
        of_criterion = [mark for mark in marks if mark["criterion"] == criterion]
        mean: dict[str, Any] = {}
        for name, value in of_criterion[0].items():
            if isinstance(value, list):
                mean[name] = [_mean(values) for values in zip(*(mark[name] for mark in of_criterion), strict=True)]
            elif name not in ("language", "criterion", "feature"):
                mean[name] = _mean([mark[name] for mark in of_criterion])
        mean["rate_start"] = _mean(mean["rate_by_offset"][:START])
        mean["rate_later"] = _mean(mean["rate_by_offset"][START:])
        means[criterion] = mean
    return means


def _carried(
    sae: ContextualSAE, half: _Half, marks: list[tuple[int, str, int, float]], names: Sequence[str], windows: Any
) -> dict[str, Any]:
    """Where c comes from after a switch, by offset, as shares of c that sum to one (see `csae.attribution`).

    from_start: from the first START positions of the region. from_region: from the whole region. from_before: from the
    regions before the switch. even_from_start: what from_start would be if all earlier positions had equal shares.
    marks: for each mark, over the regions of its language in which it has fired before the offset. share_by_offset: the
    share of all its firings in the region. first_by_offset: the share of its first firing. other_by_offset: the mean
    share of a feature that was active beside its first firing, from that position.
    """
    T = half.offset.shape[1]
    n = len(windows)
    shares = {name: torch.zeros(n, T) for name in ("from_start", "from_region", "from_before", "even_from_start")}
    of_mark = [
        {name: torch.zeros(n, T) for name in ("share_by_offset", "first_by_offset", "other_by_offset")} for _ in marks
    ]
    fired_before = [torch.zeros(n, T, dtype=torch.bool) for _ in marks]
    carries = torch.zeros(n, T, dtype=torch.bool)
    position = torch.arange(T)
    for w in windows:
        batch = half.source.read([half.windows[w]])
        device = sae.W_dec.device
        found = attribute(sae, batch.acts[0].to(device), batch.mask[0].to(device), batch.documents[0].to(device))
        share = found.share.cpu()  # [T, T, k]
        by_position = share.sum(dim=-1)
        same = half.region[w][:, None] == half.region[w][None, :]  # [T, T]
        early = half.offset[w] < START
        shares["from_start"][w] = (by_position * (same & early)).sum(dim=1)
        shares["from_region"][w] = (by_position * same).sum(dim=1)
        shares["from_before"][w] = (by_position * ~same).sum(dim=1)
        visible = half.mask[w] & (position[None, :] < position[:, None])
        shares["even_from_start"][w] = (visible & same & early).sum(dim=1) / visible.sum(dim=1).clamp_min(1)
        carries[w] = (found.output.c.norm(dim=-1) > 0).cpu() & half.mask[w]
        values, indices = half.values[w], half.indices[w]
        for i, (language, _, feature, _) in enumerate(marks):
            slots = (indices == feature) & (values > 0)  # [T, k]
            others = (values > 0) & ~slots
            fires = slots.any(dim=-1) & (half.languages[w] == language)
            in_region = same & fires[None, :] & (position[None, :] < position[:, None])
            fired_before[i][w] = in_region.any(dim=1)
            of_mark[i]["share_by_offset"][w] = ((share * slots).sum(dim=-1) * in_region).sum(dim=1)
            first = in_region.long().argmax(dim=1)  # [T]: where it fired first, for each position after
            at_first = share[position, first]  # [T, k]
            of_mark[i]["first_by_offset"][w] = (at_first * slots[first]).sum(dim=-1)
            mean = (at_first * others[first]).sum(dim=-1) / others[first].sum(dim=-1).clamp_min(1)
            of_mark[i]["other_by_offset"][w] = mean
    after = carries & half.after_switch[:n]
    result: dict[str, Any] = {"windows": n}
    result |= {name: half.by_offset(amount, after) for name, amount in shares.items()}
    result["marks"] = [
        {"language": names[language], "criterion": criterion, "feature": feature}
        | {name: half.by_offset(amount, after & where) for name, amount in amounts.items()}
        for (language, criterion, feature, _), amounts, where in zip(marks, of_mark, fired_before, strict=True)
    ]
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else None


def _ratio(total: Tensor, count: Tensor) -> float | None:
    return float(total) / float(count) if count > 0 else None


def _ratios(total: Tensor, count: Tensor) -> list[float | None]:
    return [_ratio(*pair) for pair in zip(total, count, strict=True)]
