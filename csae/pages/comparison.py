"""The top of a demo's page: how much each SAE misses, in a table and as curves over training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from csae.pages.rendering import INK, SERIES, SOFT, figure_style, inline_svg
from csae.run import METRICS

POINTS = 300  # of a curve: more can't be seen
SMOOTHING = 0.02  # of the steps: the width of the running mean
TICKS = [power * digit for power in (0.001, 0.01, 0.1, 1) for digit in (1, 1.5, 2, 3, 4, 5, 7)]


def comparison(results: dict[str, Any], runs: dict[str, Path]) -> dict[str, Any]:
    """What comparison.html shows.

    results: what the demo writes to results.json, with one contextual SAE. runs: the folder of each run, by the `arch`
    that it has in results.
    """
    saes = results["saes"]
    return {
        "results": results,
        "saes": saes,
        "contextual": next(sae for sae in saes if "fvu_exact" in sae),
        "others": [sae for sae in saes if "fvu_exact" not in sae],
        "worst": max(sae["fvu"] for sae in saes),
        "with_lm": any(sae.get("loss_recovered") is not None for sae in saes),
        "curves": _curves({name: read_curve(run / METRICS) for name, run in runs.items()}, results),
    }


def read_curve(metrics: Path) -> tuple[list[int], list[float]]:
    """Tokens and FVU of a run's metrics.jsonl, as a running mean, about POINTS of them."""
    tokens, fvu = [], []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        if step["fvu"] is not None:  # a step that was left out
            tokens.append(step["tokens"])
            fvu.append(step["fvu"])
    width = max(1, round(SMOOTHING * len(fvu)))
    stride = max(1, len(fvu) // POINTS)
    kept = sorted({*range(0, len(fvu), stride), len(fvu) - 1})
    means = [sum(fvu[max(0, at + 1 - width) : at + 1]) / min(width, at + 1) for at in kept]
    return [tokens[at] for at in kept], means


def _curves(curves: dict[str, tuple[list[int], list[float]]], results: dict[str, Any]) -> str:
    """FVU against tokens for each run, and its held-out FVU as a dot at the end: an <svg> element."""
    import matplotlib

    held_out = {sae["arch"]: sae["fvu"] for sae in results["saes"]}
    with matplotlib.rc_context(figure_style(INK, SOFT)):
        from matplotlib.figure import Figure  # no backend of a screen is touched
        from matplotlib.ticker import EngFormatter, NullFormatter, NullLocator

        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        axes = figure.subplots()
        lowest, highest = 1.0, 0.0
        for colour, (name, (tokens, fvu)) in zip(SERIES, curves.items(), strict=False):
            axes.plot(tokens, fvu, color=colour, linewidth=1.8, label=name)
            axes.plot(tokens[-1:], [held_out[name]], "o", color=colour, markersize=5, clip_on=False)
            settled = fvu[len(fvu) // 20 :]  # the first steps would take most of the height
            lowest, highest = min(lowest, held_out[name], *settled), max(highest, held_out[name], *settled)
        axes.set_yscale("log")
        axes.set_ylim(lowest * 0.95, highest * 1.05)
        ticks = [tick for tick in TICKS if lowest * 0.95 <= tick <= highest * 1.05]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("FVU")
        axes.grid(axis="y", color=SOFT, linewidth=0.4, alpha=0.4)
        axes.legend(frameon=False, loc="upper right")
        return inline_svg(figure, "FVU of each SAE against training tokens")
