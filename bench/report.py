"""The results of a run: a table, JSON, a plot, and the comparison of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from csae.errors import UserError

from .harness import Report

TOP_LEVEL = ("device", "versions", "ceilings", "results")
OF_A_RESULT = ("case", "shape", "dtype", "impl")
# A median that changed by a smaller share counts as the same, and so does one that changed by less than the spreads.
NOISE = 0.03


def table(report: Report) -> str:
    """A block for each case and shape, a line for each implementation."""
    ceilings = report["ceilings"]
    lines = [
        f"{report['device']}, {report['threads']} threads, torch {report['versions']['torch']}: "
        f"{ceilings['operations_per_s'] / 1e12:.3g} TFLOP/s in {ceilings['dtype']}, "
        f"{ceilings['bytes_per_s'] / 1e9:.3g} GB/s"
    ]
    last = None
    for result in report["results"]:
        block = (result["case"], result["shape"]["name"], result["dtype"])
        if block != last:
            last = block
            lines += ["", f"{result['case']}, {_shape(result['shape'])}, {result['dtype']}"]
            lines += [f"  {'':<42}{'median':>10}{'spread':>12}{'x ours':>8}{'of floor':>10}{'peak':>10}"]
        lines += [_line(result)]
    return "\n".join(lines)


def _line(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"  {result['impl']:<42}not timed: {result['skipped']}"
    ratio, peak = result["ratio_to_ours"], result["peak_bytes"]
    return (
        f"  {result['impl']:<42}{_ms(result['median_ms']):>10}{_ms(result['spread_ms']):>12}"
        f"{'' if ratio is None else f'{ratio:.2f}':>8}{result['share_of_floor']:>10.0%}"
        f"{'' if peak is None else f'{peak / 2**20:.0f} MiB':>10}"
    )


def _ms(time: float) -> str:
    return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"


def _shape(shape: dict[str, Any]) -> str:
    return f"{shape['name']} (n={shape['n']}, d_in={shape['d_in']}, d_sae={shape['d_sae']}, k={shape['k']})"


def write(report: Report, file: Path) -> None:
    """As JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> Report:
    """A report that `write` wrote. Raises UserError, saying what is wrong, for anything else."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}): give a file that `csae bench` wrote") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}): give a file that `csae bench` wrote") from error
    lacking = [name for name in TOP_LEVEL if not isinstance(report, dict) or name not in report]
    if not lacking:
        lacking = sorted({name for result in report["results"] for name in OF_A_RESULT if name not in result})
    if lacking:
        raise UserError(f"{file}: no results of `csae bench`: it lacks {', '.join(lacking)}")
    return report


def compare(before: Report, after: Report) -> str:
    """The ratio of each result that both reports have, and whether it is faster or slower.

    Raises UserError where the devices differ, or no case was measured at one shape and dtype in both.
    """
    if before["device"] != after["device"]:
        raise UserError(
            f"they were measured on {before['device']} and on {after['device']}: compare results of one device"
        )
    old_ones, new_ones = _timed(before), _timed(after)
    common = [key for key in old_ones if key in new_ones]
    if not common:
        shapes = [sorted({_shape(r["shape"]) for r in report["results"]}) for report in (before, after)]
        raise UserError(
            f"nothing was measured in both: one has {', '.join(shapes[0]) or 'nothing'}, the other "
            f"{', '.join(shapes[1]) or 'nothing'}: measure the same shapes and cases"
        )
    lines = [f"{before['device']}: time after / time before"]
    changes = [
        f"{name}: {before['versions'].get(name, 'none')} -> {after['versions'].get(name, 'none')}"
        for name in sorted(before["versions"].keys() | after["versions"].keys())
        if before["versions"].get(name) != after["versions"].get(name)
    ]
    if before.get("threads") != after.get("threads"):
        lines += [f"threads differ: {before.get('threads')} -> {after.get('threads')}"]
    if changes:
        lines += [f"versions differ: {', '.join(changes)}"]
    for key in sorted(common, key=lambda key: new_ones[key]["median_ms"] / old_ones[key]["median_ms"]):
        old, new = old_ones[key], new_ones[key]
        ratio = new["median_ms"] / old["median_ms"]
        moved = abs(new["median_ms"] - old["median_ms"])
        steady = abs(ratio - 1) < NOISE or moved < max(old["spread_ms"], new["spread_ms"])
        verdict = "same" if steady else "faster" if ratio < 1 else "SLOWER"
        lines += [
            f"  {ratio:5.2f}  {verdict:<7} {_ms(old['median_ms']):>9} -> {_ms(new['median_ms']):<9} "
            f"{new['case']}, {new['shape']['name']}, {new['dtype']}: {new['impl']}"
        ]
    for which, here, there in (("before", old_ones, new_ones), ("after", new_ones, old_ones)):
        lines += [
            f"  only {which}: {r['case']}, {r['shape']['name']}, {r['dtype']}: {r['impl']}"
            for key, r in here.items()
            if key not in there
        ]
    return "\n".join(lines)


def _timed(report: Report) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """The results that have a time, by case, shape, dtype and implementation."""
    return {
        (r["case"], json.dumps(r["shape"], sort_keys=True), r["dtype"], r["impl"]): r
        for r in report["results"]
        if "skipped" not in r
    }


def draw(report: Report, file: Path) -> None:
    """A panel a case and shape: a bar for each implementation, in units of our time, and the floor.

    file: .svg or .png. Needs matplotlib.
    """
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in report["results"]:
        if "skipped" not in result:
            panels.setdefault((result["case"], result["shape"]["name"], result["dtype"]), []).append(result)
    if not panels:
        raise UserError("nothing was timed: there is nothing to draw")
    bars = [len(results) for results in panels.values()]
    figure, grid = plt.subplots(
        len(panels), figsize=(8, 0.7 * len(panels) + 0.26 * sum(bars) + 0.6), height_ratios=bars,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes, ((case, shape, dtype), results) in zip(grid[:, 0], panels.items(), strict=True):
        colours = ["#2f6fb3" if r["impl"].startswith("csae") else "#7f8c9b" for r in results]
        medians = [r["median_ms"] for r in results]
        axes.barh(range(len(results)), medians, color=colours, height=0.7)
        for place, r in enumerate(results):
            ratio = "" if r["ratio_to_ours"] is None else f", {r['ratio_to_ours']:.2f} x ours"
            text = f"{_ms(r['median_ms'])}{ratio}"
            axes.annotate(text, (r["median_ms"], place), xytext=(4, 0), textcoords="offset points", va="center", size=7)
        axes.axvline(results[0]["floor_ms"], color="#c0392b", linewidth=1)
        axes.set_yticks(range(len(results)), [r["impl"] for r in results], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(medians))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"{case}, shape {shape}, {dtype} (ms; red: the floor)", fontsize=8, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report["device"], fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
