"""`csae view`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from csae.cli.options import BOS, DEVICE, ELSEWHERE, KEEP_FIRST, device_of, place_of, place_options
from csae.errors import UserError, shown

if TYPE_CHECKING:
    from csae.data.places import Place


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="A text file."
)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("view.html"), show_default=True, help="The page."
)
@click.option("--beside", type=click.Path(path_type=Path), help="A run of a per-token SAE, to compare with.")
@click.option("--model", help="As the run was trained on, if not given.")
@place_options()
@click.option("--n-ctx", type=click.IntRange(2), help="Positions a window at most; 8 times as trained on if not given.")
@BOS
@KEEP_FIRST
@click.option("--index", type=click.Path(path_type=Path), help="An index of features; RUN/features.db, if it is there.")
@click.option("--max-tokens", type=int, default=4000, show_default=True, help="Use at most so many tokens of the text.")
@ELSEWHERE
@DEVICE
def view(
    run: Path,
    text: Path,
    out: Path,
    beside: Path | None,
    index: Path | None,
    max_tokens: int,
    elsewhere: bool,
    **options: Any,
) -> None:
    """Show a text as an SAE sees it: a page with what is new at each token, and what is carried from where.

    The labels in RUN/labels.json, {"123": "dates"}, and what the index says of each feature are on the page.
    """
    from csae.checkpoint import load_sae
    from csae.data.places import PLACE_KEYS, places_in
    from csae.data.sources import open_model
    from csae.data.text import beginning, read_documents
    from csae.features.index import FEATURES, FeatureIndex
    from csae.features.labels import read_labels
    from csae.files import check_writable
    from csae.pages.from_index import from_index
    from csae.pages.view import LONGER, read_windows
    from csae.pages.view import view as view_text
    from csae.pages.view_page import write_view
    from csae.progress import track
    from csae.run import read_trained_on
    from csae.trained_on import check_place, model_name, same_model

    check_writable(out)
    device = device_of(options["device"])
    sae = load_sae(run, device)
    of_config = {} if sae.trained_on is None else sae.trained_on.to_config()
    kept = ("model", *PLACE_KEYS, "n_ctx", "bos", "keep_first")
    trained_on: dict[str, Any] = {name: of_config[name] for name in kept if name in of_config}
    of_run = read_trained_on(run)
    trained_on |= of_run
    given = {name: options[name] for name in ("model", "bos", "keep_first") if options[name] is not None}
    place_given = place_of(options)
    origin = {name: value for name, value in trained_on.items() if not (place_given and name in PLACE_KEYS)}
    origin |= given | place_given
    if "model" not in origin:
        raise UserError(f"--model: not given, and {run} does not say what it was trained on")
    place = next(iter(places_in(origin)), None)
    if place is None:
        raise UserError(f"--layer, --hook: not given, and {run} does not say where it was trained")
    trained_beside = {} if beside is None else read_trained_on(beside)
    one, other = trained_on.get("model"), trained_beside.get("model")
    if one is not None and other is not None and not same_model(str(one), str(other)):
        raise UserError(f"--beside: {beside} is of model {other}; needed {one}, as {run}")
    for its in places_in(trained_beside):
        if its != place:
            raise UserError(f"--beside: {beside} is of {_at(its)}; needed {_at(place)}, as {run}")
    for name, what in (("bos", "a beginning of sequence"), ("keep_first", "position 0")):
        if trained_on and trained_beside and bool(trained_beside.get(name)) != bool(trained_on.get(name)):
            with_it, without = (beside, run) if trained_beside.get(name) else (run, beside)
            raise UserError(f"--beside: {with_it} was trained with {what}, {without} without; needed two that agree")
    labels = read_labels(run, sae.d_sae)
    if index is None and (run / FEATURES).is_file():
        index = run / FEATURES
    if index is not None:
        with FeatureIndex(index) as opened:
            opened.check(sae, model_name(str(origin["model"])))
    other_sae = None if beside is None else load_sae(beside, device)
    lm = open_model(origin["model"], device, dtype=origin.get("lm_dtype"), progress=track)
    (place,) = lm.hook_points.places(*place)
    for loaded in (sae, other_sae):
        if loaded is not None:
            names = lm.hook_points.one_name
            check_place(loaded.trained_on, origin["model"], None, place.hook, elsewhere, place.to, names)
    longest = LONGER * trained_on.get("n_ctx", 256)
    n_ctx = min(longest, lm.max_ctx or longest) if options["n_ctx"] is None else options["n_ctx"]
    known = ({} if sae.trained_on is None else sae.trained_on.to_config()) | origin
    begin = beginning(lm.tokenizer, known.get("bos", False if of_run else None), lm.n_vocab)
    keep_first = bool(known.get("keep_first"))
    windows, whole = read_windows(lm, place, read_documents(text)[0], n_ctx, max_tokens, begin, keep_first)
    about = {
        "text": shown(text.name),
        "run": shown(run.resolve().name),
        "beside": None if beside is None else shown(beside.resolve().name),
        "model": model_name(lm.name),
        "place": _at(place),
        "n_ctx": n_ctx,
        "trained_on": trained_on.get("n_ctx"),
        "whole": whole,
    }
    facts = view_text(sae, windows, lm, trained_on.get("n_ctx"), other_sae, track, elsewhere)
    indexed = None
    if index is not None:
        with FeatureIndex(index) as opened:
            indexed = from_index(opened, [int(feature) for feature in facts["features"]])
    write_view(out, about, facts, index=indexed, labels=labels)
    print(f"written: {shown(out)}")


def _at(place: Place) -> str:
    """A place as messages and pages show it."""
    from csae.data.places import in_words

    return in_words(place.hook) if place.to is None else str(place)
