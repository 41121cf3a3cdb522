"""The comparison on top of a demo's page: what it says, and that no text in it becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from csae.pages.comparison import POINTS, comparison, read_curve
from csae.pages.view_page import write_view

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028 <!--"


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._open.append(str(given.get("id") or tag))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        self.text[where] = self.text.get(where, "") + data
        if self.cells and self.cells[-1] and where in ("td", "th"):
            self.cells[-1][-1] += data.strip()


# What csae.pages.view.view gives for a text of one token that is left out, and another.
FIGURES = {"arch": "contextual", "k": 16, "d_sae": 2304, "fvu": 0.2, "fvu_beyond": None, "mean_run": 1, "new_in_run": 1}
FACTS = {
    "tokens": [NASTY, NASTY], "cuts": [], "left_out": [0], "threshold": 100, "new": [[], [7, 150]],
    "carried": [[], []], "gathered": [[], []], "rest": [[0, 0]] * 2, "parts": [[], []],
    "others": [[0, 0]] * 2, "remainder": [0, 0], "c": [0, 0], "missed": [0, 9],
    "rows": [7], "features": {}, "figures": FIGURES, "beside": None,
}  # fmt: skip
INDEX = {"data": NASTY, "tokens": 10, "names": {"7": [NASTY]}, "features": {}}
ABOUT = {"text": "a <b>text</b>", "run": "contextual", "beside": None, "model": "some/<model>", "place": "layer 12"}
ABOUT |= {"n_ctx": 256, "trained_on": 256, "whole": True}


def sae(arch: str, fvu: float, **more: Any) -> dict[str, Any]:
    common = {"k": 16, "d_in": 8, "d_sae": 2304, "n_params": 2_660_000, "l0": 15.9, "dead": 0.125, "tokens": 25_500}
    return {"arch": arch, "fvu": fvu, "tokens_per_s": 4321.0, **common, **more}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    saes = [
        sae("topk", 0.25),
        sae("topk-wide", 0.2, d_sae=4223, n_params=4_869_695),
        sae("contextual", 0.18, fvu_exact=0.18, fvu_sweeps=0.1782, sweeps=2, gap=0.0101, n_params=4_868_944),
    ]
    runs = {}
    for number, found in enumerate(saes):
        runs[found["arch"]] = tmp_path / found["arch"]
        runs[found["arch"]].mkdir()
        lines = [{"step": s, "tokens": (s + 1) * 2048, "fvu": 0.2 + 0.1 * number + 1 / (s + 1)} for s in range(700)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (runs[found["arch"]] / "metrics.jsonl").write_text(text)
    results = {
        "model": "some/<model>",
        "place": "layer 12 (resid.out:11)",
        "tokens": 838_000,
        "distinct_tokens": 419_000,
        "n_ctx": 256,
        "text": "a <b>text</b>",
        "seed": 0,
        "saes": saes,
    }
    return {"path": tmp_path / "report.html", "results": results, "runs": runs}


def written(inputs: dict[str, Any]) -> str:
    write_view(inputs["path"], ABOUT, FACTS, comparison(inputs["results"], inputs["runs"]), INDEX, {7: NASTY})
    return inputs["path"].read_text(encoding="utf-8")


def test_table_and_findings(inputs: dict[str, Any]) -> None:
    html = written(inputs)
    page = Page(html)
    head, *rows = page.cells
    assert head == ["SAE", "FVU", "exact FVU", "L0", "dead", "d_sae", "parameters", "tokens/s"]
    assert rows[0] == ["topk", "0.2500", "–", "15.9", "12.5\xa0%", "2,304", "2.66M", "4,321"]
    assert rows[2][:3] == ["contextual", "0.1800", "0.1800"]
    text = " ".join(re.sub(r"<[^>]+>", "", html).split())
    assert "misses 28.0 % less than topk" in text
    assert "misses 10.0 % less than topk-wide" in text
    assert "(the exact one is 1.0 % higher)" in text


def test_a_contextual_sae_that_is_worse_is_said_to_be(inputs: dict[str, Any]) -> None:
    contextual = inputs["results"]["saes"][2]
    contextual |= {"fvu": 0.3, "fvu_exact": 0.3, "gap": -0.02}
    text = " ".join(re.sub(r"<[^>]+>", "", written(inputs)).split())
    assert "misses 20.0 % more than topk," in text
    assert "misses 50.0 % more than topk-wide" in text
    assert "2.0 % lower)" in text


def test_loss_recovered(inputs: dict[str, Any]) -> None:
    for found, recovered in zip(inputs["results"]["saes"], [0.9, None, 0.95], strict=True):
        found |= {"loss_recovered": recovered, "ce_tokens": 2040}
    head, *rows = Page(written(inputs)).cells
    assert head[-1] == "loss recovered"
    assert [row[-1] for row in rows] == ["90.0\xa0%", "–", "95.0\xa0%"]


def test_text_never_becomes_markup(inputs: dict[str, Any]) -> None:
    page = Page(written(inputs))
    assert json.loads(page.text["data"]) == FACTS | {"about": ABOUT, "index": INDEX, "labels": {"7": NASTY}}
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert "b" not in tags
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_one_file_that_fetches_nothing(inputs: dict[str, Any]) -> None:
    html = written(inputs)
    names = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # namespaces are names
    assert set(re.findall(r"https?://[^\s\"'<>)]+", html)) <= names
    for tag, attrs in Page(html).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert "src" not in attrs, tag
        for reference in (attrs.get("href"), attrs.get("xlink:href")):
            assert reference is None or reference.startswith("#")
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest", html)
    assert len(html) < 200_000


def test_curves(inputs: dict[str, Any]) -> None:
    html = written(inputs)
    svg = html[html.index("<svg") : html.index("</svg>")]
    for number in (1, 2, 3):
        assert f"stroke: var(--series-{number})" in svg
    assert "#0101" not in svg, "a placeholder was left"
    assert "training tokens</text>" in svg
    assert html == written(inputs), "the same data should give the same page"


def test_read_curve(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    fvu = [1 / (step + 1) for step in range(1000)]
    file.write_text("".join(json.dumps({"tokens": 10 * (s + 1), "fvu": f}) + "\n" for s, f in enumerate(fvu)))
    tokens, means = read_curve(file)
    assert POINTS <= len(tokens) <= 2 * POINTS
    assert (tokens[0], tokens[-1]) == (10, 10_000)
    assert means[0] == 1
    assert means[-1] == pytest.approx(sum(fvu[-20:]) / 20)

    file.write_text(json.dumps({"tokens": 10, "fvu": 0.5}) + "\n")
    assert read_curve(file) == ([10], [0.5])
