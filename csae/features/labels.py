"""Labels that a person writes for features: RUN/labels.json, {"123": "dates", ...}."""

from __future__ import annotations

from pathlib import Path

from csae.errors import UserError, shown
from csae.files import read_json

LABELS = "labels.json"
LONGEST = 200  # characters


def read_labels(run: Path, d_sae: int) -> dict[int, str]:
    """The labels beside a run, by feature; none where there is no such file.

    Raises UserError where the file is not an object of texts by feature numbers below d_sae, each one line of LONGEST
    characters or less.
    """
    file = run / LABELS
    if not file.exists():
        return {}
    found = {}
    for name, label in read_json(file).items():
        where = f"{file}: {shown(repr(name))[:40]}"
        if not (name.isascii() and name.isdigit() and str(int(name)) == name and int(name) < d_sae):
            raise UserError(f"{where}: needed the number of a feature, 0 to {d_sae - 1}: correct it")
        if not isinstance(label, str) or not label.strip():
            raise UserError(
                f"{where}: its label is {shown(repr(label))[:40]}; needed a text: correct it, or leave it out"
            )
        if len(label) > LONGEST or shown(label) != label:
            raise UserError(
                f"{where}: its label has {len(label)} characters; needed one line of {LONGEST} or fewer, and no "
                "controls"
            )
        found[int(name)] = label.strip()
    return found
