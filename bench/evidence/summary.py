"""Summaries of the evidence: means and spreads over seeds, and one SAE against another.

The functions take the lists of evidence.json. They return None where a figure is missing: evidence that was stopped has
gaps, and its page is written all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

TOPK, WIDE, CURRENT, PAST = "topk", "topk-wide", "contextual", "contextual-past"
ARCHS = {
    TOPK: "TopK",
    WIDE: "TopK, equal parameters",
    CURRENT: "contextual",
    PAST: "contextual, strict",
    "batch-topk": "BatchTopK",
    "temporal-features": "Temporal Features (TFA)",
    "temporal-sae": "Temporal SAE",
}
"""The names of the SAEs on the page, in their order."""


class Spread(NamedTuple):
    """The mean, the smallest and the largest of n values, one for each seed."""

    mean: float
    low: float
    high: float
    n: int


class Setting(NamedTuple):
    """Where most runs are; the first figures show this place."""

    model: str | None
    corpus: str | None
    layer: int | str | None
    """after how many blocks; or the name of a hook point"""
    k: int | None


def in_words(layer: int | str | None) -> str:
    """The place of an entry, for people: layer 12, mlp.out:11."""
    return layer if isinstance(layer, str) else f"layer {layer}"


def spread(values: Iterable[float | None]) -> Spread | None:
    given = [value for value in values if value is not None]
    return Spread(sum(given) / len(given), min(given), max(given), len(given)) if given else None


def value(entry: dict[str, Any], *path: str) -> float | None:
    """The number at a path of an entry; None where it isn't there, or isn't a finite number."""
    found: Any = entry
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if number else None


def ordered(archs: Iterable[str]) -> list[str]:
    """Each arch once, in the order of ARCHS; unknown ones last."""
    known = list(ARCHS)
    return sorted(set(archs), key=lambda arch: (known.index(arch) if arch in known else len(known), arch))


def arch_of(entry: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The arch of an entry as in `runs`. An entry alone can't tell "topk-wide" from "topk"."""
    for run in runs:
        if run.get("name") is not None and run.get("name") == entry.get("name"):
            return run["arch"]
    arch = str(entry.get("arch"))
    return PAST if arch == CURRENT and entry.get("query") == "past" else arch


def setting(runs: Sequence[dict[str, Any]]) -> Setting:
    """The model, corpus and layer with the most runs, and the k with the most kinds of SAE there."""
    places = Counter((run.get("model"), run.get("corpus"), run.get("layer")) for run in runs)
    if not places:
        return Setting(None, None, None, None)
    place = places.most_common(1)[0][0]
    here = [run for run in runs if (run.get("model"), run.get("corpus"), run.get("layer")) == place]
    archs = {k: len({run["arch"] for run in here if run["k"] == k}) for k in {run["k"] for run in here}}
    most = sorted(k for k, count in archs.items() if count == max(archs.values()))
    return Setting(*place, most[len(most) // 2])


def chosen(runs: Iterable[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """The runs with these fields. If k_mem is not among them: those without a k_mem."""
    fields = {"k_mem": None} | fields
    return [run for run in runs if all(run.get(name) == wanted for name, wanted in fields.items())]


def at(runs: Iterable[dict[str, Any]], where: Setting, **fields: Any) -> list[dict[str, Any]]:
    """The runs of a setting that have these fields; k is that of the setting, if not given."""
    place = {"model": where.model, "corpus": where.corpus, "layer": where.layer, "k": where.k}
    return chosen(runs, **{**place, **fields})


def curve(runs: Iterable[dict[str, Any]], x: Sequence[str], y: Sequence[str]) -> list[tuple[float, Spread]]:
    """For each k the mean of x and the spread of y over seeds, sorted by x. x, y: paths into an entry."""
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        a, b = value(run, *x), value(run, *y)
        if a is not None and b is not None:
            points.setdefault(run["k"], []).append((a, b))
    found = []
    for pairs in points.values():
        over = spread(b for _, b in pairs)
        assert over is not None
        found.append((sum(a for a, _ in pairs) / len(pairs), over))
    return sorted(found)


def ratio(one: Iterable[dict[str, Any]], other: Iterable[dict[str, Any]], *path: str) -> Spread | None:
    """A figure of one SAE divided by that of another, seed by seed."""
    by_seed = {run.get("seed"): value(run, *path) for run in other}
    pairs = [(value(run, *path), by_seed.get(run.get("seed"))) for run in one]
    return spread(a / b for a, b in pairs if a is not None and b)


def crossing(points: Sequence[tuple[float, float]], y: float) -> float | None:
    """The x at which a falling curve (x, y) reaches y, interpolated in log y; None outside of the curve."""
    points = sorted(points)
    for (x1, y1), (x2, y2) in pairwise(points):
        if y2 <= y <= y1 and y2 < y1:
            return x1 + (x2 - x1) * (math.log(y1) - math.log(y)) / (math.log(y1) - math.log(y2))
    return None


def bits_ratio(runs: Sequence[dict[str, Any]], where: Setting, arch: str, against: str) -> Spread | None:
    """Bits a token of one SAE at the setting's k, divided by those of another at the same FVU, seed by seed.

    None if the other SAE was not measured on both sides of that FVU.
    """
    ratios = []
    for run in at(runs, where, arch=arch):
        bits, fvu = value(run, "bits", "bits_per_token"), value(run, "bits", "fvu_quantised")
        others = chosen(runs, **{name: run.get(name) for name in ("model", "corpus", "layer", "seed")}, arch=against)
        points = [(value(other, "bits", "bits_per_token"), value(other, "bits", "fvu_quantised")) for other in others]
        if bits is not None and fvu is not None:
            needed = crossing([(x, y) for x, y in points if x is not None and y is not None], fvu)
            ratios.append(bits / needed if needed else None)
    return spread(ratios)
