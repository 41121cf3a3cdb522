"""The explorer page: a text under an SAE. `csae view` writes it, and `csae demo` with a comparison of SAEs on top.

matplotlib draws the curve along the text, as SVG. The page's script draws the timelines on a canvas: a cell for each
feature and token is too much for SVG, and the script knows the reader's light or dark colours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csae.pages.rendering import INK, SERIES, SOFT, figure_style, inline_svg, script_json, write_html
from csae.pages.view import CARRIED, FRACTION

SMOOTHED = 15  # tokens that a point of the curve is the mean of
POINTS = 600  # of the curve: more can't be seen


def write_view(
    path: Path | str,
    about: dict[str, Any],
    facts: dict[str, Any],
    comparison: dict[str, Any] | None = None,
    index: dict[str, Any] | None = None,
    labels: dict[int, str] | None = None,
) -> None:
    """Writes the page to `path`, whole or not at all.

    Args:
        about: the names of the "text", the "run", the one "beside" it (or None) and the "model"; "place": which hook
            point; "n_ctx", "trained_on": the positions of a window here and in training (None where not known);
            "whole": whether that is all of the text.
        facts: what `csae.pages.view.view` gives.
        comparison: what `csae.pages.comparison.comparison` gives, to stand above the text.
        index: what `csae.pages.from_index.from_index` gives.
        labels: of features, by number (`csae.features.labels`).
    """
    write_html(
        path,
        "view.html",
        about=about,
        comparison=comparison,
        index=index,
        figures=facts["figures"],
        beside=facts["beside"] and facts["beside"]["figures"],
        n_tokens=len(facts["tokens"]),
        n_rows=len(facts["rows"]),
        n_windows=len(facts["cuts"]) + 1,
        carried=CARRIED,
        along=_along(facts),
        data=script_json(facts | {"about": about, "index": index, "labels": labels or {}}),
    )


def _along(facts: dict[str, Any]) -> str:
    """What is carried and what is missed along the text, as running means: an <svg> element."""
    import matplotlib

    curves = [("missed", facts["missed"], SERIES[1])]
    if facts["figures"]["arch"] == "contextual":
        curves.insert(0, ("carried", facts["c"], SERIES[2]))
    if facts["beside"]:
        curves.append(("missed, per token", facts["beside"]["missed"], SERIES[0]))
    left_out = set(facts["left_out"])
    counted = [t for t in range(len(facts["tokens"])) if t not in left_out]
    with matplotlib.rc_context(figure_style(INK, SOFT)):
        from matplotlib.figure import Figure  # no backend of a screen is touched
        from matplotlib.ticker import PercentFormatter

        figure = Figure(figsize=(5.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for name, of, colour in curves:
            values = [max(0.0, of[t] / FRACTION) for t in counted]
            stride = max(1, len(values) // POINTS)
            axes.plot(
                [t + 1 for t in counted[::stride]],
                running_mean(values, SMOOTHED)[::stride],
                color=colour,
                linewidth=1.6,
                label=name,
            )
        for cut in facts["cuts"]:
            axes.axvline(cut + 0.5, color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
        axes.set_xlim(1, len(facts["tokens"]))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(f"token (each point the mean of {SMOOTHED})")
        axes.grid(axis="y", color=SOFT, linewidth=0.4, alpha=0.4)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        return inline_svg(figure, "What is carried and what is missed, along the text")


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the `width` values around each, fewer at the ends."""
    sums = [0.0, *itertools.accumulate(values)]
    ends = [(max(0, at - width // 2), min(len(values), at + width // 2 + 1)) for at in range(len(values))]
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]
