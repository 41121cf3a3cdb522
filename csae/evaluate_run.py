"""Evaluating a run: on the windows that it held out, or on other data, without the windows that it trained on."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csae.data.activations import ActivationSource, held_out
from csae.data.language_model import LanguageModel
from csae.data.places import PLACE_KEYS, Place, places_in
from csae.data.seen import Seen, hashes_of, read_seen
from csae.data.sources import check_said, joined, open_model, open_source, same_windows
from csae.distributed.ranks import Ranks
from csae.errors import UserError, shown
from csae.evaluate import Subject, evaluate_together
from csae.files import read_json, write_json
from csae.progress import Progress, quiet
from csae.run import RUN
from csae.sae import SAE
from csae.saving import CONFIG
from csae.trained_on import KEY, data_name

HELD_OUT, NOT_TRAINED_ON, ASKED_FOR, UNKNOWN = "held out", "not trained on", "asked for", "unknown"
HASHED_AT_ONCE = 64
DATA = ("activations", "text", "dataset")
KINDS: dict[str, Any] = dict.fromkeys((*DATA, "model", "lm_dtype", "hook", "hook_to"), str)
KINDS |= dict.fromkeys(("layer", "n_ctx", "max_tokens"), int)
KINDS |= {"held_out": int | float}
# Two descriptions of the same windows may differ in these: how they are read, and where they lie.
NOT_DATA = ("dtype", "batch_size", "folder", "model")


class Chosen(NamedTuple):
    """The windows of a source to evaluate a run on."""

    windows: list[int]
    which: str
    """one of HELD_OUT, NOT_TRAINED_ON, ASKED_FOR, UNKNOWN"""
    trained: int | None
    """how many of them are windows that the run trained on; None where that can't be told"""
    left_out: int
    """how many were left out, as the run trained on them"""


def evaluate_run(
    run: Path | str,
    sae: SAE,
    given: dict[str, Any] | None = None,
    n_windows: int = 256,
    ce_windows: int = 16,
    trained_windows: bool = False,
    elsewhere: bool = False,
    device: str | None = None,
    progress: Progress = quiet,
    opened: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of a trained SAE (`csae.evaluate`), and what they were measured on.

    Args:
        run: its folder, or the hub id that it was loaded from.
        given: other data than the run held out, or other settings, as `csae.data.sources.open_source` takes them.
        n_windows: at most so many.
        trained_windows: evaluate also on windows that the run trained on.
        elsewhere: as `csae.evaluate.evaluate`.
        opened: models and sources that are open already, to be shared by the next call.

    Returns what `evaluate` does, and: which, "held out" where the windows are those that the run held out, "not trained
    on" where they are others, "asked for" with trained_windows, "unknown" where it can't be told, as the run does not
    say what it trained on, or on windows of another length. trained_windows: how many of them are windows that it
    trained on, None where that can't be told; among held-out ones these are repetitions in the text.
    left_out_windows: how many were left out for that.

    Raises UserError where it is not known what to evaluate on, or all of it was trained on.
    """
    how = (given, n_windows, ce_windows, trained_windows, elsewhere, device, progress, opened)
    return evaluate_runs([(run, sae)], *how)[0]


def evaluate_runs(
    runs: Sequence[tuple[Path | str, SAE]],
    given: dict[str, Any] | None = None,
    n_windows: int = 256,
    ce_windows: int = 16,
    trained_windows: bool = False,
    elsewhere: bool = False,
    device: str | None = None,
    progress: Progress = quiet,
    opened: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """What `evaluate_run` gives for each of several runs, in less time.

    Runs that are evaluated on the same windows are evaluated together: the language model reads these once for all
    places, and makes its own losses once (`csae.evaluate.evaluate_together`). ranks: all call this, with the same runs.
    """
    opened = {} if opened is None else opened
    asked = [
        _asked(run, sae, given or {}, n_windows, trained_windows, elsewhere, device, progress, opened)
        for run, sae in runs
    ]
    found: list[dict[str, Any]] = [{} for _ in asked]
    for numbers in _alike(asked):
        together = [asked[number] for number in numbers]
        source, places = joined([one.source for one in together])
        subjects = [
            Subject(one.sae, shown(one.run), place, one.layer) for one, place in zip(together, places, strict=True)
        ]
        first = together[0]
        results = evaluate_together(
            *(subjects, source, first.chosen.windows, first.lm),
            ce_windows=ce_windows,
            progress=progress,
            elsewhere=elsewhere,
            ranks=ranks,
        )
        for number, one, result in zip(numbers, together, results, strict=True):
            chosen = one.chosen
            said = {"which": chosen.which, "trained_windows": chosen.trained, "left_out_windows": chosen.left_out}
            found[number] = result | {"data": one.data} | said
    return found


class _Asked(NamedTuple):
    """A run, and what it is evaluated on."""

    run: Path | str
    sae: SAE
    source: ActivationSource
    lm: LanguageModel | None
    layer: Place | None
    chosen: Chosen
    data: str | None


def _alike(asked: Sequence[_Asked]) -> list[list[int]]:
    """The numbers of the runs that can be evaluated together: the same windows, read from the same."""
    groups: dict[Any, list[int]] = {}
    for number, one in enumerate(asked):
        key = (same_windows(one.source), id(one.lm), one.sae.W_dec.device, tuple(one.chosen.windows))
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _asked(
    run: Path | str,
    sae: SAE,
    given: dict[str, Any],
    n_windows: int,
    trained_windows: bool,
    elsewhere: bool,
    device: str | None,
    progress: Progress,
    opened: dict[str, Any],
) -> _Asked:
    job = _read_job(Path(run))
    origin, is_other = _origin(run, sae, job, given)
    source, lm = _open(origin, device, progress, opened)
    if not elsewhere:
        check_said({**given, "activations": origin.get("activations")}, source)
    same_data = not is_other and _same_data(job.get("data"), source.describe())
    held = None if is_other else job["origin"].get("held_out")
    of_stream = not is_other and job["origin"].get("stream") is True  # then all of the source was held out
    train_windows, candidates = (
        (range(0), range(source.n_windows)) if held is None or of_stream else held_out(source.n_windows, held)
    )
    name = data_name({**source.describe(), **origin})
    # A share that leaves fewer than it trained on is not the one that it was trained with.
    are_held_out = held is not None and same_data and len(train_windows) >= (job.get("n_windows") or 0)
    chosen = choose_windows(
        read_seen(Path(run)), source, candidates, are_held_out, n_windows, job.get("n_ctx"), trained_windows
    )
    if not chosen.windows:
        raise UserError(
            f"{run}: it trained on all {chosen.left_out} windows of {name or 'these activations'}: give other data, or "
            "--trained-windows to evaluate on them all the same"
        )
    return _Asked(run, sae, source, lm, next(iter(places_in(origin)), None), chosen, name)


def choose_windows(
    seen: Seen | None,
    source: ActivationSource,
    candidates: Sequence[int],
    are_held_out: bool,
    n_windows: int,
    trained_n_ctx: int | None,
    trained_windows: bool = False,
) -> Chosen:
    """The first n_windows of the candidates that a run did not train on; of those that it held out, the first.

    trained_windows: the first in any case.
    """
    which = HELD_OUT if are_held_out else ASKED_FOR if trained_windows else NOT_TRAINED_ON
    keep = are_held_out or trained_windows
    chosen: list[int] = []
    trained = left_out = 0
    for start in range(0, len(candidates), HASHED_AT_ONCE):
        if len(chosen) >= n_windows:
            break
        part = list(candidates[start : start + (min(HASHED_AT_ONCE, n_windows) if keep else HASHED_AT_ONCE)])
        hashes, by_tokens = hashes_of(source, part)
        if seen is None or by_tokens != seen.by_tokens or source.n_ctx != trained_n_ctx:
            return Chosen(list(candidates[:n_windows]), which if are_held_out else UNKNOWN, None, 0)
        for window, is_trained in zip(part, seen.among(hashes), strict=True):
            if len(chosen) >= n_windows:
                break
            if is_trained and not keep:
                left_out += 1
            else:
                chosen.append(window)
                trained += int(is_trained)
    return Chosen(chosen, which, trained, left_out)


def keep_held_out_fvu(run: Path, sae: SAE, found: dict[str, Any]) -> None:
    """Put the FVU of held-out windows on the card and in the config of a run that is done."""
    if found["which"] != HELD_OUT or sae.trained_on is None or not (run / CONFIG).is_file():
        return
    sae.trained_on = dataclasses.replace(sae.trained_on, held_out_fvu=found["fvu"])
    write_json(run / CONFIG, read_json(run / CONFIG) | {KEY: sae.trained_on.to_config()})
    sae.write_card(run)


def _read_job(run: Path) -> dict[str, Any]:
    """What run.json says, with an origin, {} where it says none; {} where there is no such file."""
    if not (run / RUN).is_file():
        return {"origin": {}}
    job = read_json(run / RUN)
    for name in ("origin", "data"):
        job[name] = {} if job.get(name) is None else job[name]
        if not isinstance(job[name], dict):
            raise UserError(f"{run / RUN}: {name} is no object: copy the run again")
    for name, value in job["origin"].items():
        if name in KINDS and (isinstance(value, bool) or not isinstance(value, KINDS[name])):
            raise UserError(f"{run / RUN}: {name} of origin is {reprlib.repr(value)}: copy the run again")
    return job


def _origin(run: Path | str, sae: SAE, job: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """What to open, and whether that is other data than the run's own."""
    on = {} if sae.trained_on is None else sae.trained_on.to_config()
    known = {**on, **job.get("data", {}), **job["origin"]}
    is_other = any(name in given for name in DATA)
    kept = {
        name: known[name] for name in ("model", "lm_dtype", "n_ctx", "bos", "keep_first") if known.get(name) is not None
    }
    origin = (kept if is_other else kept | job["origin"]) | given
    if not any(name in given for name in PLACE_KEYS):
        origin |= _place(sae, job)
    else:
        origin = {name: value for name, value in origin.items() if name not in PLACE_KEYS or name in given}
    if "activations" in origin and "model" not in (given if is_other else job["origin"] | given):
        origin.pop("model", None)  # it is needed for the cross-entropy only, and nobody asked for that
    if "activations" not in origin:  # what a run does not say of itself is not so; without a run the tokenizer decides
        origin.setdefault("bos", False if job["origin"] or job.get("data") else None)
    if not any(name in origin for name in DATA):
        missing = [] if "model" in origin else ["--model"]
        missing += [] if any(name in origin for name in PLACE_KEYS) else ["--layer"]
        instead = "--text (or --dataset)" if not missing else f"{', '.join(missing)} and --text (or --dataset)"
        raise UserError(f"{run}: it does not say what data it was trained on: give --activations DIR, or {instead}")
    origin.setdefault("n_ctx", 256)
    return origin, is_other


def _place(sae: SAE, job: dict[str, Any]) -> dict[str, Any]:
    """Where a run reads, as it says itself, or as its SAE does; {} where neither does."""
    for said in (job["origin"], job.get("data", {}), {} if sae.trained_on is None else sae.trained_on.to_config()):
        hook, layer = said.get("hook"), said.get("layer")
        # Without a number of a block it is a name that somebody gave to activations of their own.
        if isinstance(hook, str) and any(character.isdigit() for character in hook):
            return {name: said[name] for name in ("hook", "hook_to") if said.get(name) is not None}
        if layer is not None:
            return {"layer": layer}
    return {}


def _open(
    origin: dict[str, Any], device: str | None, progress: Progress, opened: dict[str, Any]
) -> tuple[ActivationSource, LanguageModel | None]:
    key = json.dumps(origin, sort_keys=True)
    if key not in opened:
        source, lm = open_source(origin, device, progress, opened)
        if (places := getattr(source, "places", ())) and len(places) > 1:
            raise UserError(f"--hook: {len(places)} places, {places[0]} to {places[-1]}; needed one: name it")
        if lm is None and "model" in origin:  # saved activations, and a model to splice into
            lm = open_model(origin["model"], device, opened, origin.get("lm_dtype"), progress)
        opened[key] = source, lm
    return opened[key]


def _same_data(trained_on: dict[str, Any] | None, described: dict[str, Any]) -> bool:
    """Whether a source is what a run was trained on, by what both say; texts are compared by a hash of all windows.

    A run on a stream says what it held out, and beside that more of the stream.
    """
    one, other = trained_on or {}, json.loads(json.dumps(described))
    names = other.keys() if one.get("stream") else one.keys() | other.keys()
    return all(one.get(name) == other.get(name) for name in names - set(NOT_DATA))
