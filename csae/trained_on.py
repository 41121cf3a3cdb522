"""What an SAE was trained on: kept with it, shown on its card, and compared with where it is used.

Nothing in it names a folder of a machine: of a path only the last part is kept.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import csae
from csae.data.places import PLACE_KEYS, Place, in_words, layer_of, name_of_layer, our_name, places_in
from csae.errors import UserError, shown

KEY = "trained_on"
ASKED = "elsewhere=True (--elsewhere)"
RESIDUAL = "resid_post"  # the residual stream after `layer` blocks


@dataclass(frozen=True)
class TrainedOn:
    """What an SAE was trained on; None where it is not known."""

    model: str | None = None
    """the language model: a hub id, or the name of its folder or file"""
    layer: int | None = None
    """after how many of its blocks"""
    hook: str | None = None
    """which activations: "resid_post", the residual stream after `layer` blocks; or the name of another hook point
    (`csae.data.hook_points`), or what others call it"""
    n_ctx: int | None = None
    """positions a window"""
    data: str | None = None
    """the text, data set or folder of activations"""
    bos: bool | None = None
    """whether windows begin with the model's beginning-of-sequence token"""
    keep_first: bool | None = None
    """whether position 0 takes part"""
    version: str | None = None
    """of csae"""
    train_fvu: float | None = None
    """fraction of variance unexplained of the last training batch, in the exact form"""
    held_out_fvu: float | None = None
    """the same of windows that were held out, as `csae eval` measured it"""
    hook_to: str | None = None
    """a transcoder's: the hook point that it predicts"""

    @classmethod
    def of(cls, described: dict[str, Any], origin: dict[str, Any] | None = None) -> TrainedOn:
        """From what a source of activations says of itself (`describe()`), and from where it was opened."""
        opened = {name: value for name, value in (origin or {}).items() if value is not None}
        if described.get("layer") is not None or described.get("hook") is not None:
            opened = {name: value for name, value in opened.items() if name not in PLACE_KEYS}
        known = {**described, **opened}
        model, layer = known.get("model"), known.get("layer")
        hook = known.get("hook")
        if isinstance(hook, str):
            of_hook, hook = hook_place(hook)
            layer = of_hook if layer is None else layer
        elif model is not None or layer is not None:
            hook = RESIDUAL
        return cls(
            model=None if model is None else model_name(str(model)),
            layer=layer if isinstance(layer, int) and not isinstance(layer, bool) else None,
            hook=None if hook is None else shown(hook),
            n_ctx=_whole(described.get("n_ctx", known.get("n_ctx"))),
            data=data_name(known),
            bos=_flag(known, "bos"),
            keep_first=_flag(known, "keep_first"),
            version=csae.__version__,
            hook_to=None if known.get("hook_to") is None else shown(known["hook_to"]),
        )

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> TrainedOn | None:
        """From what a saved config says; None where it does not. Raises UserError where it says something else."""
        found = config.get(KEY)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise UserError(f"{where}: {KEY} is {shown(repr(found))[:60]}; needed an object, or nothing")
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("model", "hook", "hook_to", "data", "version"), (str,)),
            **dict.fromkeys(("layer", "n_ctx"), (int,)),
            **dict.fromkeys(("bos", "keep_first"), (bool,)),
            **dict.fromkeys(("train_fvu", "held_out_fvu"), (int, float)),
        }
        # What a later version adds is left out.
        known = {name: found[name] for name in kinds if found.get(name) is not None}
        for name, value in known.items():
            if not isinstance(value, kinds[name]) or (isinstance(value, bool) and bool not in kinds[name]):
                raise UserError(f"{where}: {name} in {KEY} is {shown(repr(value))[:60]}; needed another type")
        return cls(**known)

    def to_config(self) -> dict[str, Any]:
        """What config.json holds of it: what is known."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def place(self) -> str:
        """Where the activations are from, in words; without what is not known."""
        return _place(self.model, self.layer, self.hook, self.hook_to)

    def place_name(self) -> str | None:
        """The hook point, or pair of them, by the names that are known, and what TransformerLens calls a layer's."""
        if (place := self.at()) is None:
            return self.hook
        layer = layer_of(place.hook)
        return str(place) if layer is None else f"{place} (blocks.{layer - 1}.hook_resid_post)"

    def at(self) -> Place | None:
        """The hook point, or pair of them, by the names that are known; None where no layer or name is."""
        where = {"layer": self.layer, "hook": self.hook, "hook_to": self.hook_to}
        return next(iter(places_in(where)), None)


def check_place(
    trained_on: TrainedOn | None,
    model: str | None,
    layer: int | None,
    hook: str | None = None,
    elsewhere: bool = False,
    hook_to: str | None = None,
    names: Callable[[str], str] = str,
) -> None:
    """Raises UserError where an SAE is used on other activations than it was trained on, unless `elsewhere`.

    model, layer, hook, hook_to: where it is used; None where not known. names: a hook point's one name by any of its
    names, where the model is at hand that says it (`csae.data.hook_points.HookPoints.one_name`).
    """
    if trained_on is None or elsewhere or (model is None and layer is None and hook is None):
        return
    if hook is None and layer is not None:
        hook = RESIDUAL
    elif hook is not None and layer_of(hook) is not None:
        layer, hook = layer_of(hook), RESIDUAL
    here = TrainedOn(model=None if model is None else model_name(model), layer=layer, hook=hook, hook_to=hook_to)
    other = trained_on.model is not None and model is not None and not same_model(trained_on.model, model)
    one, another = trained_on.at(), here.at()
    if one is None or another is None or [*map(_known_by(names), one)] != [*map(_known_by(names), another)]:
        other |= trained_on.layer is not None and layer is not None and trained_on.layer != layer
        other |= trained_on.hook is not None and hook is not None and trained_on.hook != hook
        other |= trained_on.hook_to != hook_to and hook is not None
    if other:
        raise UserError(
            f"the SAE was trained on {trained_on.place()}, and this is {here.place()}: use it there, or give {ASKED}"
        )
    if trained_on.data is not None and trained_on.model is None and trained_on.layer is None:
        raise UserError(
            f"the SAE was trained on the activations in {trained_on.data!r}, which don't say what they are of, and "
            f"this is {here.place()}: give {ASKED} if they are of the same"
        )


def _known_by(names: Callable[[str], str]) -> Callable[[str | None], str | None]:
    return lambda name: None if name is None else names(name)


# The key under which another library's config keeps all of it, and what the library itself calls the parts.
ELSEWHERE_KEY = "csae_trained_on"
MODEL_KEYS = ("model_name", "lm_name", "model")
HOOK_KEYS = ("hook_name", "hook_point", "hookpoint", "submodule_name")


def named_in(metadata: dict[str, Any]) -> TrainedOn | None:
    """What the metadata of another library say of where an SAE is of; None where nothing.

    Their layers count from 0: layer 11 is that of the block whose output is our layer 12.
    """
    model = next((metadata[key] for key in MODEL_KEYS if isinstance(metadata.get(key), str)), None)
    name = next((metadata[key] for key in HOOK_KEYS if isinstance(metadata.get(key), str)), None)
    layer, hook = (None, None) if name is None else hook_place(name)
    if layer is None:
        block = next(
            (found for key in ("layer", "hook_layer") if (found := _whole(metadata.get(key))) is not None), None
        )
        layer = None if block is None else block + 1
    if model is None and layer is None and hook is None:
        return None
    return TrainedOn(
        model=None if model is None else model_name(model),
        layer=layer,
        hook=hook or (None if layer is None else RESIDUAL),
        n_ctx=_whole(metadata.get("context_size")),
        bos=_flag(metadata, "prepend_bos"),
    )


def model_name(name: str) -> str:
    """What a model is called wherever it lies: a hub id as it is, of a path the last part."""
    path = Path(name).expanduser()
    cached = re.search(r"models--(.+)/snapshots/[^/]+/?$", name)  # the hub's cache: models--org--name/snapshots/hash
    if cached:
        return shown(cached[1].replace("--", "/"))
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".gguf") or path.exists()
    return shown(path.name or path.resolve().name) if is_path else shown(name)


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: a hub id, the name of its folder, its name in TransformerLens, a .gguf file.

    Owners, capitals and punctuation don't count, nor does how a .gguf file is quantised.
    """
    return _stem(one) == _stem(other)


def _stem(name: str) -> str:
    last = model_name(name).rpartition("/")[2].lower().removesuffix(".gguf")
    last = re.sub(r"[.\-_](i?q\d\w*|f16|f32|bf16|fp16)$", "", last)
    return {"gpt2small": "gpt2"}.get(stem := re.sub(r"[^a-z0-9]", "", last), stem)


def data_name(known: dict[str, Any]) -> str | None:
    """What the data is called: as it says, or by its text, data set or folder; of a path the last part."""
    if known.get("data") is not None:
        return shown(known["data"])
    if known.get("dataset") is not None and not Path(known["dataset"]).exists():
        return shown(known["dataset"])  # a hub id
    for name in ("text", "dataset", "activations", "folder"):
        if known.get(name) is not None:
            return shown(Path(known[name]).name or Path(known[name]).resolve().name)
    return None


def hook_place(name: str) -> tuple[int | None, str]:
    """The layer, counted in blocks that were run, and the kind of a hook point, as other libraries name it.

    TransformerLens: blocks.11.hook_resid_post is layer 12, blocks.12.hook_resid_pre too. Modules: model.layers.11,
    transformer.h.11, layers.11. dictionary_learning: resid_post_layer_11. blocks.0.hook_resid_pre, which comes before
    layer 1, is resid.in:0. Others keep their name as the kind.
    """
    if re.fullmatch(r"(hook_)?(resid_post|resid_pre)", name):
        return None, RESIDUAL
    known = our_name(name)
    if known != name and (layer := layer_of(known)) is not None:
        return layer, RESIDUAL
    if known == "resid.in:0":
        return None, known
    if found := re.fullmatch(r"(?:[\w.]+\.)?(?:layers|layer|h|blocks)\.(\d+)", name):
        return int(found[1]) + 1, RESIDUAL
    block_of = re.search(r"(?:layers|layer|h|blocks)[._](\d+)", name)
    return (None if block_of is None else int(block_of[1]) + 1), name


def _place(model: str | None, layer: int | None, hook: str | None, hook_to: str | None) -> str:
    if hook in (None, RESIDUAL):
        if layer is not None and layer > 0 and hook_to is None:
            return in_words(name_of_layer(layer), model or "")
        where = " of ".join(part for part in ("" if layer is None else f"layer {layer}", model) if part)
        return where or "an unknown place"
    named = str(hook) if hook_to is None else f"{hook} to {hook_to}"
    # A name that says which block it is of says all.
    of_layer = "" if layer is None or re.search(r"\d", named) else f"layer {layer}"
    return " of ".join(part for part in (named, of_layer, model) if part)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _flag(known: dict[str, Any], name: str) -> bool | None:
    # Our own sources, which hash their windows, say it where it is so.
    value = known.get(name, False if "windows_sha256" in known else None)
    return value if isinstance(value, bool) else None


def card(sae: Any) -> str:
    """The README.md of a saved SAE (`csae.SAE`): what it is, and what it was trained on."""
    on: TrainedOn = sae.trained_on or TrainedOn()
    hub_id = on.model is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", on.model, re.ASCII)
    head = ["---", "library_name: csae", "tags:", "- sparse-autoencoder", f"- {sae.arch}"]
    head += ["- transcoder"] if sae.is_transcoder else []
    head += [f"base_model: {on.model}", "---"] if hub_id else ["---"]
    kind = "Contextual" if sae.arch == "contextual" else "TopK"
    kind += " transcoder" if sae.is_transcoder else " SAE"
    of = f" of {on.place()}" if on.model is not None or on.layer is not None else ""
    facts = {
        "model": on.model,
        "layer": on.layer,
        "hook point": on.place_name(),
        "data": on.data,
        "positions a window": on.n_ctx,
        "windows begin with the BOS token": on.bos,
        "position 0 takes part": on.keep_first,
        "k": sae.k,
        "selection": None if sae.selection == "topk" else sae.selection,
        "d_in": sae.d_in,
        "d_out": sae.d_out if sae.is_transcoder else None,
        "skip connection": sae.skip if sae.is_transcoder else None,
        "d_sae": sae.d_sae,
        "Matryoshka prefixes": ", ".join(map(str, sae.prefixes)) or None,
        "FVU, held-out": None if on.held_out_fvu is None else f"{on.held_out_fvu:.4f}",
        "FVU, last training batch": None if on.train_fvu is None else f"{on.train_fvu:.4f}",
        "csae": on.version,
    }
    rows = [f"| {name} | {table_cell(value)} |" for name, value in facts.items() if value is not None]
    return "\n".join([*head, f"# {kind}{table_cell(of)}", "", "| | |", "|---|---|", *rows]) + "\n"


def table_cell(value: object) -> str:
    """A value in a table of Markdown, as text: nothing in it is a link, a tag or another cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return re.sub(r"([|<>`\[\]*\\])", r"\\\1", shown(value))
