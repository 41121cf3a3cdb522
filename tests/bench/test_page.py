"""The page of the evidence: what it says follows from the figures, any part may be missing, and it fetches nothing."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from csae.bench.evidence import page, summary
from csae.bench.evidence.figures import FIGURES
from csae.bench.evidence.page import PARTS, write_figures, write_page
from csae.bench.evidence.summary import ARCHS, Spread
from csae.pages import rendering

VOID = {"meta", "br", "hr", "img", "input", "link"}
# FVU at k = 16, parameters; others follow by a power of k.
AT_16 = {
    "topk": (0.200, 2_660_000),
    "topk-wide": (0.170, 4_870_000),
    "contextual": (0.155, 4_868_000),
    "contextual-past": (0.164, 4_868_000),
    "batch-topk": (0.196, 2_660_000),
    "temporal-features": (0.150, 3_990_000),
    "temporal-sae": (0.210, 2_660_000),
}


def run(arch: str, k: int, seed: int, layer: int = 12, corpus: str = "english", k_mem: int | None = None, **more: Any):
    fvu, n_params = AT_16[arch]
    fvu *= (k / 16) ** -0.42 * (1 + 0.01 * seed) * (1 + 0.1 * (k_mem is not None) * (4 / (k_mem or 4)) ** 0.5)
    fvu *= {12: 1.0}.get(layer, 0.8)
    contextual = arch.startswith("contextual")
    side = {"contextual": 40.0}.get(arch, 0.0)
    parts = {"bits_indices": 6.1 * k, "bits_values": 3.9 * k, "bits_side": side}
    bits = parts | {"bits_per_token": 10.0 * k + side, "fvu": fvu, "fvu_quantised": 1.01 * fvu}
    entry = {
        "name": f"{corpus}-layer{layer}-{arch}-{k_mem}-k{k}-seed{seed}", "arch": arch, "k": k, "corpus": corpus,
        "layer": layer, "seed": seed, "k_mem": k_mem, "query": None, "d_sae": 4223 if arch == "topk-wide" else 2304,
        "n_params": n_params, "model": "SmolLM2", "tokens": 838_000, "fvu": fvu, "fvu_exact": fvu, "l0": k - 0.1,
        "dead": 0.03, "silent": 0.05,
        "loss_recovered": 1 - 0.4 * fvu, "bits_per_token": bits["bits_per_token"], "bits": bits,
        "note": "a dense part <beside> it" if arch == "temporal-features" else None,
    }  # fmt: skip
    if contextual:
        entry |= {"query": "past" if arch.endswith("past") else "current", "fvu_sweeps": fvu / 1.01, "gap": 0.01}
    if arch == "contextual":
        bits["bits_side_entropy"] = 21.0
    return entry | more


def runs(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        found += [run(arch, k, seed) for arch in list(ARCHS)[:4] for k in (8, 16, 32)]
        found += [run(arch, 16, seed) for arch in list(ARCHS)[4:]]
        found += [run("topk", k, seed) for k in (12, 24, 48)]
    found += [run("contextual", 16, seeds[0], k_mem=k_mem) for k_mem in (1, 4)]
    found += [run(arch, 16, seeds[0], 20, corpus) for corpus in ("english", "multi") for arch in list(ARCHS)[:4]]
    return found


def quartiles(median: float) -> dict[str, float]:
    return {"mean": median, "quarter": median / 2, "median": median, "three_quarters": 2 * median}


def evidence(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    of_runs = runs(seeds)
    main = [entry for entry in of_runs if entry["layer"] == 12]
    headline = []
    for entry in main:
        if entry["arch"].startswith("contextual") and entry["k_mem"] is None:
            row = {name: entry[name] for name in ("arch", "query", "k", "model", "corpus", "layer", "seed", "fvu")}
            for label, times in (("topk", 1.84), ("wide", 1.25)):
                row |= {label: times * entry["k"], f"{label}_ratio": times, f"{label}_beyond": entry["k"] == 32}
            headline.append(row)
    synthetic = []
    for length in (1, 4, 16, 64):
        for query in (None, "current"):
            fires = length * 0.8 if query is None else min(length, 1.5)
            figures = {name: 0.4 for name in ("fires_off", "token_found", "token_off", "region_cosine", "token_cosine")}
            synthetic.append(
                figures
                | {
                    "arch": "topk" if query is None else "contextual",
                    "region_length": length,
                    "query": query,
                    "d_in": 128,
                    "seed": 0,
                    "k": 4,
                    "d_sae": 192,
                    "steps": 1000,
                }
                | {"fires_per_region": fires, "versions_per_region": fires, "found": 0.9, "found_at_start": 0.8}
                | {"fvu": 0.3 if query is None else 0.3 - 0.04 * length**0.4, "fires_at": [0.5] * length}
                | {"first": {"fires_per_region": fires}, "carried": None if query is None or length == 1 else 0.9}
            )
    synthetic += [run | {"seed": 1, "fires_per_region": run["fires_per_region"] + 1} for run in synthetic[-2:]]
    synthetic.append(synthetic[-1] | {"seed": 0, "d_in": 64, "fvu": 0.777})
    offsets = [0.02 + 0.5 / (1 + at) for at in range(128)]
    level = [0.4 + 0.05 * (at % 3) for at in range(128)]
    switches, power = [], []
    for entry in main:
        contextual = entry["arch"].startswith("contextual")
        if entry["k"] == 16 and entry["k_mem"] is None and entry["arch"] in list(ARCHS)[:4]:
            mark = {"recall": 0.9, "false_alarms": 0.02, "active_share": 0.1 if contextual else 0.45, "flicker": 12.0}
            mark |= {"rate_by_offset": [None, *(offsets if contextual else level)], "median_first": 2.0}
            mark |= {"rate_start": 0.3, "rate_later": 0.05 if contextual else 0.42}
            energy = {"acts": [1.0] * 128, "code": offsets if contextual else level}
            readable = {"chance": 0.2, "acts": {"accuracy": 0.97}, "code": {"accuracy": 0.6}}
            if contextual:
                energy, readable = energy | {"carried": level}, readable | {"carried": {"accuracy": 0.95}}
            # As switches.measure gives it: the SAE's own arch, which doesn't tell "contextual-past" from "contextual".
            own = "contextual" if contextual else "topk"
            switches.append({
                "name": entry["name"], "arch": own, "names": ["en", "de", "fr", "es", "ja"], "start": 8, "k": 16,
                "flicker": {"changes_per_active": 1.5, "mean_run": 1.4}, "energy": energy, "readable": readable,
                "mean_marks": {"region": mark}, "carried": None,
            })  # fmt: skip
        if entry["k"] == 16 and contextual:
            less = 1 if entry["k_mem"] is None else 0.4
            power.append({
                **{name: entry[name] for name in ("name", "arch", "query", "k", "k_mem", "fvu")}, "c_alone": 0.6,
                "look_back": {"0": 0.27, "1": 0.25, "4": 0.22, "16": 0.19, "64": 0.17, "256": entry["fvu"]},
                "c": {"own": entry["fvu"], "zero": 0.3, "other window": 0.6},
                "read": {"own": entry["fvu"], "shuffled": 0.2, "other window": 0.4},
                "far": {"own": entry["fvu"], "shuffled": 0.17, "other window": 0.2, "empty": 0.18},
                "pairs": {
                    "explained": 0.9, "needed": quartiles(180 * less), "available": quartiles(1800 * less),
                    "needed_of_available": quartiles(0.1), "left_over": 0.2, "against": 0.1,
                },
                "distance": {"median": 12, "within": {"1": 0.1, "8": 0.4, "256": 1.0}}, "parts_error": 1e-6,
            })  # fmt: skip
    predicted = {"previous": 0.31, "last_1": 0.2, "last_2": 0.22, "last_4": 0.24, "last_8": 0.25, "last_16": 0.26}
    predicted |= {"mean": -0.05, "last_16_and_mean": 0.28}
    dimensions = {"participation_ratio": 18.6, "components_90": 43.2, "two_nn": 3.4}
    redundancy = [
        {
            "corpus": corpus, "layer": layer,
            "predicted": {"r2": predicted, "components": 64, "components_variance": 0.66},
            "dimension": {"window": dimensions, "shuffled": {n: 1.3 * v for n, v in dimensions.items()}, "windows": 20},
        }
        for corpus, layer in (("english", 12), ("english", 20), ("multi", 12))
    ]  # fmt: skip
    about: dict[str, Any] = {"date": "2026-11-23", "model": "SmolLM2", "device": "cpu", "versions": {"torch": "2.13"}}
    about["budget"] = {"d_sae": 2304, "tokens": 840_000, "distinct": 420_000, "n_ctx": 256}
    longer = [
        {
            **{name: entry[name] for name in ("name", "arch", "k", "k_mem")}, "n_ctx": 1024, "trained_on": 256,
            "stretches": [
                {"first": at, "last": at + 255, "fvu": entry["fvu"] + 1e-5 * at} for at in range(0, 1024, 256)
            ],
        }
        for entry in main
        if entry["k"] == 16 and entry["seed"] == seeds[0] and entry["arch"] in ("topk", "contextual", "contextual-past")
        if entry["k_mem"] is None
    ]  # fmt: skip
    return {
        "about": about, "long": longer,
        "runs": of_runs, "headline": headline, "switches": switches, "power": power, "redundancy": redundancy,
        "synthetic": synthetic,
    }  # fmt: skip


class Page(HTMLParser):
    """Tags in order, whether they are balanced, ids and references, and the text outside of figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.cells: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"[ \n]+", " ", "".join(self.words))  # not the spaces that hold a number and its unit

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells = []
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, content) for name, content in attrs]
        self.ids += [str(content) for name, content in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag == "tr":
            name, *cells = self.cells
            self.rows.setdefault(name.strip(), [cell.strip(" \n") for cell in cells])

    def handle_data(self, data: str) -> None:
        if not {"svg", "style"} & set(self.open):
            self.words.append(data)
            if self.cells and {"td", "th"} & set(self.open):
                self.cells[-1] += data


def written(tmp_path: Path, content: dict[str, Any]) -> str:
    write_page(tmp_path / "report.html", content)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not drawn: that takes most of the time."""
    monkeypatch.setattr(page, "inline_svg", lambda figure, label, series: "<svg></svg>")


def test_a_full_page_is_whole_and_fetches_nothing(tmp_path):
    html = written(tmp_path, evidence())
    page = Page(html)
    assert html.count("<svg") == len(FIGURES)
    assert "Not in this page" not in page.text
    assert len(html) < 5_000_000
    assert len(page.ids) == len(set(page.ids)), "ids of two figures clash"
    for tag, name, content in page.attributes:
        assert tag not in ("link", "iframe", "object", "embed", "script"), tag
        assert name != "src"
        if name in ("href", "xlink:href", "aria-labelledby"):
            assert str(content).removeprefix("#") in page.ids, content
            assert name == "aria-labelledby" or str(content).startswith("#")
    for reference in re.findall(r"url\(([^)]*)\)", html):
        assert reference.removeprefix("#") in page.ids
    assert not re.search(r"@import|fetch\(|XMLHttpRequest", html)
    assert set(re.findall(r"https?://[^\s\"'<>)]+", html)) <= {"http://www.w3.org/1999/xlink"}
    assert "#0101" not in html, "a placeholder was left"
    assert html == written(tmp_path, evidence()), "the same evidence should give the same page"


def test_what_it_says_follows_from_the_figures(tmp_path, undrawn):
    page = Page(written(tmp_path, evidence()))
    text = page.text
    assert "an SAE that looks back leaves 22.5\u00a0% less variance unexplained than a per-token SAE, and" in text
    assert page.rows["variance unexplained, against TopK"] == ["22.5\u00a0% less ahead", "18.0\u00a0% less ahead"]
    assert page.rows["variance unexplained, against Temporal Features (TFA)"][0] == "3.3\u00a0% more behind"
    assert page.rows["loss recovered, against TopK"][0].endswith("ahead")
    assert page.rows["features that TopK needs for the same FVU, equal d_sae"] == ["1.84 times as many ahead"] * 2
    # Of TopK's curve, log FVU from k = 24 to k = 32 at the FVU of the strict form; ten bits a feature.
    needed = 240 + 80 * math.log(0.164 / (0.2 * 1.5**-0.42)) / (-0.42 * math.log(32 / 24))
    fewer = f"{100 * (1 - 160 / needed):.1f}\u00a0% fewer ahead"
    assert page.rows["bits per token at the same FVU, against TopK"][1] == fewer
    assert (
        "behind in 2 of 20 comparisons: variance unexplained, against Temporal Features (TFA) (contextual: 3.3" in text
    )
    assert "0.1565 (0.1550–0.1581)" in text
    assert "a dense part <beside> it" in text, "text never becomes markup"
    assert "reads the true past, which a code does not hold" in text
    assert "is 1.0\u00a0% above that in sweeps" in text
    assert "29.4" in text, "1.84 times 16 features"
    assert "58.9*" in text, "beyond the k that were measured"
    assert (
        "51.7 (51.2–52.2) times a region in the TopK SAE (at least once in 90\u00a0% of the regions; FVU 0.300)" in text
    )
    assert "These are means over 2 seeds, with the least and the greatest." in text
    assert "0.777" in text, "crowded features"
    assert (
        "Remembering 4 (72 pairs explain c) leaves 10.0\u00a0% more variance unexplained than remembering all" in text
    )
    assert "contextual, strict 10\u00a0% (30\u00a0% in the first 8 after a switch, 5\u00a0% later)" in text


def test_a_contextual_sae_that_is_worse_is_said_to_be(tmp_path, undrawn):
    content = evidence()
    for entry in content["runs"]:
        entry["fvu"] *= 2 if entry["arch"].startswith("contextual") else 1
    text = Page(written(tmp_path, content)).text
    assert "leaves 55.0\u00a0% more variance unexplained than a per-token SAE, and 82.4\u00a0% more" in text
    assert "(contextual: 55.0\u00a0% more)" in text.split("Where it falls short")[1]


def test_seeds_that_differ_are_left_open(tmp_path, undrawn):
    content = evidence()
    for entry in content["runs"]:
        if entry["arch"] == "contextual":
            entry["fvu"] = 0.2 * (0.99, 1.03, 0.98)[entry["seed"]]
    text = Page(written(tmp_path, content)).text
    assert "does no better or worse for sure" in text
    assert re.search(r"less \([\d.]+\xa0% less to [\d.]+\xa0% more over 3 seeds\) open", text)


def test_one_seed_is_said(tmp_path, undrawn):
    text = Page(written(tmp_path, evidence((0,)))).text
    assert "one seed, so no spread is known" in text
    assert "22.5\u00a0% less variance" in text
    assert "over 1 seeds" not in text


@pytest.mark.parametrize("part", ["about", "runs", "headline", "synthetic", "switches", "redundancy", "power", "long"])
def test_any_part_may_be_missing(tmp_path, undrawn, part):
    content = evidence()
    del content[part]
    page = Page(written(tmp_path, content))
    if part != "about":
        assert f"partial run. Not in it: {PARTS[part]}." in page.text
        assert "Not in this page: " in page.text
    Page(written(tmp_path, {part: evidence()[part]}))


def test_a_run_that_was_stopped(tmp_path, undrawn):
    """After some of the SAEs there is a page, and with any one arch missing."""
    whole = evidence((0,))
    for count in range(0, len(whole["runs"]), 7):
        assert "</html>" in written(tmp_path, whole | {"runs": whole["runs"][:count], "headline": []})
    for arch in {entry["arch"] for entry in whole["runs"]}:
        left = [entry for entry in whole["runs"] if entry["arch"] != arch]
        assert "</html>" in written(tmp_path, whole | {"runs": left})


def test_nothing_at_all(tmp_path):
    html = written(tmp_path, {})
    assert "Does an SAE that looks back explain more" in Page(html).text
    assert "<svg" not in html
    assert write_figures(tmp_path, {}) == []


def without(content: Any, names: set[str]) -> Any:
    """The same with None for the numbers and lists of these names, wherever they are."""
    if isinstance(content, dict):
        return {name: None if name in names else without(inner, names) for name, inner in content.items()}
    return [without(inner, names) for inner in content] if isinstance(content, list) else content


def test_none_anywhere(tmp_path, undrawn):
    whole = evidence()
    names: set[str] = set()

    def collect(content: Any) -> None:
        if isinstance(content, dict):
            names.update(content)
            for inner in content.values():
                collect(inner)
        elif isinstance(content, list):
            for inner in content:
                collect(inner)

    collect({name: part for name, part in whole.items() if name != "about"})
    names -= {
        "arch",
        "k",
        "seed",
        "region_length",
        "model",
        "corpus",
        "layer",
    }  # what a thing is, not what was measured
    figures = {
        "fvu",
        "bits",
        "loss_recovered",
        "gap",
        "topk_ratio",
        "fires_per_region",
        "mean_marks",
        "energy",
        "readable",
    }
    figures |= {"look_back", "pairs", "distance", "predicted", "r2", "dimension", "rate_by_offset", "n_params", "name"}
    assert figures <= names
    for name in sorted(figures):
        Page(written(tmp_path, without(copy.deepcopy(whole), {name})))
    html = written(tmp_path, without(whole, names))
    assert "<svg" not in html
    Page(html)


def test_figures_as_files(tmp_path):
    files = write_figures(tmp_path / "figures", evidence())
    assert {path.stem for path in files} == {"headline", *FIGURES}
    assert {path.suffix for path in files} == {".svg", ".png"}
    svg = (tmp_path / "figures" / "headline.svg").read_text()
    assert "SmolLM2, layer 12" in svg
    assert "#0101" not in svg
    assert "var(--" not in svg
    for name in ARCHS.values():
        assert name in svg
    assert (tmp_path / "figures" / "headline.png").read_bytes().startswith(b"\x89PNG")


def test_colours_are_those_of_the_style_sheets():
    css = "".join(
        (Path(module.__file__).parent / "templates" / name).read_text()
        for module, name in ((rendering, "page.css"), (page, "evidence.css"))
    )
    for number, colour in enumerate(page.LIGHT.series, start=1):
        assert f"--series-{number}: {colour}" in css
    assert f"--ink: {page.LIGHT.ink}" in css


def test_spread_and_ratio_over_seeds():
    assert summary.spread([1.0, None, 4.0]) == Spread(2.5, 1.0, 4.0, 2)
    assert summary.spread([None]) is None
    one = [{"seed": 0, "fvu": 1.0}, {"seed": 1, "fvu": 3.0}, {"seed": 2, "fvu": 9.0}]
    other = [{"seed": 1, "fvu": 4.0}, {"seed": 0, "fvu": 2.0}, {"seed": 3, "fvu": 1.0}]
    assert summary.ratio(one, other, "fvu") == Spread(0.625, 0.5, 0.75, 2)
    assert summary.value({"a": {"b": float("nan")}}, "a", "b") is None
    assert summary.value({"a": {"b": True}}, "a", "b") is None


def test_setting_is_where_most_runs_are():
    assert summary.setting(runs()) == ("SmolLM2", "english", 12, 16)
    assert summary.setting([]) == (None, None, None, None)


def test_bits_at_the_same_fvu():
    # log FVU falls by log 4 over 100 bits: FVU 0.2 is half way.
    assert summary.crossing([(200.0, 0.1), (100.0, 0.4)], 0.2) == pytest.approx(150)
    assert summary.crossing([(200.0, 0.1), (100.0, 0.4)], 0.05) is None
    of = [{"model": "m", "corpus": "c", "layer": 1, "seed": 0, "k_mem": None}]
    curve = [
        of[0] | {"arch": "topk", "k": k, "bits": {"bits_per_token": b, "fvu_quantised": f}}
        for k, b, f in ((8, 100.0, 0.4), (16, 200.0, 0.1))
    ]
    own = of[0] | {"arch": "contextual", "k": 8, "bits": {"bits_per_token": 120.0, "fvu_quantised": 0.2}}
    where = summary.Setting("m", "c", 1, 8)
    assert summary.bits_ratio([*curve, own], where, "contextual", "topk").mean == pytest.approx(0.8)
