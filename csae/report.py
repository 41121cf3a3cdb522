"""The page of a demo: the figures, the curves, and passages of text that a person can look into.

One HTML file that needs nothing else: style, script, data and picture are inside, and nothing is fetched.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csae.files import write_file
from csae.train import METRICS

POINTS = 300  # of a curve: more can't be seen
SMOOTHING = 0.02  # of the steps: the width of the running mean

# Colours in the picture are placeholders, which the page's style sheet gives a meaning in light and in dark.
INK, SOFT = "#010101", "#010102"
SERIES = ("#010111", "#010112", "#010113", "#010114")


def write_report(path: Path | str, results: dict[str, Any], runs: dict[str, Path], explained: dict[str, Any]) -> None:
    """Writes the page to `path`, whole or not at all.

    results: what demo puts in results.json. runs: the folder of each run, by its name, which is the arch in
    results. explained: what csae.passages.explain gives for the contextual one.
    """
    page = render(
        "report.html",
        results=results,
        saes=results["saes"],
        contextual=next(sae for sae in results["saes"] if "fvu_exact" in sae),
        others=[sae for sae in results["saes"] if "fvu_exact" not in sae],
        worst=max(sae["fvu"] for sae in results["saes"]),
        with_lm=any(sae.get("loss_recovered") is not None for sae in results["saes"]),
        curves=_curves({name: read_curve(run / METRICS) for name, run in runs.items()}, results),
        data=script_json(explained),
    )
    write_file(Path(path), lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))


def render(template: str, **content: Any) -> str:
    """A page from one of our templates. Text stays text, and a name that the template misses is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("csae.pages", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def read_curve(metrics: Path) -> tuple[list[int], list[float]]:
    """Tokens and FVU of a run's metrics.jsonl, as a running mean, at most POINTS of them."""
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
        ticks = [tick for tick in _TICKS if lowest * 0.95 <= tick <= highest * 1.05]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("FVU")
        axes.grid(axis="y", color=SOFT, linewidth=0.4, alpha=0.4)
        axes.legend(frameon=False, loc="upper right")
        return inline_svg(figure, "FVU of each SAE against training tokens", SERIES)


def figure_style(ink: str, soft: str) -> dict[Any, Any]:
    """Settings of matplotlib for the figures of a page: text and axes in the colour `ink`, frames in `soft`."""
    return {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": "csae",  # the same page from the same data
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": soft,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def inline_svg(figure: Any, label: str, series: Sequence[str]) -> str:
    """A matplotlib figure as an <svg> element.

    The placeholders INK and SOFT in it become the CSS variables --ink and --soft, those of `series` --series-1 ...
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening = (
        rf'<svg viewBox="\1" role="img" aria-label="{html.escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1, flags=re.DOTALL)
    for placeholder, variable in {INK: "ink", SOFT: "soft"}.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    for number, placeholder in enumerate(series, start=1):
        svg = svg.replace(placeholder, f"var(--series-{number})")
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)


_TICKS = [power * digit for power in (0.001, 0.01, 0.1, 1) for digit in (1, 1.5, 2, 3, 4, 5, 7)]


def script_json(content: Any) -> str:
    """JSON that can stand inside a <script> element, whatever text is in it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
