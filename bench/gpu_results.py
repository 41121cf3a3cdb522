"""What the cases of `make gpu` found, put together: one JSON file for the device, and RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report, targets
from .harness import Report


def of_gpu(found: Report) -> bool:
    """Whether it is of a GPU, or of a rehearsal."""
    return found.get("type") in ("cuda", "rehearsal")


def together(parts: Sequence[dict[str, Any]]) -> Report | None:
    """One report of what the cases found, in their order; None before the device is known.

    A result takes the place of an earlier one of the same implementation, unless it has no time and the other has. So
    what was measured with tuned tiles counts.
    """
    reports = [part["report"] for part in parts if "report" in part]
    if not reports:
        return None
    ceilings = dict(reports[0]["ceilings"])
    results: dict[tuple[str, ...], dict[str, Any]] = {}
    for found in reports:
        for name in ("operations_per_s", "bytes_per_s"):
            ceilings[name] = max(ceilings[name], found["ceilings"][name])
        for result in found["results"]:
            key = (result["case"], result["shape"]["name"], result["dtype"], result["impl"])
            if "median_ms" in result or key not in results:
                results[key] = result
    blocks = {key[:3]: place for place, key in reversed(list(enumerate(results)))}  # where each case and shape begins
    in_order = [results[key] for key in sorted(results, key=lambda key: blocks[key[:3]])]
    rows = [row for part in parts for row in part.get("kernels", [])]
    return reports[0] | {"ceilings": ceilings, "results": in_order} | ({"kernels": rows} if rows else {})


def write(parts: Sequence[dict[str, Any]], folder: Path, table: Path) -> list[Path]:
    """Write them; returns the files. None before the device is known."""
    found = together(parts)
    if found is None:
        return []
    file = folder / f"{found['device'].replace(' ', '-').replace('/', '-')}.json"
    report.write(found, file)
    table.write_text(targets.markdown(folder))
    return [file, table]
