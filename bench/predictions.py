"""What was predicted without a GPU, in predictions.json: by device, row and shape; and the table that compares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREDICTIONS = Path(__file__).with_name("predictions.json")

Row = dict[str, Any]
"""shape; op; kernel: "" for the whole op; launches: how many in one run; ms; predicted_ms: None where there is none."""


def predicted(device: str, row: str, shape: str) -> float | None:
    """Milliseconds; None if nothing was predicted for this device. row: a case, an op, or "op: kernel"."""
    found = json.loads(PREDICTIONS.read_text())["devices"].get(device, {})
    return found.get("ms", {}).get(row, {}).get(shape)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table: measured beside predicted."""
    lines = [f"{'':<48}{'launches':>9}{'measured':>12}{'predicted':>12}{'ratio':>8}"]
    for one in rows:
        name = f"{one['shape']}  {one['op'] if not one['kernel'] else '  ' + one['kernel']}"
        said = "" if one["predicted_ms"] is None else f"{one['predicted_ms']:.3g} ms"
        ratio = "" if one["predicted_ms"] is None else f"{one['ms'] / one['predicted_ms']:.2f}"
        lines.append(f"{name:<48}{one['launches']:>9}{one['ms']:>9.3f} ms{said:>12}{ratio:>8}")
    return lines
