"""Targets for a GPU, as ratios within one run; and bench/RESULTS.md: what was predicted, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import predictions as kernels
from . import report
from .cases import BACKWARD, CASES, CONTEXTUAL_STEP, DECODE, ENCODE, LOOK_BACK, OURS, TOPK_STEP, Case
from .harness import Report

SHAPES = ("A", "B", "C")


class Target(NamedTuple):
    """A ratio to reach."""

    what: str
    limit: float
    at_most: bool
    """whether the limit is an upper one"""
    of: Callable[[Report, str], float | None]
    """the ratio at a shape; None where it wasn't measured"""

    def words(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}"

    def reached(self, ratio: float) -> bool:
        return ratio <= self.limit if self.at_most else ratio >= self.limit


def _value(found: Report, case: Case, shape: str, impl: str, what: str) -> float | None:
    for result in found["results"]:
        if (result["case"], result["shape"]["name"], result["impl"]) == (case.name, shape, impl):
            return result.get(what)
    return None


def _against(case: Case, *impls: str, what: str = "median_ms") -> Callable[[Report, str], float | None]:
    """The smallest value of `impls`, divided by ours."""

    def of(found: Report, shape: str) -> float | None:
        ours = _value(found, case, shape, OURS, what)
        others = [value for impl in impls if (value := _value(found, case, shape, impl, what)) is not None]
        return min(others) / ours if ours and others else None

    return of


def _inverse(of: Callable[[Report, str], float | None]) -> Callable[[Report, str], float | None]:
    def inverse(found: Report, shape: str) -> float | None:
        ratio = of(found, shape)
        return None if not ratio else 1 / ratio

    return inverse


def _share(case: Case) -> Callable[[Report, str], float | None]:
    return lambda found, shape: _value(found, case, shape, OURS, "share_of_floor")


FLEX = ("FlexAttention, compiled", "FlexAttention, compiled, null as a key")
STEP_OF = {"sparsify": 3.0, "SAELens": 4.0, "dictionary_learning": 4.0, "PyTorch dense, compiled": 3.0}
TARGETS = (
    Target("topk_encode forward / the product alone", 1.2, True, _inverse(_against(ENCODE, "mm"))),
    Target("sparse_decode forward: share of its floor", 0.7, False, _share(DECODE)),
    Target("backward of encode + decode / its floor", 1.6, True, _inverse(_share(BACKWARD))),
    Target("FlexAttention / look-back, forward + backward", 1.3, False, _against(LOOK_BACK, *FLEX)),
    *(
        Target(f"TopK training step: {impl} / ours", least, False, _against(TOPK_STEP, impl))
        for impl, least in STEP_OF.items()
    ),
    *(
        Target(f"its memory: ours / {impl}", 0.25, True, _inverse(_against(TOPK_STEP, impl, what="peak_bytes")))
        for impl in STEP_OF
    ),
    Target("contextual step / TopK step", 1.6, True, _inverse(_against(CONTEXTUAL_STEP, "csae TopK step"))),
)


def rows(of: Callable[[Target, str], float | None]) -> list[list[str]]:
    """Rows of a table: the target, its limit, and what `of` gives at each shape; `!` marks a missed target."""
    table = []
    for target in TARGETS:
        cells = [target.what, target.words()]
        for shape in SHAPES:
            ratio = of(target, shape)
            missed = ratio is not None and not target.reached(ratio)
            cells.append("" if ratio is None else f"{ratio:.2f}{' !' if missed else ''}")
        table.append(cells)
    return table


def measured(found: Report) -> list[list[str]]:
    """`rows` of what was measured."""
    return rows(lambda target, shape: target.of(found, shape))


def short(found: Report) -> str:
    """The same table as plain text, a line for each target; then each kernel's time beside its prediction."""
    lines = [[f"{found['ceilings']['dtype']}; ! misses the target", "target", *SHAPES], *measured(found)]
    return "\n".join(
        [
            found["device"],
            *(f"{what:<52}{target:<15}" + "".join(f"{c:>14}" for c in cells) for what, target, *cells in lines),
            *(["", *kernels.table(found["kernels"])] if found.get("kernels") else []),
        ]
    )


def markdown(folder: Path) -> str:
    """bench/RESULTS.md from the JSON files of a folder.

    What was predicted, a table a device; what was measured, a table a device; then every device's whole table.
    """
    runs = [report.read(file) for file in sorted(folder.glob("*.json"))]
    gpus = [found for found in runs if found.get("type") == "cuda"]
    predictions = json.loads(kernels.PREDICTIONS.read_text())["devices"]
    lines = [
        "# Predicted and measured",
        "",
        "Written by `make gpu` and `python -m csae.bench.targets` from `bench/results/*.json` and",
        "`bench/predictions.json`. Shapes (n, d_in, d_sae, k): A is (8192, 768, 32768, 32), B (8192, 2304, 65536, 64),",
        "C (8192, 4096, 131072, 64). Products in bfloat16, weights in float32. Every number is a ratio of medians of",
        "one run, or of predicted times; `!` marks a target that is missed.",
    ]
    for device, of_device in predictions.items():
        ratios = of_device["ratios"]
        lines += ["", f"## Predicted: {device}", "", f"Not measured. From {of_device['source']}.", ""]
        lines += _markdown(rows(partial(_ratio, ratios)), "predicted")
        lines += ["", "| ms | " + " | ".join(SHAPES) + " |", "|" + " --- |" * (1 + len(SHAPES))]
        cases = {row: ms for row, ms in of_device["ms"].items() if row in CASES or row == "torch.mm"}
        lines += [
            f"| {row} | " + " | ".join(f"{ms[s]:g}" for s in SHAPES if s in ms) + " |" for row, ms in cases.items()
        ]
        lines += ["", "[kernels/PREDICTED.md](../kernels/PREDICTED.md) has each kernel, and what limits it."]
    if not gpus:
        lines += ["", "## Measured on a GPU", "", "Nothing yet: no kernel here has run on a GPU."]
    for found in gpus:
        lines += ["", f"## Measured: {found['device']}", "", *_markdown(measured(found), "measured")]
        lines += _beside(found)
        if found.get("kernels"):
            lines += ["", "Each kernel's own time, beside its prediction where there is one for this device:", ""]
            lines += ["```", *kernels.table(found["kernels"]), "```"]
    for found in runs:
        lines += ["", f"## All of {found['device']}", "", "```", report.table(found), "```"]
    return "\n".join(lines) + "\n"


def _beside(found: Report) -> list[str]:
    """Lines of a table: our time in each case, beside its prediction, if there is one for this device."""
    lines = []
    for case in CASES.values():
        for shape in SHAPES:
            ms = _value(found, case, shape, OURS, "median_ms")
            said = kernels.predicted(found["device"], case.name, shape)
            if ms is not None and said is not None:
                lines.append(f"| {case.name}, {shape} | {ms:.3g} | {said:.3g} | {ms / said:.2f} |")
    return ["", "| ms | measured | predicted | ratio |", "| --- | --- | --- | --- |", *lines] if lines else []


def _ratio(ratios: dict[str, dict[str, float]], target: Target, shape: str) -> float | None:
    return ratios.get(target.what, {}).get(shape)


def _markdown(table: list[list[str]], what: str) -> list[str]:
    """Lines of a table of `rows`, without those that have no number."""
    some = [cells for cells in table if any(cells[2:])]
    return [
        f"| {what} | target | " + " | ".join(SHAPES) + " |",
        "|" + " --- |" * (2 + len(SHAPES)),
        *("| " + " | ".join(cells) + " |" for cells in some),
    ]


def main() -> None:
    here = Path(__file__).parent
    (here / "RESULTS.md").write_text(markdown(here / "results"))


if __name__ == "__main__":
    main()
