"""`csae features`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from csae.cli.no_effect import check_effect
from csae.cli.options import (
    ACTIVATIONS,
    BOS,
    DATASET,
    DEVICE,
    ELSEWHERE,
    KEEP_FIRST,
    MODEL,
    N_CTX,
    TEXT,
    device_of,
    given_of,
    place_options,
)
from csae.errors import UserError, shown

if TYPE_CHECKING:
    from csae.features.index import Feature, FeatureIndex, Passage
    from csae.sae import SAE

DATA = ("activations", "text", "dataset")
SEARCHES = ("find", "raises", "feature", "passage")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@TEXT
@DATASET
@ACTIVATIONS
@MODEL
@place_options()
@N_CTX
@click.option("--max-tokens", type=click.IntRange(1), help="Use at most so many tokens.")
@BOS
@KEEP_FIRST
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The index; RUN/features.db if not given.")
@click.option("--find", help="Search: the features that are new most at this token.")
@click.option("--raises", help="Search: the features that raise the logit of this token most.")
@click.option("--feature", type=click.IntRange(0), help="Search: what is known of a feature.")
@click.option("--passage", help="Search: where the index has this text.")
@click.option("-n", type=click.IntRange(1), default=20, show_default=True, help="So many results at most.")
@ELSEWHERE
@DEVICE
def features(run: Path, out: Path | None, n: int, elsewhere: bool, **options: Any) -> None:
    """Index where each feature is new, is carried and ends, or search the index.

    Without --text, --dataset or --activations the data is that of the run. A build that was stopped goes on.
    """
    from csae.checkpoint import load_sae
    from csae.features.index import FEATURES, FeatureIndex

    if out is None and not run.is_dir():
        raise UserError(f"--out: not given, and {shown(run)} is no folder; needed the name of a file")
    path = run / FEATURES if out is None else out
    searches = [name for name in SEARCHES if options[name] is not None]
    if len(searches) > 1:
        raise UserError(f"--{searches[0]}, --{searches[1]}: both given; needed one search at a time")
    device = device_of(options["device"])
    sae = load_sae(run, device)
    if not searches:
        check_effect(click.get_current_context(), ["n"], "without a search")
        _build(run, path, sae, options, elsewhere, device)
        return
    for name in DATA:
        if options[name] is not None:
            raise UserError(f"--{name}, --{searches[0]}: both given; needed one: build first, then search")
    of_building = set(options) - {*SEARCHES, *DATA, "device"} | {"elsewhere"}
    check_effect(click.get_current_context(), of_building, f"with --{searches[0]}, which searches what is built")
    with FeatureIndex(path) as index:
        index.check(sae)
        for line in _found(run, index, searches[0], options[searches[0]], n):
            print(shown(line))


def _build(run: Path, path: Path, sae: SAE, options: dict[str, Any], elsewhere: bool, device: str) -> None:
    from csae.data.places import PLACE_KEYS
    from csae.data.sources import check_said, open_model, open_source
    from csae.features.build import build_index
    from csae.features.index import FeatureIndex
    from csae.files import check_writable
    from csae.progress import track
    from csae.run import read_origin, read_trained_on
    from csae.trained_on import data_name

    check_writable(path)
    given, of_run = given_of(options), read_trained_on(run)
    on = {} if sae.trained_on is None else sae.trained_on.to_config()
    known = {name: on[name] for name in ("model", *PLACE_KEYS, "n_ctx", "bos", "keep_first") if name in on} | of_run
    known |= {} if any(name in given for name in DATA) else read_origin(run)
    place_given = any(name in given for name in PLACE_KEYS)
    origin = {name: value for name, value in known.items() if not (place_given and name in PLACE_KEYS)} | given
    if not any(origin.get(name) is not None for name in DATA):
        raise UserError(f"{run}: it does not say what data it was trained on: give --text, --dataset or --activations")
    origin.setdefault("n_ctx", 256)
    origin.setdefault("bos", False if of_run else None)
    source, lm = open_source(origin, device, track)
    if not elsewhere:
        check_said(given, source)
    if lm is None:
        if "model" not in origin:
            raise UserError(f"--model: not given, and {run} does not say which one; needed for the text of tokens")
        lm = open_model(origin["model"], device, dtype=origin.get("lm_dtype"), progress=track)
    windows = range(source.n_windows)
    if origin.get("activations") is not None and options["max_tokens"] is not None:
        windows = windows[: max(1, options["max_tokens"] // source.n_ctx)]
    data = data_name({**source.describe(), **origin})
    build_index(path, sae, source, windows, lm, run.resolve().name, data, track, elsewhere)
    with FeatureIndex(path) as index:
        print(f"{shown(path)}: {index.n_tokens:,} tokens of {shown(index.about['data'])}; search it with --find, "
              "--raises, --feature or --passage, or in the page of `csae view`")  # fmt: skip


def _found(run: Path, index: FeatureIndex, search: str, wanted: Any, n: int) -> list[str]:
    """The lines that a search prints."""
    from csae.features.labels import read_labels

    labels = read_labels(run, index.about["d_sae"])
    state = "new" if index.about["arch"] == "contextual" else "active"

    def named(number: int) -> str:
        return f"#{number}" + (f" ({labels[number]})" if number in labels else "")

    if search == "find":
        labelled = [named(number) for number, label in labels.items() if wanted.strip().lower() in label.lower()]
        found = [
            f"{named(number)}  {100 * share:.1f} % of it at {word!r}; {state} at {times:,} tokens"
            for number, word, share, times in index.find(wanted, n)
        ]
        return [f"{line}  by its label" for line in labelled] + found or [f"no feature is {state} most at {wanted!r}"]
    if search == "raises":
        return [f"{named(number)}  raises {word!r} by {score:.1f}" for number, word, score in index.raising(wanted, n)]
    if search == "passage":
        passages = index.texts(wanted, n)
        return [_line(passage) for passage in passages] or [f"the index does not have the text {wanted!r}"]
    feature = index.feature(wanted, n)
    if feature is None:
        raise UserError(
            f"--feature: #{wanted} is nowhere new in the text of {index.path}; d_sae is {index.about['d_sae']}"
        )
    return _described(named(wanted), feature, index)


def _described(name: str, feature: Feature, index: FeatureIndex) -> list[str]:
    state = "new" if index.about["arch"] == "contextual" else "active"
    lines = [
        f"{name}  {state} at {feature.new:,} of {index.n_tokens:,} tokens, carried at {feature.carried:,} others, "
        f"in {feature.spans:,} stretches; largest activity {feature.largest:.1f}",
        "at " + ", ".join(f"{word!r} {100 * share:.0f} %" for word, share in feature.words),
        "like " + ", ".join(f"#{other} {cosine:.2f}" for other, cosine in feature.similar),
    ]
    for end, what in (("up", "raises"), ("down", "lowers")):
        words = feature.logits[end][::2]
        lines.append(f"{what} " + (", ".join(map(repr, words)) or "nothing more than a random direction does"))
    lines += [f"{state}  {_line(passage)}" for passage in feature.passages]
    return lines + [f"carried  {_line(passage)}" for passage in feature.carried_passages]


def _line(passage: Passage) -> str:
    amount = f"{passage.amount:.2f}  " if passage.amount else ""
    return (
        f"{amount}…{passage.before}[{passage.token}]{passage.after}…  (window {passage.window}, token {passage.t + 1})"
    )
