"""The tables of docs/scale.md, from the results of `python -m csae.bench.scale`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from . import scale_projection as projection
from .harness import Report
from .scale_steps import IMPLEMENTATIONS

OURS = ("csae TopK", "csae contextual")
DDP = "DDP, the same TopK SAE"
NO = "-"


def filled(text: str, report: Report) -> str:
    """The page with each table between its marks, <!-- name --> and <!-- end -->, as the report has it."""
    for name, lines in tables(report).items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(mark.findall(text)) != 1:
            raise ValueError(f"the page: needed one place <!-- {name} --> ... <!-- end -->")
        text = mark.sub(lambda found, lines=lines: f"{found[1]}\n{lines}\n\n{found[2]}", text)  # type: ignore[misc]
    return text


def tables(report: Report) -> dict[str, str]:
    """Markdown, by name."""
    most = max(r["processes"] for r in report["results"])
    return {
        "measured on": _measured_on(report),
        "sent": _sent(report, most),
        "purposes": _purposes(report, most),
        "time": _time(report),
        "held": _held(report, most),
        "memory": _memory(report),
        "projection": _projection(report),
        "break-even": _break_even(report),
    }


def _measured_on(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if name != "python")
    small = _small(report)[0]["sizes"]
    return (
        f"{report['device']}, {report['cores']} cores, gloo, a thread a process; {versions}; "
        f"n = {small['n']} tokens of all ranks, d_in = {small['d_in']}, k = {small['k']}, {small['precision']}; "
        f"medians of {report['rounds']} steps."
    )


def _sent(report: Report, R: int) -> str:
    sizes = sorted({r["sizes"]["d_sae"] for r in _small(report)})
    rows = []
    for impl in IMPLEMENTATIONS:
        found = {r["sizes"]["d_sae"]: r for r in _small(report) if (r["impl"], r["processes"]) == (impl, R)}
        if found:
            growth = found[sizes[-1]]["bytes"] / found[sizes[0]]["bytes"]
            rows.append([impl, *(_mb(found[F]["bytes"]) for F in sizes), f"{growth:.2f}"])
    return _table([f"MB a rank and step, {R} processes", *(f"d_sae = {F:,}" for F in sizes), "grows by"], rows)


def _purposes(report: Report, R: int) -> str:
    """By purpose at the largest d_sae, beside the formula."""
    d_sae = max(r["sizes"]["d_sae"] for r in _small(report))
    of = {r["impl"]: r for r in _small(report) if (r["processes"], r["sizes"]["d_sae"]) == (R, d_sae)}
    ours = {impl: {one["purpose"]: 0.0 for one in of[impl]["sent"]} for impl in OURS}
    kinds: dict[str, list[str]] = {}
    for impl, sent in ours.items():
        for one in of[impl]["sent"]:
            sent[one["purpose"]] += one["bytes"]
            if one["kind"] not in kinds.setdefault(one["purpose"], []):
                kinds[one["purpose"]].append(one["kind"])
    formula = projection.formula(of[OURS[0]]["sizes"], R)
    names = sorted(kinds, key=lambda name: (-ours[OURS[0]].get(name, 0), -ours[OURS[1]].get(name, 0)))
    rows = [
        [
            name,
            ", ".join(kinds[name]),
            _kb(formula.get(name)),
            *(_kb(ours[impl].get(name)) for impl in OURS),
        ]
        for name in names
    ]
    return _table([f"kB a rank and step, {R} processes", "collectives", "by formula", *OURS], rows)


def _time(report: Report) -> str:
    sizes = sorted({r["sizes"]["d_sae"] for r in _small(report)})
    rows = []
    for impl in IMPLEMENTATIONS:
        for R in sorted({r["processes"] for r in _small(report)}):
            found = {r["sizes"]["d_sae"]: r for r in _small(report) if (r["impl"], r["processes"]) == (impl, R)}
            if found:
                rows.append([impl, str(R), *(f"{found[F]['median_ms']:.0f}" if F in found else NO for F in sizes)])
    return _table(["ms a step", "processes", *(f"d_sae = {F:,}" for F in sizes)], rows)


def _held(report: Report, R: int) -> str:
    d_sae = max(r["sizes"]["d_sae"] for r in _small(report))
    rows = []
    for impl in IMPLEMENTATIONS:
        for r in _small(report):
            if (r["impl"], r["processes"], r["sizes"]["d_sae"]) == (impl, R, d_sae):
                rows.append([impl, *(_mb(r["held"][what]) for what in ("weights", "moments", "gradients"))])
    return _table([f"MB a rank, {R} processes, d_sae = {d_sae:,}", "weights", "moments", "dense gradients"], rows)


def _memory(report: Report) -> str:
    """A GPU's memory, from what is held for a feature and the peak for a token."""
    rows = []
    for impl in (*OURS, DDP):
        rows += [
            [
                impl,
                _millions(at["d_sae"]),
                str(at["gpus"]),
                *(_gb(at[what]) for what in ("weights", "moments", "gradients", "activations", "all")),
                projection.fits(at["all"]),
            ]
            for at in projection.project(report, impl)
            if at["gpus"] in (8, 64)
        ]
    head = ["GB a GPU", "features", "GPUs", "weights", "moments", "dense gradients", "activations", "all", "fits"]
    return _table(head, rows)


def _projection(report: Report) -> str:
    rows = []
    for ours, theirs in zip(projection.project(report, OURS[0]), projection.project(report, DDP), strict=True):
        computing = ours["product_s"] + ours["adam_s"]
        rows.append(
            [
                str(ours["gpus"]),
                _millions(ours["d_sae"]),
                _gb(ours["sent"]),
                _ms(ours["sent_s"]),
                _ms(ours["product_s"]),
                _ms(ours["adam_s"]),
                f"{ours['sent_s'] / (computing + ours['sent_s']):.0%}",
                _gb(theirs["sent"]),
                _ms(theirs["sent_s"]),
            ]
        )
    head = ["GPUs", "features", "GB sent", "sending, ms", "product, ms", "Adam, ms", "share of sending"]
    return _table([*head, "DDP: GB sent", "DDP: sending, ms"], rows)


def _break_even(report: Report) -> str:
    nvlink, infiniband = (
        [projection.break_even(report, impl, speed) for impl in OURS]
        for speed in (projection.NVLINK, projection.INFINIBAND)
    )
    topk, contextual = (
        f"{_round(a)} on NVLink and {_round(b)} on InfiniBand" for a, b in zip(nvlink, infiniband, strict=True)
    )
    return (
        f"Sending takes as long as the product at so many features a GPU, whatever the number of GPUs and tokens: TopK "
        f"{topk}; contextual {contextual}. Below that, make replicas (`--data-ranks`) of fewer ranks each."
    )


def _round(n: float) -> str:
    return f"{round(n, -3):,.0f}" if n >= 1e4 else f"{round(n, -2):,.0f}"


def _small(report: Report) -> list[dict[str, Any]]:
    """The results that were timed."""
    return [r for r in report["results"] if "median_ms" in r]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _mb(n: float) -> str:
    return f"{n / 1e6:.3g}" if n < 1e9 else f"{n / 1e6:,.0f}"


def _kb(n: float | None) -> str:
    return NO if n is None else f"{n / 1e3:,.0f}" if n >= 1e4 else f"{n / 1e3:.2g}"


def _gb(n: float) -> str:
    return f"{n / 1e9:,.0f}" if n >= 1e10 else f"{n / 1e9:.1f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


def _millions(n: int) -> str:
    return f"{n >> 20}M"
