"""kernels/PREDICTED.md, and the same shorter for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import machine
from .written import STEPS, Found

PREDICTED = Path(__file__).parents[2] / "kernels" / "PREDICTED.md"
SHAPES = ("A", "B", "C")
CLASSES = ("wgmma", "integer", "multiply", "float", "shuffle", "load/store", "special", "other")

_TOP = """# What the Triton kernels are predicted to take

Made by `python -m csae.bench.predict --write`; no GPU is needed, and none was used. From
{source}.
A prediction of a kernel is taken to be within {within:.0%}.

Shapes (n, d_in, d_sae, k): A is (8192, 768, 32768, 32), B (8192, 2304, 65536, 64), C (8192, 4096, 131072, 64). Numbers
are bfloat16, random; a step's weights are float32. Features fire equally often, which is the best case for sums by
feature. Times are in milliseconds on an {device}.

A kernel takes the longest of: its instructions at four a clock and multiprocessor (issue); those of one class at the
rate of its units; its products at the measured rate (wgmma); a program's way through all its instructions and waits,
times the programs that a multiprocessor takes one after another (waits; what a loop does while it leaves a product
under way takes nothing, up to that product's time); bytes from L2; bytes from memory; {least:g} us
(launch). An op is the sum of its kernels, a step too, or {host:g} us for each launch if that is more.

| rate | |
| --- | --- |
| products in bfloat16 | {operations:g} TFLOP/s |
| memory, L2 | {memory:g}, {l2:g} TB/s |
| multiprocessors, clock | {sms}, {clock:g} GHz |
| warps' instructions a clock and multiprocessor | {issue} issued; {units} |
| a load, a barrier, an instruction after another of its warp | {load}, {barrier}, {dependent:g} clocks |

`bench/predict/machine.py` says where each comes from.
"""


def markdown(found: Found) -> str:
    """The text of PREDICTED.md."""
    of = found["devices"][machine.DEVICE]
    units = ", ".join(f"{rate:g} {unit}" for unit, rate in machine.RATES.items())
    lines = [
        _TOP.format(
            source=of["source"], within=machine.WITHIN, device=machine.DEVICE, least=machine.KERNEL * 1e6,
            host=machine.LAUNCH * 1e6, operations=machine.OPERATIONS / 1e12, memory=machine.MEMORY / 1e12,
            l2=machine.L2 / 1e12, sms=machine.MULTIPROCESSORS, clock=machine.CLOCK / 1e9, issue=machine.SCHEDULERS,
            units=units, load=machine.LOAD, barrier=machine.BARRIER, dependent=machine.DEPENDENT,
        )
    ]  # fmt: skip
    lines += ["## Ops and steps", "", *_rows(["", *SHAPES])]
    for name, ms in of["ms"].items():
        lines += _line([f"{name}", *(f"{ms[s]:g}" if s in ms else "" for s in SHAPES)])
    lines += ["", *_rows(["ratio", *SHAPES])]
    for name, ratio in of["ratios"].items():
        lines += _line([name, *(f"{ratio[s]:.2f}" if s in ratio else "" for s in SHAPES)])
    lines += ["", "## Kernels", ""]
    for shape in SHAPES:
        lines += [f"### {shape}", "", *_rows(["op", "kernel", "launches", "ms", "limits, ms", "resident, waves"])]
        for one in of["kernels"].get(shape, []):
            limits = ", ".join(f"{limiter} {ms:g}" for limiter, ms in list(one["parts"].items())[:4])
            cells = [one["op"], f"`{one['form']}`", str(one["launches"]), f"{one['ms']:g}", limits]
            lines += _line([*cells, f"{one['resident']}, {one['waves']:g}"])
        lines.append("")
    lines += [*_loops(of["kernels"]), ""]
    lines += [
        "## Launches of a step",
        "",
        "By the function of csae that launches; what autograd runs counts for its caller.",
        "",
    ]
    for step in STEPS:
        lines += [f"### {step}", "", *_rows(["kernels launched", *SHAPES])]
        by_shape = {s: of["origins"][s][step] for s in SHAPES if s in of["origins"]}
        total = [str(of["launches"][step].get(s, "")) for s in SHAPES]
        lines += _line(["all", *total])
        names = dict.fromkeys(name for s in by_shape.values() for name in s)
        for name in sorted(names, key=lambda name: -max(s.get(name, [0])[0] for s in by_shape.values())):
            lines += _line(
                [f"`{name}`", *(str(by_shape[s].get(name, [""])[0]) if s in by_shape else "" for s in SHAPES)]
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _loops(kernels: dict[str, list[Found]]) -> list[str]:
    """Lines of a table: each loop of each form, in the first op that launches it."""
    forms: dict[str, dict[str, Found]] = {}
    for shape in SHAPES:
        for one in kernels.get(shape, []):
            forms.setdefault(one["form"], {}).setdefault(shape, one)
    lines = [
        "## Instructions",
        "",
        "A warp's, by class: once a program, and in each trip of a loop. A program's trips are",
    ]
    lines += ["means over launches, in the first op that launches the form.", ""]
    for form, of in forms.items():
        lines += [f"`{form}`", "", *_rows(["loop", *(f"trips, {shape}" for shape in SHAPES), *CLASSES])]
        first = next(iter(of.values()))
        for name, loop in first["loops"].items():
            trips = [f"{of[s]['loops'][name]['trips']:g}" if s in of and name in of[s]["loops"] else "" for s in SHAPES]
            number = [str(loop["classes"].get(kind) or "") for kind in CLASSES]
            lines += _line([f"{name}: `{loop['text']}`" if name else "", *trips, *number])
        lines.append("")
    return lines


def short(found: Found, shape: str) -> list[str]:
    """Lines of a shape's times, for a terminal."""
    of = found["devices"][machine.DEVICE]
    lines = [f"{shape:<44}{'ms':>10}{'launches':>10}"]
    for name, ms in of["ms"].items():
        if shape in ms:
            lines.append(f"{name:<44}{ms[shape]:>10.3g}{of['launches'].get(name, {}).get(shape, ''):>10}")
    return [*lines, *(f"{name:<44}{r[shape]:>10.2f}" for name, r in of["ratios"].items() if shape in r)]


def _rows(titles: Sequence[str]) -> list[str]:
    return [*_line(titles), "|" + " --- |" * len(titles)]


def _line(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]
