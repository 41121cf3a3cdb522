"""Names of hook points, without a model: see `csae.data.hook_points` for what they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

SHORT_FORM = re.compile(r"(resid|mlp|attn)\.(in|out):(\d+)", re.ASCII)
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


OTHERS_NAMES = re.compile(
    r"blocks\.(?P<block>\d+)\.hook_(?P<kind>resid_pre|resid_post|mlp_out|attn_out)"
    r"|(?P<kind2>resid_pre|resid_post|resid_in|mlp_in|mlp_out|attn_in|attn_out)_layer_(?P<block2>\d+)"
)
"""TransformerLens's and SAELens's names; dictionary_learning's, and those that we write in its way"""


def our_name(hook: str) -> str:
    """The short form of a hook point where another library's name says which it is; else the name as it is."""
    found = OTHERS_NAMES.fullmatch(hook)
    if not found:
        return hook
    (part, _, side), block = (found["kind"] or found["kind2"]).partition("_"), int(found["block"] or found["block2"])
    if part != "resid":
        return f"{part}.{side}:{block}"
    if side == "post":
        return f"resid.out:{block}"
    return f"resid.out:{block - 1}" if block else "resid.in:0"


IN_TRANSFORMER_LENS = {
    r"blocks\.(\d+)\.hook_(mlp|attn)_out": "what {1} adds to the stream; a norm or a factor comes between here, so "
    "{1}.out:{0} is not the same: name that, or the norm's module",
    r"blocks\.(\d+)\.hook_resid_mid": "the stream between attention and MLP; name the norm before the MLP by its path, "
    "with .in behind it",
    r"blocks\.(\d+)\.hook_(mlp|attn)_in": "the stream before the norm; {1}.in:{0} is what comes behind the norm",
    r"blocks\.(\d+)\.ln[12](_post)?\.hook_\w+": "a part of a norm, which depends on how it was loaded there; name the "
    "norm's module by its path",
    r"blocks\.(\d+)\.attn\.hook_z": "what the heads give; name the projection that takes it by its path, with "
    ".in behind it",
    r"blocks\.(\d+)\.mlp\.hook_(pre|post|pre_linear)": "a part of the MLP; name the module that gives it by its path, "
    "or the one that takes it, with .in behind it",
    r"blocks\.(\d+)\.(attn\.hook_\w+|hook_[qkv]_\w+)": "a part of attention that no module gives as [B, T, width]",
    r"ln_final\.hook_\w+": "a part of the last norm; name that module by its path",
    r"hook_(pos_)?embed": "the embedding; resid.in:0 is what the first block is given",
}
"""TransformerLens's other names, as patterns, and what to say of each"""


def in_transformer_lens(name: str) -> str | None:
    """What is to be said of a name of TransformerLens's that stands for no hook point of ours; None of another."""
    for pattern, words in IN_TRANSFORMER_LENS.items():
        if found := re.fullmatch(pattern, name):
            return words.format(*found.groups())
    return None


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
