"""The page of the evidence: report.html, and its figures as files.

One HTML file that needs nothing else. It is made from what evidence.json holds; a part that isn't there is left out,
and the page says so. No conclusion is written down beforehand: what a sentence says follows from the figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csae.bench.evidence import figures, summary
from csae.bench.evidence.figures import FIGURES, Colours
from csae.bench.evidence.summary import ARCHS, CURRENT, PAST, TOPK, WIDE, Spread, value
from csae.files import write_file
from csae.pages.rendering import INK, SOFT, figure_style, inline_svg, write_html

# The first four, and the ink, are those of csae/pages/templates/page.css in light; evidence.css has the others.
LIGHT = Colours("#1c2227", "#5d676f", ("#7b8790", "#ba6008", "#2868b2", "#3d8358", "#a8488f", "#8a7400", "#3a9cc4"))
PAPER = "#fcfcfa"
# The style sheet gives these a meaning in light and in dark.
PLACEHOLDERS = Colours(INK, SOFT, tuple(f"#01011{number}" for number in range(1, 1 + len(ARCHS))))
PNG_DPI = 160
PARTS = {
    "runs": "the trained SAEs",
    "headline": "how many features a per-token SAE needs",
    "long": "windows longer than those trained on",
    "synthetic": "the made-up windows",
    "switches": "the language switches",
    "redundancy": "the redundancy of the raw activations",
    "power": "what the look-back leans on",
}
BASELINES = [arch for arch in ARCHS if arch not in (TOPK, WIDE, CURRENT, PAST)]


class Finding(NamedTuple):
    """A comparison of a contextual SAE with another, and what it amounts to."""

    what: str
    arch: str
    verdict: str
    """ahead, behind or open (seeds differ in it)"""
    text: str


def write_page(path: Path | str, evidence: dict[str, Any]) -> None:
    """Writes report.html to `path`, whole or not at all.

    evidence: what evidence.json holds: about, runs and headline (see grid.run, grid.headline), synthetic (see
    synthetic.run), and lists of what switches, redundancy, power and long_windows (`long`) measure, each entry with
    the name, arch, corpus or layer that it is of. Any of them may be missing.
    """
    runs = evidence.get("runs") or []
    where = summary.setting(runs)
    found = findings(evidence)
    write_html(
        path,
        "evidence.html",
        packages=("csae.bench.evidence", "csae.pages"),
        claim=claim(evidence),
        where=where,
        about=flat(evidence.get("about") or {}),
        seeds=len({run.get("seed") for run in summary.at(runs, where)}),
        tokens=next((value(run, "tokens") for run in runs), None),
        missing=[label for name, label in PARTS.items() if not evidence.get(name)],
        findings=found,
        svgs={name: _svg(evidence, name) for name in FIGURES},
        middle=middle(evidence),
        needed=needed(evidence),
        gaps=gaps(evidence),
        longer=longer_rows(evidence),
        bits=bits_rows(evidence),
        synthetic=synthetic_rows(evidence),
        switches=switch_rows(evidence),
        redundancy=evidence.get("redundancy") or [],
        power=power_rows(evidence),
        k_mem=k_mem_rows(evidence),
        labels=ARCHS,
        number=number,
        percent=percent,
        value=value,
        changed=changed,
        key=key,
    )


def write_figures(folder: Path | str, evidence: dict[str, Any]) -> list[Path]:
    """Writes each figure that there is evidence for as NAME.svg and NAME.png, in light colours; gives their paths.

    Those of the page, and `headline`, which says in a title what it is of.
    """
    import matplotlib

    written = []
    draws: dict[str, Callable[[dict[str, Any], Colours], Any]] = {"headline": figures.headline}
    draws |= {name: draw for name, (draw, _) in FIGURES.items()}
    with matplotlib.rc_context(figure_style(LIGHT.ink, LIGHT.soft) | {"axes.facecolor": PAPER}):
        for name, draw in draws.items():
            figure = draw(evidence, LIGHT)
            for ending in ("svg", "png") if figure is not None else ():
                path = Path(folder) / f"{name}.{ending}"
                metadata = {"Date": None, "Creator": None} if ending == "svg" else {"Software": None}
                options = {"format": ending, "dpi": PNG_DPI, "facecolor": PAPER, "metadata": metadata}
                write_file(path, lambda temporary, f=figure, o=options: f.savefig(temporary, **o))  # type: ignore[misc]
                written.append(path)
    return written


def _svg(evidence: dict[str, Any], name: str) -> str | None:
    """A figure as an <svg> element, its ids told apart from those of the others on the page."""
    import matplotlib

    draw, label = FIGURES[name]
    with matplotlib.rc_context(figure_style(INK, SOFT)):
        figure = draw(evidence, PLACEHOLDERS)
        if figure is None:
            return None
        svg = inline_svg(figure, label, PLACEHOLDERS.series)
    svg = re.sub(r'(?<=[ ]id=")', f"{name}-", svg)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)


# --- what it says -------------------------------------------------------------------------------------------


def claim(evidence: dict[str, Any]) -> str:
    """The heading: what the contextual SAE gains or loses at the same number of active features."""
    runs = evidence.get("runs") or []
    topk, wide = (_against(runs, CURRENT, other, "fvu") for other in (TOPK, WIDE))
    if topk is None:
        return "Does an SAE that looks back explain more with as many active features?"
    if verdict(topk) == "open":
        return "With as many active features, an SAE that looks back does no better or worse for sure"
    less = f"leaves {_amount(topk)} variance unexplained than a per-token SAE"
    start = f"With as many active features, an SAE that looks back {less}"
    if wide is None:
        return start
    if verdict(wide) == "open":
        return f"{start}; with as many parameters, there is no clear difference"
    joint = "and" if verdict(wide) == verdict(topk) else "but"
    return f"{start}, {joint} {_amount(wide)} than one with as many parameters"


def findings(evidence: dict[str, Any]) -> list[Finding]:
    """Each comparison that there is evidence for, at the setting of most runs."""
    runs = evidence.get("runs") or []
    where = summary.setting(runs)
    found = []
    for other in (TOPK, WIDE, *BASELINES):
        for arch in (CURRENT, PAST):
            of = _against(runs, arch, other, "fvu")
            if of is not None:
                what = f"variance unexplained, against {ARCHS[other]}"
                found.append(Finding(what, arch, verdict(of), changed(of)))
    for arch in (CURRENT, PAST):
        of = _against(runs, arch, TOPK, "loss_recovered")
        if of is not None:
            own, theirs = (_mean(runs, each, "loss_recovered") for each in (arch, TOPK))
            text = f"{percent(own and own.mean)}, not {percent(theirs and theirs.mean)}"
            what = f"loss recovered, against {ARCHS[TOPK]}"
            found.append(Finding(what, arch, verdict(of, more_is_better=True), text))
    for name, equal in (("topk", "d_sae"), ("wide", "parameters")):
        for row in needed(evidence):
            of = row[f"{name}_ratio"]
            if row["k"] == where.k and of is not None:
                what = f"features that TopK needs for the same FVU, equal {equal}"
                text = f"{number(of, 2)} times as many{', extrapolated' if row[f'{name}_beyond'] else ''}"
                found.append(Finding(what, row["arch"], verdict(of, more_is_better=True), text))
    for other in (TOPK, WIDE):
        for arch in (CURRENT, PAST):
            of = summary.bits_ratio(runs, where, arch, other)
            if of is not None:
                text = changed(of).replace("less", "fewer")
                found.append(
                    Finding(f"bits per token at the same FVU, against {ARCHS[other]}", arch, verdict(of), text)
                )
    return found


def verdict(of: Spread, more_is_better: bool = False) -> str:
    """What a ratio amounts to, where less than 1 is good for the contextual SAE unless `more_is_better`."""
    if of.low < 1 < of.high or of.low == of.high == 1:
        return "open"
    return "ahead" if (of.mean < 1) != more_is_better else "behind"


def changed(of: Spread) -> str:
    """A ratio in words: "12.0 % less (11.0 % to 13.0 % over 3 seeds)"."""
    if of.n == 1 or of.low == of.high:
        return _amount(of)
    ends = [percent(abs(end - 1)) for end in ((of.high, of.low) if of.mean < 1 else (of.low, of.high))]
    if of.low < 1 < of.high:
        ends = [f"{percent(1 - of.low)} less", f"{percent(of.high - 1)} more"]
    return _amount(of) if ends[0] == ends[1] else f"{_amount(of)} ({ends[0]} to {ends[1]} over {of.n} seeds)"


def _amount(of: Spread) -> str:
    return f"{percent(abs(of.mean - 1))} {'less' if of.mean < 1 else 'more'}"


def _against(runs: Sequence[dict[str, Any]], arch: str, other: str, field: str) -> Spread | None:
    where = summary.setting(runs)
    return summary.ratio(summary.at(runs, where, arch=arch), summary.at(runs, where, arch=other), field)


def _mean(runs: Sequence[dict[str, Any]], arch: str, *path: str) -> Spread | None:
    where = summary.setting(runs)
    return summary.spread(value(run, *path) for run in summary.at(runs, where, arch=arch))


# --- the rows of its tables ---------------------------------------------------------------------------------


def middle(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arch in the setting of most runs: Spreads over seeds, and the note."""
    runs = evidence.get("runs") or []
    where = summary.setting(runs)
    names = ("fvu", "fvu_sweeps", "gap", "l0", "loss_recovered", "dead", "silent", "d_sae", "n_params")
    rows = []
    for arch in summary.ordered(run["arch"] for run in summary.at(runs, where)):
        here = summary.at(runs, where, arch=arch)
        row: dict[str, Any] = {name: summary.spread(value(run, name) for run in here) for name in names}
        note = next((run["note"] for run in here if run.get("note")), None)
        rows.append(row | {"arch": arch, "label": ARCHS.get(arch, arch), "note": note})
    return rows


def needed(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arch and k of the headline, where most runs are: the k that TopK needs, over seeds."""
    entries = evidence.get("headline") or []
    where = summary.setting(evidence.get("runs") or entries)
    here = [row for row in entries if (row.get("model"), row.get("corpus"), row.get("layer")) == where[:3]]
    rows = []
    for arch, k in sorted({(row["arch"], row["k"]) for row in here}):
        of = [row for row in here if (row["arch"], row["k"]) == (arch, k)]
        names = ("fvu", "topk", "topk_ratio", "wide", "wide_ratio")
        found: dict[str, Any] = {name: summary.spread(value(row, name) for row in of) for name in names}
        found |= {f"{name}_beyond": any(row.get(f"{name}_beyond") for row in of) for name in ("topk", "wide")}
        rows.append(found | {"arch": arch, "label": ARCHS.get(arch, arch), "k": k})
    return rows


def gaps(evidence: dict[str, Any]) -> Spread | None:
    """By how much the exact form is worse than the one in sweeps, over all contextual SAEs."""
    return summary.spread(value(run, "gap") for run in evidence.get("runs") or [] if run["arch"] in (CURRENT, PAST))


def longer_rows(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arch: the FVU in the first stretch of long windows, and in the last."""
    runs, entries = evidence.get("runs") or [], evidence.get("long") or []
    entries = [entry for entry in entries if entry.get("stretches")]
    rows = []
    for arch in summary.ordered(summary.arch_of(entry, runs) for entry in entries):
        here = [entry for entry in entries if summary.arch_of(entry, runs) == arch]
        first, last = (summary.spread(value(entry["stretches"][at], "fvu") for entry in here) for at in (0, -1))
        length = {name: here[0].get(name) for name in ("n_ctx", "trained_on")}
        if first is not None and last is not None:
            rows.append({"arch": arch, "label": ARCHS.get(arch, arch), "first": first, "last": last, **length})
    return rows


def bits_rows(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    runs = evidence.get("runs") or []
    where = summary.setting(runs)
    names = ("fvu_quantised", "bits_per_token", "bits_indices", "bits_values", "bits_side", "bits_side_entropy")
    rows = []
    for arch in summary.ordered(run["arch"] for run in summary.at(runs, where)):
        here = summary.at(runs, where, arch=arch)
        row: dict[str, Any] = {name: summary.spread(value(run, "bits", name) for run in here) for name in names}
        if row["bits_per_token"] is not None:
            rows.append(row | {"arch": arch, "label": ARCHS.get(arch, arch)})
    return rows


def synthetic_rows(evidence: dict[str, Any]) -> dict[str, Any]:
    """What was made, and a row for each region length and SAE, over its seeds; last those with crowded features."""
    names = ("fvu", "fires_per_region", "versions_per_region", "found", "found_at_start", "fires_off", "token_found")
    carried = ("carried", "carried_by_match", "carried_by_token_features")
    paths: dict[str, tuple[str, ...]] = {name: (name,) for name in (*names, *carried)}
    paths["first"] = ("first", "fires_per_region")
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, crowded in (("rows", False), ("crowded", True)):
        groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for run in figures.synthetic_runs(evidence, crowded):
            groups.setdefault((run["region_length"], figures.synthetic_arch(run)), []).append(run)
        found[kind] = [
            {"region_length": length, "arch": arch, "label": ARCHS[arch], "seeds": len(runs), "d_in": runs[0]["d_in"]}
            | {name: summary.spread(value(run, *path) for run in runs) for name, path in paths.items()}
            for (length, arch), runs in groups.items()
        ]
    most = max((row["seeds"] for row in found["rows"]), default=0)
    runs = evidence.get("synthetic") or [{}]
    told = [row for row in found["rows"] if row["seeds"] == most]
    length = max((row["region_length"] for row in told), default=None)
    return found | {"told": [row for row in told if row["region_length"] == length], "made": runs[0]}


def switch_rows(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arch: means over its entries."""
    runs, entries = evidence.get("runs") or [], evidence.get("switches") or []
    mark = ("recall", "false_alarms", "active_share", "flicker", "median_first", "rate_start", "rate_later")
    paths: dict[str, tuple[str, ...]] = {name: ("mean_marks", "region", name) for name in mark}
    paths |= {"mean_run": ("flicker", "mean_run"), "chance": ("readable", "chance")}
    paths |= {f"read_{part}": ("readable", part, "accuracy") for part in ("acts", "code", "carried")}
    rows = []
    for arch in summary.ordered(summary.arch_of(entry, runs) for entry in entries):
        here = [entry for entry in entries if summary.arch_of(entry, runs) == arch]
        row: dict[str, Any] = {name: summary.spread(value(e, *path) for e in here) for name, path in paths.items()}
        start = next((entry["start"] for entry in here if entry.get("start")), 0)
        for part in ("code", "carried"):
            later = [summary.spread(((entry.get("energy") or {}).get(part) or [])[start:]) for entry in here]
            row[f"energy_{part}"] = summary.spread(of.mean for of in later if of is not None)
        names: list[str] = next((entry["names"] for entry in here if entry.get("names")), [])
        rows.append(row | {"arch": arch, "label": ARCHS.get(arch, arch), "names": names, "start": start})
    return rows


def power_rows(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arch and k_mem: Spreads over its entries."""
    runs, entries = evidence.get("runs") or [], evidence.get("power") or []
    paths: dict[str, tuple[str, ...]] = {name: (name,) for name in ("fvu", "c_alone", "parts_error")}
    paths |= {name: ("pairs", name) for name in ("left_over", "against", "explained")}
    paths |= {name: ("pairs", name, "median") for name in ("needed", "available", "needed_of_available")}
    paths |= {"distance": ("distance", "median"), "near": ("distance", "within", "8")}
    paths |= {"alone": ("look_back", "0"), "all": ("look_back", "256")}
    paths |= {f"c_{name.split()[0]}": ("c", name) for name in ("own", "zero", "other window")}
    paths |= {f"read_{name.split()[0]}": ("read", name) for name in ("own", "shuffled", "other window")}
    paths |= {f"far_{name.split()[0]}": ("far", name) for name in ("own", "shuffled", "other window", "empty")}
    rows = []
    kinds = {(summary.arch_of(entry, runs), entry.get("k_mem")) for entry in entries}
    for arch in summary.ordered(arch for arch, _ in kinds):
        for k_mem in sorted((k for each, k in kinds if each == arch), key=lambda k: (k is not None, -(k or 0))):
            here = [e for e in entries if (summary.arch_of(e, runs), e.get("k_mem")) == (arch, k_mem)]
            row: dict[str, Any] = {name: summary.spread(value(e, *path) for e in here) for name, path in paths.items()}
            rows.append(row | {"arch": arch, "label": ARCHS.get(arch, arch), "k_mem": k_mem, "k": here[0].get("k")})
    return rows


def k_mem_rows(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """figures.remembered, each with the pairs that explain its c."""
    rows = []
    power = [row for row in power_rows(evidence) if row["arch"] == CURRENT]
    for row in figures.remembered(evidence):
        of = next((p for p in power if (p["k"] if p["k_mem"] is None else p["k_mem"]) == row["k_mem"]), None)
        topk, whole = (
            summary.ratio(
                [run for run in row["beside"] if _remembers(run, row["k_mem"])],
                summary.chosen(row["beside"], arch=other),
                "fvu",
            )
            for other in (TOPK, CURRENT)
        )
        pairs = {name: None if of is None else of[name] for name in ("needed", "available")}
        rows.append(
            {
                "k": row["beside"][0]["k"],
                "k_mem": row["k_mem"],
                "fvu": row["fvu"],
                "topk": topk,
                "whole": whole,
                **pairs,
            }
        )
    return rows


def _remembers(run: dict[str, Any], count: int) -> bool:
    return run["arch"] == CURRENT and (run["k"] if run.get("k_mem") is None else run["k_mem"]) == count


# --- how numbers are written --------------------------------------------------------------------------------


def number(of: Spread | float | None, digits: int = 1) -> str:
    """A number, or a mean with its least and greatest; a dash where there is none."""
    if isinstance(of, Spread):
        ends = [f"{end:z,.{digits}f}" for end in (of.low, of.high)]
        return f"{of.mean:z,.{digits}f}" + ("" if ends[0] == ends[1] else f" ({ends[0]}–{ends[1]})")
    return "–" if of is None else f"{of:z,.{digits}f}"


def percent(of: Spread | float | None, digits: int = 1) -> str:
    if of is None:
        return "–"
    if isinstance(of, Spread):
        return number(Spread(100 * of.mean, 100 * of.low, 100 * of.high, of.n), digits) + "\u00a0%"
    return f"{100 * of:z,.{digits}f}\u00a0%"


def key(arch: str) -> str:
    """The class of an arch's colour in the style sheet."""
    return f"key-{list(ARCHS).index(arch) + 1}" if arch in ARCHS else "key-0"


def flat(about: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested names and values as lines to show."""
    lines: dict[str, str] = {}
    for name, content in about.items():
        if isinstance(content, dict):
            lines |= flat(content, f"{prefix}{name} ")
        else:
            lines[f"{prefix}{name}"] = f"{content:,}" if isinstance(content, int) else str(content)
    return lines
