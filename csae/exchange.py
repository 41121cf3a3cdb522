"""A saved SAE takes the place of another one in a folder: after a kill at any moment, the old or the new one loads.

Weights take their names by one rename (`model.safetensors`, or the index of several files, whose names are new ones).
Before it `config.json` would be of other weights, and after it the old one is. So the new one waits beside it:

    1. .config.json.next is written   the old SAE loads, since it is of other weights
    2. the weights take their names   the new SAE loads, with .config.json.next
    3. .config.json.next is renamed   to config.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from csae.errors import UserError
from csae.files import read_json, write_json, writing
from csae.parts import INDEX, NEXT, WEIGHTS, indexed, whole_files
from csae.trained_on import KEY

CONFIG = "config.json"


def about_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts for the header of weights that belong to this content of config.json."""
    return {
        CONFIG: json.dumps({name: of for name, of in config.items() if name != KEY}),
        KEY: json.dumps(config.get(KEY)),
    }


@contextmanager
def exchanged(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, weights with the texts of `about_of(config)` take their names; then config.json gets this content.

    Raises UserError where it can't be written. After an error inside, config.json is as it was.
    """
    write_json(folder / NEXT, config)
    try:
        yield
    except BaseException:
        if waiting(folder) is None:
            with suppress(OSError):
                (folder / NEXT).unlink()
        raise
    with writing(folder / CONFIG):
        os.replace(folder / NEXT, folder / CONFIG)


def config_of(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json, or of the one that was to take its place. Raises as `read_json`."""
    found = waiting(folder)
    return read_json(folder / CONFIG) if found is None else found


def waiting(folder: Path) -> dict[str, Any] | None:
    """The config that a kill kept from its name, where it is that of the weights; None otherwise. Never raises."""
    if not (folder / NEXT).is_file():
        return None
    try:
        found = read_json(folder / NEXT)
        file = folder / WEIGHTS
        weights = whole_files([file]) if file.is_file() else indexed(folder / INDEX, lambda name: folder / name)
    except UserError:
        return None
    theirs = about_of(found).items()
    return found if all(theirs <= header.about.items() for header in weights.headers.values()) else None
