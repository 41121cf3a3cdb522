"""A trained SAE, or its feature activations, as other libraries take them: model and place come from the run.

    csae.export.export("runs/topk", "sae_lens", "out")

Weights, for libraries that run each token by itself: sae_lens (a contextual SAE too, as a class of ours), sparsify,
dictionary_learning. Feature activations on some text, of either kind of SAE: neuronpedia, delphi. docs/export.md says
what arrives where.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csae.checkpoint import load_sae
from csae.data.language_model import LanguageModel
from csae.data.places import PLACE_KEYS, described_place, places_in
from csae.data.sources import open_model, open_source
from csae.errors import UserError
from csae.export import delphi, neuronpedia
from csae.export.codes import About, read_codes
from csae.export.weights import LIBRARIES, export_weights
from csae.files import filled
from csae.progress import Progress, quiet
from csae.run import read_origin, read_trained_on
from csae.sae import SAE
from csae.trained_on import TrainedOn, check_place, data_name

OF_ACTIVATIONS = {"neuronpedia": (neuronpedia.folders, neuronpedia.write), "delphi": (delphi.folders, delphi.write)}
TARGETS = (*LIBRARIES, *OF_ACTIVATIONS)
DATA = ("activations", "text", "dataset")


def export(
    run: Path | str,
    to: str,
    folder: Path | str,
    given: dict[str, Any] | None = None,
    n_windows: int = 1024,
    device: str | None = None,
    progress: Progress = quiet,
) -> list[Path]:
    """Writes the SAE of a run as `to` takes it; gives the folders or files to name to that library.

    Args:
        run: its folder, that of a saved SAE, or a hub id.
        to: one of TARGETS.
        folder: where to; new or empty, but that sparsify and delphi have a folder in it for each place. It is written
            whole or not at all.
        given: another model, or other text for feature activations, as `csae.data.sources.open_source` takes them; by
            default those of the run.
        n_windows: for feature activations: at most so many, from the start of the text.

    Raises UserError where the library can't express the SAE, or where the run does not say what is needed.
    """
    if to not in TARGETS:
        raise UserError(f"--to: given {to!r}; needed one of {', '.join(TARGETS)}")
    given, folder = given or {}, Path(folder)
    sae = load_sae(run, "cpu" if device is None else device)
    if to in LIBRARIES:
        return [export_weights(sae, to, folder, lambda: _model(run, sae, given, device, progress))]
    if n_windows < 1:
        raise UserError(f"--windows: given {n_windows}; needed at least 1")
    origin = _origin(run, sae, given)
    source, lm = open_source(origin, device, progress)
    lm = lm or _model(run, sae, given, device, progress)
    about = source.describe()
    here = TrainedOn.of(about)
    names = lm.hook_points.one_name
    check_place(sae.trained_on, lm.name, here.layer, here.hook, hook_to=here.hook_to, names=names)
    of_export = About(Path(run).resolve().name, data_name({**about, **origin}) or "")
    folders, write = OF_ACTIVATIONS[to]
    filling, to_load = folders(folder, sae, lm)
    with filled(filling) as working:
        codes = read_codes(sae, source, range(min(n_windows, source.n_windows)), progress)
        write(working, sae, lm, codes, of_export, progress)
    return [to_load]


def _model(run: Path | str, sae: SAE, given: dict[str, Any], device: str | None, progress: Progress) -> LanguageModel:
    """The language model that the SAE is of: as given, or as the run says."""
    known = _known(run, sae)
    name = given.get("model") or known.get("model")
    if name is None:
        raise UserError(f"--model: not given, and {run} does not say what it was trained on")
    return open_model(name, device, dtype=known.get("lm_dtype"), progress=progress)


def _origin(run: Path | str, sae: SAE, given: dict[str, Any]) -> dict[str, Any]:
    """What to open for feature activations: the run's own text, or what is given in its place."""
    known = _known(run, sae)
    kept = {name: known[name] for name in ("model", "lm_dtype", "n_ctx", "bos", "keep_first") if name in known}
    own = {} if any(name in given for name in DATA) else read_origin(Path(run))
    place = next(iter(places_in(known)), None)
    if place is not None:  # the run's one, of those that it may have been trained with
        own = {name: value for name, value in own.items() if name not in PLACE_KEYS} | described_place(place)
    origin = kept | own | given
    if not any(origin.get(name) is not None for name in DATA):
        raise UserError(f"{run}: it does not say what text it was trained on: give --text FILE")
    return {"n_ctx": 256} | origin


def _known(run: Path | str, sae: SAE) -> dict[str, Any]:
    of_config = {} if sae.trained_on is None else sae.trained_on.to_config()
    return of_config | read_trained_on(Path(run))
