"""From a template and a matplotlib figure to one HTML file that needs nothing else and fetches nothing."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csae.files import write_file

# Colours in a figure are placeholders. The page's style sheet gives them a meaning in light and in dark.
INK, SOFT = "#010101", "#010102"
SERIES = ("#010111", "#010112", "#010113", "#010114")


def write_html(path: Path | str, template: str, packages: Sequence[str] = ("csae.pages",), **content: Any) -> None:
    """Renders a template to `path`, whole or not at all.

    Templates are those in the folders `templates` of `packages`. Text in the content stays text, and a name that the
    template misses is an error.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, "templates") for package in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
    )
    environment.globals |= {"percent": percent, "thousands": thousands}
    page = environment.get_template(template).render(**content)
    write_file(Path(path), lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def thousands(number: float) -> str:
    return f"{number:,.0f}"


def script_json(content: Any) -> str:
    """JSON that can stand inside a <script> element, whatever text is in it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


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


def inline_svg(figure: Any, label: str, series: Sequence[str] = SERIES) -> str:
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
