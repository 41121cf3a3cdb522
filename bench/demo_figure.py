"""Draws the README's figure from the results of `make demo`: `python -m csae.bench.demo_figure`.

Left, the unexplained variance of each batch as training goes; right, on held-out text at the end.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

from csae.pages.comparison import read_curve
from csae.run import METRICS

COLOURS = {"topk": "#7f8c9b", "topk-wide": "#c08a3e", "contextual": "#2f6fb3"}
NAMES = {"topk": "TopK", "topk-wide": "TopK, as many parameters", "contextual": "contextual"}


def draw(demo: Path, out: Path) -> None:
    """`demo`: the folder of the demo. `out`: an .svg or .png file."""
    results = json.loads((demo / "results.json").read_text())
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[3, 2], layout="constrained")
    for place, sae in enumerate(results["saes"]):
        colour = COLOURS[sae["arch"]]
        tokens, fvu = read_curve(demo / "runs" / sae["arch"] / METRICS)
        curves.plot([count / 1000 for count in tokens], fvu, color=colour, label=NAMES[sae["arch"]])
        final = sae.get("fvu_exact", sae["fvu"])
        bars.barh(-place, final, color=colour)
        bars.annotate(f"{final:.3f}", (final, -place), xytext=(3, 0), textcoords="offset points", va="center")
    curves.set(xlabel="thousand tokens", ylabel="variance unexplained", title="training", ylim=(0, 0.6))
    curves.legend(frameon=False)
    bars.set(title="held-out text (contextual: exact)", xlim=(0, 0.25), xlabel="variance unexplained")
    bars.set_yticks([-place for place in range(len(results["saes"]))], [NAMES[sae["arch"]] for sae in results["saes"]])
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    first = results["saes"][0]
    figure.suptitle(f"{results['model']}, layer {results['layer']}, k = {first['k']}", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    draw(Path("demo"), Path(__file__).parent / "results" / "demo.svg")
