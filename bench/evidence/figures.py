"""The figures of the evidence, drawn with matplotlib. A function returns None if its figures were not measured.

An SAE has the same colour, mark and place in every figure. Lines are means over seeds; the band around a line goes from
the smallest to the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from csae.bench.evidence import summary
from csae.bench.evidence.summary import ARCHS, CURRENT, PAST, TOPK, Spread, value

MARKS = dict(zip(ARCHS, "osD^vPX", strict=True))
WIDTH, HEIGHT = 5.4, 3.9
BITS = {"bits_indices": "which features", "bits_values": "their values", "bits_side": "side information"}
BITS_STRENGTH = (1.0, 0.6, 0.25)
PREDICTORS = {
    "previous": "the position before, whole",
    "last_1": "last 1",
    "last_2": "last 2",
    "last_4": "last 4",
    "last_8": "last 8",
    "last_16": "last 16",
    "mean": "mean of all before",
    "last_16_and_mean": "last 16 and mean",
}
WRONG = (
    ("c", {"own": "its own", "zero": "none", "other window": "another window's"}, "what is carried (c) is"),
    ("read", {"own": "its own", "shuffled": "shuffled", "other window": "another window's"}, "the memory read is"),
    (
        "far",
        {"own": "as it was", "shuffled": "shuffled", "other window": "another window's", "empty": "empty"},
        "the text further back is",
    ),
)


class Colours(NamedTuple):
    """The colours of a figure."""

    ink: str
    soft: str
    series: Sequence[str]
    """one for each of ARCHS"""

    def of(self, arch: str) -> str:
        return dict(zip(ARCHS, self.series, strict=True)).get(arch, self.soft)


def fvu(evidence: dict[str, Any], colours: Colours) -> Any:
    """FVU against k, at the model, corpus and layer with the most runs."""
    return _by_arch(evidence, colours, ("k",), ("fvu",), "active features a token (k)", "FVU", by_k=True)


def headline(evidence: dict[str, Any], colours: Colours) -> Any:
    """The same with a title, for use outside of the report."""
    figure = fvu(evidence, colours)
    if figure is not None:
        where = summary.setting(evidence["runs"])
        title = f"Variance left unexplained, {where.corpus}\n{where.model}, {summary.in_words(where.layer)}"
        figure.axes[0].set_title(title, loc="left", fontsize=10)
    return figure


def loss_recovered(evidence: dict[str, Any], colours: Colours) -> Any:
    path, label = ("loss_recovered",), "active features a token, measured (L0)"
    figure = _by_arch(evidence, colours, ("l0",), path, label, "loss recovered")
    if figure is not None:
        _in_percent(figure.axes[0].yaxis)
    return figure


def bits(evidence: dict[str, Any], colours: Colours) -> Any:
    """FVU against bits per token."""
    path = ("bits", "bits_per_token")
    return _by_arch(evidence, colours, path, ("bits", "fvu_quantised"), "bits per token", "FVU, from what was sent")


def elsewhere(evidence: dict[str, Any], colours: Colours) -> Any:
    """FVU on each corpus and layer, at one k."""
    runs = evidence.get("runs") or []
    k = summary.setting(runs).k
    places = list(dict.fromkeys((run.get("model"), run.get("corpus"), run.get("layer")) for run in runs))
    several = len({model for model, _, _ in places}) > 1
    rows: list[str] = []
    points: list[tuple[int, str, Spread]] = []
    for model, corpus, layer in places:
        here = summary.chosen(runs, model=model, corpus=corpus, layer=layer, k=k)
        over = {arch: summary.spread(value(run, "fvu") for run in here if run["arch"] == arch) for arch in ARCHS}
        if any(over.values()):
            points += [(len(rows), arch, of) for arch, of in over.items() if of is not None]
            rows.append(f"{model}, {corpus}, {layer}" if several else f"{corpus}, {summary.in_words(layer)}")
    if len(rows) < 2:
        return None
    figure, axes = _axes(colours, f"FVU at k = {k}", "", height=1.7 + 0.36 * len(rows))
    for row, arch, of in points:
        _span(axes, colours.of(arch), of, row)
        axes.plot([of.mean], [row], MARKS[arch], color=colours.of(arch), label=ARCHS[arch], markersize=6)
    _rows(axes, rows)
    _legend(figure, axes, 2)
    return figure


def longer(evidence: dict[str, Any], colours: Colours) -> Any:
    """FVU along windows longer than those trained on."""
    runs, entries = evidence.get("runs") or [], evidence.get("long") or []
    found: dict[str, dict[float, list[float | None]]] = {}
    for entry in entries:
        for stretch in entry.get("stretches") or []:
            of = found.setdefault(summary.arch_of(entry, runs), {})
            of.setdefault(float(stretch["last"] + 1), []).append(value(stretch, "fvu"))
    lines = {
        arch: [(last, over) for last in sorted(of) if (over := summary.spread(of[last])) is not None]
        for arch, of in found.items()
    }
    if not any(lines.values()):
        return None
    figure, axes = _axes(colours, "up to position of the window", "FVU of this stretch")
    for arch in summary.ordered(arch for arch in lines if lines[arch]):
        _line(axes, colours, arch, lines[arch])
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    trained = value(entries[0], "trained_on")
    if trained is not None:
        axes.axvline(trained, color=colours.soft, linestyle=":", linewidth=1.2, label="end of windows trained on")
    axes.set_xlim(left=0)
    ends = sorted({last for points in lines.values() for last, _ in points})
    _plain_ticks(axes.xaxis, ends[len(ends) // 9 :: 1 + len(ends) // 9])
    _legend(figure, axes, 2)
    return figure


def bits_parts(evidence: dict[str, Any], colours: Colours) -> Any:
    """Bits per token by part of the code, at one k."""
    from matplotlib.patches import Patch

    runs = evidence.get("runs") or []
    where = summary.setting(runs)
    parts = {}
    for arch in summary.ordered(run["arch"] for run in runs):
        here = summary.at(runs, where, arch=arch)
        means = [summary.spread(value(run, "bits", part) for run in here) for part in BITS]
        if means[0] is not None:
            parts[arch] = [0.0 if of is None else of.mean for of in means]
    if not parts:
        return None
    figure, axes = _axes(colours, f"bits per token, at k = {where.k}", "", height=1.5 + 0.4 * len(parts))
    for row, (arch, lengths) in enumerate(parts.items()):
        left = 0.0
        for length, strength in zip(lengths, BITS_STRENGTH, strict=True):
            axes.barh(row, length, 0.62, left, color=colours.of(arch), alpha=strength)
            left += length
        axes.annotate(f"{left:.0f}", (left, row), xytext=(4, 0), textcoords="offset points", va="center")
    _rows(axes, [ARCHS.get(arch, arch) for arch in parts])
    axes.margins(x=0.1)
    keys = [Patch(color=colours.ink, alpha=s, label=n) for n, s in zip(BITS.values(), BITS_STRENGTH, strict=True)]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def synthetic_firings(evidence: dict[str, Any], colours: Colours) -> Any:
    """How often a feature that lasts for a region fires in it, against the region's length."""
    runs = _synthetic(evidence, "fires_per_region")
    if not runs:
        return None
    figure, axes = _axes(colours, "length of a region, positions", "firings in a region")
    lengths = sorted({run["region_length"] for run in runs})
    axes.plot(lengths, lengths, ":", color=colours.soft, linewidth=1.2, label="at every position")
    axes.plot(lengths, [1] * len(lengths), "--", color=colours.soft, linewidth=1.2, label="once: ideal")
    _synthetic_lines(axes, colours, runs, "fires_per_region")
    axes.set_yscale("log", base=2)
    _plain_ticks(axes.yaxis, [2**power for power in range(0, 9) if 2**power <= max(lengths)])
    _legend(figure, axes, 2)
    return figure


def synthetic_fvu(evidence: dict[str, Any], colours: Colours) -> Any:
    runs = _synthetic(evidence, "fvu")
    if not runs:
        return None
    figure, axes = _axes(colours, "length of a region, positions", "FVU")
    _synthetic_lines(axes, colours, runs, "fvu")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    _legend(figure, axes, 2)
    return figure


def switches_rate(evidence: dict[str, Any], colours: Colours) -> Any:
    """How often the feature that marks a language is active, by the distance from the switch."""
    lines = _switch_lines(evidence, "mean_marks", "region", "rate_by_offset")
    figure = _switch_figure(colours, lines, {}, "regions with the mark active", (0, None))
    if figure is not None:
        _in_percent(figure.axes[0].yaxis)
    return figure


def switches_energy(evidence: dict[str, Any], colours: Colours) -> Any:
    """Energy of the code and of what is carried, by the distance from the switch."""
    code, carried = (_switch_lines(evidence, "energy", part) for part in ("code", "carried"))
    return _switch_figure(colours, code, carried, "mean square, activations = 1", (0, None), "carried (c)")


def redundancy(evidence: dict[str, Any], colours: Colours) -> Any:
    """The share of variance that a linear map predicts from earlier positions."""
    entries = [entry for entry in evidence.get("redundancy") or [] if value(entry, "predicted", "r2", "previous")]
    if not entries:
        return None
    names = [name for name in PREDICTORS if any(value(entry, "predicted", "r2", name) is not None for entry in entries)]
    figure, axes = _axes(colours, "share of variance predicted (R²)", "", height=1.6 + 0.3 * len(names))
    for number, (entry, mark) in enumerate(zip(entries, "osD^vPX" * len(entries), strict=False)):
        beside = 0.14 * (number - (len(entries) - 1) / 2)  # so that marks don't hide each other
        found = [(value(entry, "predicted", "r2", name), row + beside) for row, name in enumerate(names)]
        shown = [(r2, row) for r2, row in found if r2 is not None]
        axes.plot(*zip(*shown, strict=True), mark, color=colours.ink if number % 2 == 0 else colours.soft,
                  label=f"{entry.get('corpus')}, {summary.in_words(entry.get('layer'))}", markersize=6)  # fmt: skip
    axes.axvline(0, color=colours.soft, linewidth=0.8)
    _in_percent(axes.xaxis)
    _rows(axes, [PREDICTORS[name] for name in names])
    _legend(figure, axes, 2)
    return figure


def look_back(evidence: dict[str, Any], colours: Colours) -> Any:
    """FVU against how many positions are seen."""
    entries = [entry for entry in _power(evidence) if value(entry, "look_back", "0") is not None]
    if not entries:
        return None
    reaches = sorted({int(reach) for entry in entries for reach in entry["look_back"]})
    figure, axes = _axes(colours, "how many earlier positions are seen", "FVU")
    for arch in summary.ordered(entry["arch"] for entry in entries):
        here = [entry for entry in entries if entry["arch"] == arch]
        over = [summary.spread(value(entry, "look_back", str(reach)) for entry in here) for reach in reaches]
        _line(axes, colours, arch, [(float(at), of) for at, of in enumerate(over) if of is not None])
    axes.set_xticks(range(len(reaches)), ["none" if reach == 0 else str(reach) for reach in reaches])
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    _legend(figure, axes, 2)
    return figure


def wrong_memories(evidence: dict[str, Any], colours: Colours) -> Any:
    """FVU where c, or the memory that is read, is a wrong one."""
    entries = [entry for entry in _power(evidence) if any(value(entry, part, "own") for part, _, _ in WRONG)]
    if not entries:
        return None
    kinds = [(part, name, f"{what} {how}") for part, names, what in WRONG for name, how in names.items()]
    figure, axes = _axes(colours, "FVU (1: no better than the mean)", "", height=1.5 + 0.3 * len(kinds))
    archs = summary.ordered(entry["arch"] for entry in entries)
    for arch in archs:
        beside = 0.24 * (archs.index(arch) - (len(archs) - 1) / 2)
        for row, (part, name, _) in enumerate(kinds):
            of = summary.spread(value(entry, part, name) for entry in entries if entry["arch"] == arch)
            if of is not None:
                _span(axes, colours.of(arch), of, row + beside)
                axes.plot(
                    [of.mean], [row + beside], MARKS.get(arch, "o"), color=colours.of(arch), label=ARCHS.get(arch, arch)
                )
    axes.axvline(1, color=colours.soft, linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    _rows(axes, [label for _, _, label in kinds])
    for after in (2.5, 5.5):
        axes.axhline(after, color=colours.soft, linewidth=0.5)
    _legend(figure, axes, 2)
    return figure


def k_mem(evidence: dict[str, Any], colours: Colours) -> Any:
    """FVU against how many features of a code are remembered."""
    rows = remembered(evidence)
    if len(rows) < 2:
        return None
    figure, axes = _axes(colours, "features of a code that are remembered (k_mem)", "FVU")
    points = [(float(row["k_mem"]), row["fvu"]) for row in rows]
    _line(axes, colours, CURRENT, points)
    beside = summary.spread(value(run, "fvu") for run in summary.chosen(rows[0]["beside"], arch=TOPK))
    if beside is not None:
        label = f"{ARCHS[TOPK]}: none"
        axes.axhline(beside.mean, color=colours.of(TOPK), linestyle="--", linewidth=1.6, label=label)
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis, [int(at) for at, _ in points])
    _legend(figure, axes, 2)
    return figure


FIGURES: dict[str, tuple[Callable[[dict[str, Any], Colours], Any], str]] = {
    "fvu": (fvu, "FVU against the number of active features, for each SAE"),
    "loss_recovered": (loss_recovered, "Loss recovered against L0, for each SAE"),
    "elsewhere": (elsewhere, "FVU of each SAE on each corpus and layer"),
    "longer": (longer, "FVU along windows longer than those trained on"),
    "bits": (bits, "FVU against bits per token, for each SAE"),
    "bits_parts": (bits_parts, "Bits per token of each SAE, by what they are spent on"),
    "synthetic_firings": (synthetic_firings, "Firings of a region's feature against the region's length"),
    "synthetic_fvu": (synthetic_fvu, "FVU on synthetic windows against the region's length"),
    "switches_rate": (switches_rate, "How often a language's mark is active, by positions since the switch"),
    "switches_energy": (switches_energy, "Energy of code and c by positions since the switch"),
    "redundancy": (redundancy, "Share of the activations' variance that is predicted from earlier positions"),
    "look_back": (look_back, "FVU against how many earlier positions are seen"),
    "wrong_memories": (wrong_memories, "FVU with the right and with wrong memories"),
    "k_mem": (k_mem, "FVU against how many features of a code are remembered"),
}


def remembered(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """For each k_mem of the contextual SAE, in rising order: k_mem, fvu over seeds, and `beside`, the runs of the same
    seeds, model, corpus, layer and k. The last k_mem is k: everything is remembered. Empty if no SAE has a k_mem."""
    runs = evidence.get("runs") or []
    cut = [run for run in runs if run.get("k_mem") is not None and run["arch"] == CURRENT]
    if not cut:
        return []
    same = ("model", "corpus", "layer", "k")
    place = {name: cut[0].get(name) for name in same}
    seeds = {run.get("seed") for run in cut}
    beside = [run for run in runs if run.get("seed") in seeds and all(run.get(n) == v for n, v in place.items())]
    found: dict[int, list[dict[str, Any]]] = {}
    for run in beside:
        if run["arch"] == CURRENT:
            found.setdefault(run["k"] if run.get("k_mem") is None else run["k_mem"], []).append(run)
    over = {number: summary.spread(value(run, "fvu") for run in of) for number, of in found.items()}
    return [{"k_mem": n, "fvu": over[n], "beside": beside} for n in sorted(found) if over[n] is not None]


# --- shared by the figures ----------------------------------------------------------------------------------


def _axes(colours: Colours, x: str, y: str, height: float = HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no backend of a screen is touched

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="both" if y else "x", color=colours.soft, linewidth=0.4, alpha=0.4)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Any, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    places = {label: handle for handle, label in zip(handles, labels, strict=True)}
    order = list(ARCHS.values())
    names = sorted(places, key=lambda name: order.index(name) if name in order else len(order))
    figure.legend([places[n] for n in names], names, loc="outside lower center", ncols=columns, frameon=False,
                  fontsize=9)  # fmt: skip


def _plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_ticks(sorted(set(ticks)), [f"{tick:g}" for tick in sorted(set(ticks))])
    axis.set_minor_locator(NullLocator())


def _in_percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _span(axes: Any, colour: str, of: Spread, row: float) -> None:
    axes.plot([of.low, of.high], [row, row], color=colour, linewidth=3, alpha=0.35, solid_capstyle="round")


def _line(axes: Any, colours: Colours, arch: str, points: Sequence[tuple[float, Spread]], **style: Any) -> None:
    x, over = [at for at, _ in points], [of for _, of in points]
    colour = colours.of(arch)
    style = {"color": colour, "linewidth": 1.8, "markersize": 5.5, "label": ARCHS.get(arch, arch)} | style
    axes.plot(x, [of.mean for of in over], marker=MARKS.get(arch, "o"), **style)
    if any(of.n > 1 for of in over):
        if len(x) > 1:
            low, high = [of.low for of in over], [of.high for of in over]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        else:
            axes.plot(x * 2, [over[0].low, over[0].high], color=colour, linewidth=3, alpha=0.35)


def _by_arch(
    evidence: dict[str, Any],
    colours: Colours,
    x: Sequence[str],
    y: Sequence[str],
    x_label: str,
    y_label: str,
    by_k: bool = False,
) -> Any:
    runs = evidence.get("runs") or []
    where = summary.setting(runs)
    here = summary.chosen(runs, model=where.model, corpus=where.corpus, layer=where.layer)
    curves = {
        arch: summary.curve(summary.chosen(here, arch=arch), x, y)
        for arch in summary.ordered(run["arch"] for run in here)
    }
    if not any(curves.values()):
        return None
    figure, axes = _axes(colours, x_label, y_label)
    for arch, points in curves.items():
        if points:
            _line(axes, colours, arch, points)
    if by_k:
        axes.set_xscale("log", base=2)
        _plain_ticks(axes.xaxis, [at for points in curves.values() for at, _ in points])
    _legend(figure, axes, 2)
    return figure


def _synthetic(evidence: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [run for run in synthetic_runs(evidence) if value(run, name) is not None]


def synthetic_runs(evidence: dict[str, Any], crowded: bool = False) -> list[dict[str, Any]]:
    """The synthetic runs in the most dimensions; crowded: those in fewer."""
    runs = evidence.get("synthetic") or []
    most = max((run["d_in"] for run in runs), default=None)
    return [run for run in runs if (run["d_in"] != most) == crowded]


def synthetic_arch(run: dict[str, Any]) -> str:
    return {None: TOPK, "past": PAST}.get(run.get("query"), CURRENT)


def _synthetic_lines(axes: Any, colours: Colours, runs: Sequence[dict[str, Any]], name: str) -> None:
    for arch in summary.ordered(synthetic_arch(run) for run in runs):
        here = [run for run in runs if synthetic_arch(run) == arch]
        lengths = sorted({run["region_length"] for run in here})
        over = [summary.spread(value(run, name) for run in here if run["region_length"] == at) for at in lengths]
        _line(axes, colours, arch, [(at, of) for at, of in zip(lengths, over, strict=True) if of is not None])
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis, [run["region_length"] for run in runs])


def _switch_lines(evidence: dict[str, Any], *path: str) -> dict[str, list[list[float | None]]]:
    """arch -> for each of its entries the list by offset."""
    runs = evidence.get("runs") or []
    lines: dict[str, list[list[float | None]]] = {}
    for entry in evidence.get("switches") or []:
        found: Any = entry
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if found and any(number is not None for number in found):
            lines.setdefault(summary.arch_of(entry, runs), []).append(found)
    return lines


def _switch_figure(
    colours: Colours,
    lines: dict[str, list[list[float | None]]],
    dashed: dict[str, list[list[float | None]]],
    label: str,
    limits: tuple[float | None, float | None],
    dashed_label: str = "",
) -> Any:
    if not lines:
        return None
    figure, axes = _axes(colours, "positions since the switch", label)
    length = max(len(found) for of in lines.values() for found in of)
    for arch in summary.ordered(lines):
        _line(axes, colours, arch, _binned(lines[arch]), markersize=4)
    for arch in summary.ordered(dashed):
        name = f"{ARCHS.get(arch, arch)}: {dashed_label}"
        _line(axes, colours, arch, _binned(dashed[arch]), markersize=4, linestyle="--", markerfacecolor="none",
              label=name)  # fmt: skip
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis, [2**power for power in range(20) if 2**power <= length])
    axes.set_ylim(*limits)
    _legend(figure, axes, 2)
    return figure


def _binned(lists: Iterable[Sequence[float | None]]) -> list[tuple[float, Spread]]:
    """Means over half octaves of the position, counted from 1, with their spread over the lists."""
    lists = list(lists)
    length = max(len(found) for found in lists)
    edges = sorted({round(2 ** (step / 2)) for step in range(2 * length.bit_length() + 1)})
    points = []
    for low, high in pairwise(edges):
        means = [summary.spread(found[low - 1 : high - 1]) for found in lists]
        over = summary.spread(of.mean for of in means if of is not None)
        if over is not None:
            points.append(((low * min(high - 1, length)) ** 0.5, over))
    return points


def _power(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of SAEs without a k_mem, with their arch as in `runs`."""
    runs, entries = evidence.get("runs") or [], evidence.get("power") or []
    return [entry | {"arch": summary.arch_of(entry, runs)} for entry in entries if entry.get("k_mem") is None]
