"""Names of hook points, without a model: see `csae.data.hook_points` for what they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

SHORT_FORM = re.compile(r"(resid|mlp|attn)\.(in|out):(\d+)")
PLACE_KEYS = ("layer", "hook", "hook_to", "hooks")
"""what says in JSON where activations are of: see `described_place`; "hooks" is a list of several names or patterns"""


class Place(NamedTuple):
    """Where an SAE reads, and what it reconstructs."""

    hook: str
    """the name of a hook point"""
    to: str | None = None
    """a transcoder's: the hook point that it predicts"""

    def __str__(self) -> str:
        return self.hook if self.to is None else f"{self.hook} to {self.to}"


def name_of_layer(layer: int) -> str:
    """The hook point of the residual stream after `layer` blocks: layer 12 is resid.out:11."""
    return f"resid.out:{layer - 1}"


def layer_of(name: str) -> int | None:
    """After how many blocks a hook point is the residual stream: 12 of resid.out:11; None of another."""
    found = SHORT_FORM.fullmatch(name)
    return int(found[3]) + 1 if found and (found[1], found[2]) == ("resid", "out") else None


def in_words(name: str, of: str = "") -> str:
    """A hook point, of a model, as it is shown: "layer 12 of gpt2 (resid.out:11)", "mlp.out:11 of gpt2"."""
    layer, of = layer_of(name), of and f" of {of}"
    return f"{name}{of}" if layer is None else f"layer {layer}{of} ({name})"


def described_place(place: Place) -> dict[str, Any]:
    """A place as JSON: {"layer"} of a stream after a block, else {"hook"}, and of a transcoder {"hook_to"}."""
    layer = layer_of(place.hook)
    if place.to is not None:
        return {"hook": place.hook, "hook_to": place.to}
    return {"hook": place.hook} if layer is None else {"layer": layer}


def places_in(described: dict[str, Any]) -> list[Place]:
    """The names and patterns that `described_place`, or a list "hooks", gave; none where it says nothing."""
    if described.get("hooks"):
        return [Place(name) for name in described["hooks"]]
    hook, layer = described.get("hook"), described.get("layer")
    if isinstance(hook, str) and hook != "resid_post":
        return [Place(hook, described.get("hook_to"))]
    return [Place(name_of_layer(layer))] if isinstance(layer, int) and layer > 0 else []


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of some names that a name or a pattern stands for."""
    names = list(names)
    return [pattern] if pattern in names else [name for name in names if _as_regex(pattern).fullmatch(name)]


def _as_regex(pattern: str) -> re.Pattern[str]:
    """A pattern with `*`, `?` and `[...]`, which fit anything but the dots and colons between parts of a name."""
    parts = re.findall(r"\[!?[^\]]+\]|.", pattern)
    wild = {"*": r"[^.:]*", "?": r"[^.:]"}
    return re.compile(
        "".join(wild.get(part) or (part.replace("[!", "[^", 1) if len(part) > 1 else re.escape(part)) for part in parts)
    )
