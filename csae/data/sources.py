"""Opening activations from a description that fits in JSON, so that a run can say where its own came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csae.data.activations import ActivationSource, ActivationSources, ModelActivations, OfPlaces
from csae.data.language_model import LanguageModel
from csae.data.places import PLACE_KEYS, Place, in_words, matching, places_in
from csae.data.raw_text import READING, is_text, windows_of_dataset
from csae.data.shard_activations import ShardActivations
from csae.data.shards import read_places
from csae.data.text import TokenWindows, beginning, check_text, read_documents, tokenize
from csae.errors import UserError, shown
from csae.progress import Progress, quiet, say
from csae.trained_on import same_model


def open_source(
    origin: dict[str, Any],
    device: str | None = None,
    progress: Progress = quiet,
    opened: dict[str, Any] | None = None,
) -> tuple[ActivationSource, LanguageModel | None]:
    """The activations that `origin` describes, and the language model where one makes them.

    origin: {"activations": folder}, or {"model", "n_ctx", "max_tokens"} with a place and one of {"text": file or
    folder} and {"dataset": name or folder}. The place is {"layer"}, {"hook"}, for a transcoder {"hook", "hook_to"}, or
    a list {"hooks"}; a name may be a pattern (`csae.data.hook_points`). With a folder, the place says which of those
    in it. A source of several places is one of `csae.data.activations.ActivationSources`. Beside those "keep_first",
    true where position 0 and outliers take part (`csae.data.activations.sink_mask`), and with a model "bos", whether
    windows begin with a beginning of sequence: false if it is not there, null for the tokenizer's own convention
    (`csae.data.text.beginning`), and "lm_dtype", that of the model, such as "bfloat16"; that of `LanguageModel.load` if
    it is not there. How a data set of text is read is in `csae.data.raw_text`; of one that is streamed, these are the
    windows that it holds out. opened: models, streams and windows that are open already, by their names; shared with
    the next call. Raises UserError where a part is missing or does not fit.
    """
    opened = {} if opened is None else opened
    keep_first = bool(origin.get("keep_first"))
    if origin.get("activations") is not None:
        return _of_shards(origin["activations"], keep_first, places_in(origin)), None
    if origin.get("model") is None:
        raise UserError("--model: not given; needed with --text or --dataset (or give --activations DIR)")
    places = asked_places(origin)
    if (origin.get("text") is None) == (origin.get("dataset") is None):
        raise UserError("--text, --dataset: needed one of them (or --activations DIR)")
    _check_there(origin)
    lm = open_model(origin["model"], device, opened, origin.get("lm_dtype"), progress)
    for place in places:
        lm.hook_points.places(*(place if isinstance(place, Place) else (place,)))
    names = ("model", "text", "dataset", "n_ctx", "max_tokens", "bos", *READING)
    of_windows = {name: origin.get(name) for name in names}
    key = f"windows {json.dumps(of_windows, sort_keys=True)} {'bos' in origin}"
    if key not in opened:
        opened[key] = _windows(origin, lm, progress, opened)
    return ModelActivations(lm, places, opened[key], keep_first=keep_first), lm


def asked_places(origin: dict[str, Any]) -> list[int | Place]:
    """The places of a model that `origin` names. Raises UserError where it names none."""
    named = any(origin.get(name) is not None for name in ("hook", "hooks"))
    if not named and origin.get("layer") is None:
        raise UserError("--layer: not given; needed with --text or --dataset, or --hook (or give --activations DIR)")
    return [*places_in(origin)] if named else [origin["layer"]]


def open_model(
    name: str,
    device: str | None = None,
    opened: dict[str, Any] | None = None,
    dtype: str | None = None,
    progress: Progress = quiet,
) -> LanguageModel:
    """The language model of a name; from `opened` where it is there, see `open_source`.

    progress: unless it is quiet, a line says what is loaded.
    """
    opened = {} if opened is None else opened
    key = f"model {name} {device} {dtype}"
    if key not in opened:
        if progress is not quiet:
            say(f"loading {shown(Path(name).name)}")
        opened[key] = LanguageModel.load(name, device, None if dtype is None else getattr(torch, dtype))
    return opened[key]


def _check_there(origin: dict[str, Any]) -> None:
    """Raises UserError where a text, or a data set that nobody opened yet, isn't there: before a model is loaded."""
    if origin.get("text") is not None:
        check_text(origin["text"])
    elif not origin.get("stream"):
        is_text(origin)


def _of_shards(folder: str, keep_first: bool, wanted: list[Place]) -> ShardActivations:
    """Of a folder that holds several places those that were asked for; all where none was."""
    hooks = list(read_places(folder))
    if not hooks or not wanted:
        return ShardActivations(folder, keep_first)
    chosen: dict[Place, None] = {}
    for place in wanted:
        from_, to = matching(place.hook, hooks), matching(place.to, hooks) if place.to else None
        if not from_ or to == []:
            raise UserError(
                f"hook {shown(str(place))}: {shown(folder)} holds {shown(', '.join(hooks))}; needed one of them"
            )
        if to is not None and len(to) != len(from_):
            raise UserError(f"--from, --to: {len(from_)} and {len(to)} places of the activations; needed as many")
        chosen |= {Place(hook, None if to is None else to[number]): None for number, hook in enumerate(from_)}
    return ShardActivations(folder, keep_first, list(chosen))


def same_windows(source: ActivationSource) -> Any:
    """A key that is equal for sources which `joined` can join; each other source has its own."""
    if type(source) is ModelActivations:
        return id(source.lm), id(source.token_windows), source.batch_size, source.keep_first
    if type(source) is ShardActivations:
        return source.folder.resolve(), source.keep_first
    return id(source)


def joined(
    sources: Sequence[ActivationSource],
) -> tuple[ActivationSource | ActivationSources, list[Place | None]]:
    """One source of all the places of several that have the same windows, and the place of each in it.

    The place is None where they have but one, and where the sources are all the same.
    """
    first = sources[0]
    if not isinstance(first, (ModelActivations, ShardActivations)):
        return first, [None] * len(sources)
    places = [one.places[0] for one in sources if isinstance(one, OfPlaces)]
    several = list(dict.fromkeys(places))
    if len(several) == 1:
        return first, [None] * len(sources)
    if isinstance(first, ModelActivations):
        whole = ModelActivations(first.lm, several, first.token_windows, first.batch_size, first.keep_first)
        return whole, [*places]
    return ShardActivations(first.folder, first.keep_first, several), [*places]


def check_said(given: dict[str, Any], source: ActivationSource) -> None:
    """Raises UserError where what was given beside --activations is not what those say of themselves."""
    if given.get("activations") is None:
        return
    said = source.describe()
    asked, known = places_in(given), places_in(said)
    if given.get("hook") is not None and known and not matching(asked[0].hook, [known[0].hook]):
        raise UserError(
            f"--hook: given {shown(asked[0].hook)}, but the activations say {shown(in_words(known[0].hook))}: "
            "leave the option out, or give other activations"
        )
    for name in ("model", "layer", "n_ctx"):
        one, other = given.get(name), said.get(name)
        if one is None or other is None or one == other:
            continue
        if name != "model" or not same_model(str(one), str(other)):
            raise UserError(
                f"--{name.replace('_', '-')}: given {shown(one)}, but the activations say {shown(other)}: "
                "leave the option out, or give other activations"
            )


def remembered(origin: dict[str, Any], source: ActivationSource) -> dict[str, Any]:
    """`origin` for a run to keep: with the place by its one name, and with `bos` as the source resolved it.

    source: of one place. bos becomes true or false, never "by convention".
    """
    about = source.describe()
    kept = {name: value for name, value in origin.items() if name not in ("bos", "keep_first")}
    if "hook" in kept or "hooks" in kept:
        kept = {name: value for name, value in kept.items() if name not in PLACE_KEYS}
        kept |= {name: about[name] for name in PLACE_KEYS if name in about}
    return kept | {name: True for name in ("bos", "keep_first") if about.get(name)}


def _windows(origin: dict[str, Any], lm: LanguageModel, progress: Progress, opened: dict[str, Any]) -> TokenWindows:
    n_ctx, max_tokens = origin["n_ctx"], origin.get("max_tokens")
    if lm.max_ctx is not None and n_ctx > lm.max_ctx:
        raise UserError(f"--n-ctx: given {n_ctx}; the context of {lm.name} is {lm.max_ctx} tokens at most")
    begin = beginning(lm.tokenizer, origin.get("bos", False), lm.n_vocab)
    if origin.get("dataset") is not None:
        return windows_of_dataset(origin, lm, begin, progress, opened)
    documents = read_documents(origin["text"])
    return tokenize(documents, lm.tokenizer, n_ctx, max_tokens, progress=progress, begin=begin)
