"""How well SAEs reconstruct activations they were not trained on, and what that does to the language model.

The figure of a contextual SAE is that of its exact form, the recurrence. The sweeps, in which it was trained,
stand beside it, and the gap between the two is a figure of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from csae.cross_entropy import BatchLosses, CrossEntropies
from csae.data.activations import ActivationSource, ActivationSources, Batch, Place, d_out_of
from csae.data.language_model import LanguageModel
from csae.data.places import in_words, places_in
from csae.distributed.hosts import Hosts
from csae.distributed.ranks import Ranks
from csae.errors import UserError, shown
from csae.evaluation_table import data_in_words, table
from csae.progress import Progress, quiet
from csae.reconstruction import Reconstruction, Wanted, run_form
from csae.sae import SAE
from csae.trained_on import TrainedOn, check_place

__all__ = ["Subject", "data_in_words", "evaluate", "evaluate_together", "run_form", "table"]

EVAL = "eval.json"
BATCH_WINDOWS = 16
CE_WINDOWS = 16
CE_BATCH_WINDOWS = 4  # the language model's logits are B * T * vocabulary numbers


class Subject(NamedTuple):
    """An SAE to evaluate together with others."""

    sae: SAE
    name: str = ""
    """for messages"""
    at: Place | None = None
    """which place of the source it reads; None where the source has one place"""
    layer: int | str | Place | None = None
    """where in the language model that is, as `evaluate` takes it"""


def evaluate(
    sae: SAE,
    source: ActivationSource,
    windows: Sequence[int],
    lm: LanguageModel | None = None,
    layer: int | str | Place | None = None,
    batch_windows: int = BATCH_WINDOWS,
    ce_windows: int = CE_WINDOWS,
    progress: Progress = quiet,
    elsewhere: bool = False,
) -> dict[str, Any]:
    """The figures of an SAE on some windows of a source, over the positions in the mask; JSON as it is.

    Args:
        sae: it is not trained, and left in the mode it was in.
        windows: the windows of the source to evaluate on.
        lm: the language model the activations come from; with it also the cross-entropies. The source must
            know its tokens then.
        layer: where in `lm` the activations are from: a layer, the name of a hook point, or a transcoder's `Place`; by
            default what source.describe() says.
        batch_windows: windows encoded at once.
        ce_windows: how many of the windows go through the language model; the first ones.
        elsewhere: evaluate also where the activations are of another model, layer or hook point than the SAE was
            trained on (`csae.trained_on`).

    Returns:
        arch, k, selection, d_in, d_sae, n_params; windows, and tokens, the positions evaluated.
        data, model, layer, hook, hook_to, n_ctx: what the activations are of; None where the source does not say.
        fvu: squared error over variance, both summed over all positions and dimensions; the variance is
            around the mean of these positions. Of a transcoder, of its target.
        l0: active features a token. cosine: mean cosine of x (or the target) and x_hat, as they are (their common mean
            makes it look good; it is there to compare with other libraries).
        dead: share of features that have not fired for `dead_after` training tokens. silent: share that
            did not fire here.
        tokens_per_s: encoding and decoding, without reading the activations.
        With `lm`: ce_clean, ce_sae and ce_zero, the mean next-token loss in nats with the activations as they
            are, reconstructed, and set to zero; of a transcoder, with its target predicted, and set to zero;
            ce_tokens, at how many positions. Positions out of the mask keep their activations and do not count.
            loss_recovered: (ce_zero - ce_sae) / (ce_zero - ce_clean), or None where zeros do the model no harm.
        For a contextual SAE all of these are of the exact form. Beside them: query, sweeps, fvu_exact (the
            same as fvu), and of the form in sweeps fvu_sweeps, l0_sweeps, cosine_sweeps, tokens_per_s_sweeps,
            ce_sae_sweeps, loss_recovered_sweeps. gap: fvu_exact / fvu_sweeps - 1.

    Raises UserError where a figure would be NaN: weights or activations that are not finite, no position
    in the mask, activations that are all the same; where `lm` or the source don't fit the SAE, or are of another place
    than it was trained on.
    """
    found = evaluate_together(
        [Subject(sae, layer=layer)], source, windows, lm, batch_windows, ce_windows, progress, elsewhere
    )
    return found[0]


@torch.no_grad()
def evaluate_together(
    subjects: Sequence[Subject],
    source: ActivationSource | ActivationSources,
    windows: Sequence[int],
    lm: LanguageModel | None = None,
    batch_windows: int = BATCH_WINDOWS,
    ce_windows: int = CE_WINDOWS,
    progress: Progress = quiet,
    elsewhere: bool = False,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """What `evaluate` gives for each of several SAEs on the same windows: the same numbers, in less time.

    The windows are read once for all SAEs and places, and the losses of the language model alone (ce_clean, and ce_zero
    at a place) are made once. All SAEs lie on one device. ranks: all call this, each with whole SAEs of its own, and
    evaluate a share of the windows; all get the figures of all windows. Raises UserError as `evaluate`, with the name
    of the SAE.
    """
    several: Any = source  # of one place, or of several: then each SAE says which
    of = [several if subject.at is None else several.at(subject.at) for subject in subjects]
    here = [TrainedOn.of(one.describe()) for one in of]
    places: list[Place | None] = []
    for subject, one, trained_on in zip(subjects, of, here, strict=True):
        with _named(subject, subjects):
            places.append(_checked(subject, one, trained_on, lm, elsewhere))
    devices = {subject.sae.W_dec.device for subject in subjects}
    if len(devices) > 1:
        raise ValueError(f"subjects: given SAEs on {', '.join(map(str, devices))}; needed all on one device")
    was_training = [subject.sae.training for subject in subjects]
    for subject in subjects:
        subject.sae.eval()
    try:
        found = _reconstructions(subjects, source, windows, batch_windows, progress, ranks)
        if lm is not None:
            spliced = [place for place in places if place is not None]
            of_lm = _cross_entropies(subjects, source, windows[:ce_windows], lm, spliced, progress, ranks)
            found = [one | more for one, more in zip(found, of_lm, strict=True)]
    finally:
        for subject, training in zip(subjects, was_training, strict=True):
            subject.sae.train(training)
    names = ("data", "model", "layer", "hook", "hook_to", "n_ctx")
    return [one | {name: getattr(about, name) for name in names} for one, about in zip(found, here, strict=True)]


def _reconstructions(
    subjects: Sequence[Subject],
    source: ActivationSource | ActivationSources,
    windows: Sequence[int],
    batch_windows: int,
    progress: Progress,
    ranks: Ranks | None,
) -> list[dict[str, Any]]:
    def summed() -> tuple[dict[Place | None, Any], list[Any]]:
        wanted = {subject.at: Wanted() for subject in subjects}
        sums = [Reconstruction(subject.sae) for subject in subjects]
        for start in progress(_starts(windows, batch_windows, ranks), f"evaluating{_named_in_bar(subjects)}"):
            batches = _read(source, windows[start : start + batch_windows], subjects)
            x = {at: wanted[at].add(batch) for at, batch in batches.items()}
            for subject, one in zip(subjects, sums, strict=True):
                one.add(batches[subject.at], x[subject.at])
        return {at: of.summed() for at, of in wanted.items()}, [one.summed() for one in sums]

    parts = Hosts(ranks).all(summed)
    wanted = {at: Wanted.of_ranks([of_rank[at] for of_rank, _ in parts]) for at in parts[0][0]}
    found = []
    for number, subject in enumerate(subjects):
        whole = Reconstruction.of_ranks(subject.sae, [of_rank[number] for _, of_rank in parts])
        with _named(subject, subjects):
            found.append(whole.figures(wanted[subject.at], len(windows)))
    return found


def _cross_entropies(
    subjects: Sequence[Subject],
    source: ActivationSource | ActivationSources,
    windows: Sequence[int],
    lm: LanguageModel,
    places: Sequence[Place],
    progress: Progress,
    ranks: Ranks | None,
) -> list[dict[str, Any]]:
    def summed() -> list[Any]:
        sums = [CrossEntropies(subject.sae, place) for subject, place in zip(subjects, places, strict=True)]
        for start in progress(_starts(windows, CE_BATCH_WINDOWS, ranks), f"cross-entropy{_named_in_bar(subjects)}"):
            batches = _read(source, windows[start : start + CE_BATCH_WINDOWS], subjects)
            losses = BatchLosses(lm)
            for subject, one in zip(subjects, sums, strict=True):
                with _named(subject, subjects):
                    one.add(batches[subject.at], losses, (subject.at, one.place))
        return [one.summed() for one in sums]

    parts = Hosts(ranks).all(summed)
    found = []
    for number, (subject, place) in enumerate(zip(subjects, places, strict=True)):
        whole = CrossEntropies.of_ranks(subject.sae, place, [of_rank[number] for of_rank in parts])
        with _named(subject, subjects):
            found.append(whole.figures(lm, len(windows)))
    return found


def _named_in_bar(subjects: Sequence[Subject]) -> str:
    """What a bar says of the SAEs, as one may follow another."""
    if len(subjects) > 1:
        return f" of {len(subjects)} SAEs"
    return f" of {subjects[0].name}" if subjects[0].name else ""


def _starts(windows: Sequence[int], at_once: int, ranks: Ranks | None) -> Sequence[int]:
    """Where this rank's batches begin. They are those of one process, so that each gives the same numbers."""
    starts = range(0, len(windows), at_once)
    return starts if ranks is None else starts[ranks.rank :: ranks.size]


def _read(
    source: ActivationSource | ActivationSources, windows: Sequence[int], subjects: Sequence[Subject]
) -> dict[Place | None, Batch]:
    """The same windows at each place that is asked for, on the SAEs' device."""
    wanted = list(dict.fromkeys(subject.at for subject in subjects))
    read: dict[Any, Batch] = {None: source.read(windows)} if None in wanted else {}  # type: ignore[union-attr]
    if any(at is not None for at in wanted):
        read |= source.read_all(windows)  # type: ignore[union-attr]
    batches = {}
    for at in wanted:
        if not read[at].acts.isfinite().all():
            raise UserError(f"NaN or Inf in the activations of windows {windows[0]} to {windows[-1]}: make them again")
        parts = (None if part is None else part.to(subjects[0].sae.W_dec.device) for part in read[at])
        batches[at] = Batch(*parts)  # type: ignore[arg-type]
    return batches


@contextmanager
def _named(subject: Subject, among: Sequence[Subject]) -> Iterator[None]:
    """Puts the name of an SAE before what is wrong with it, where there are several."""
    try:
        yield
    except UserError as error:
        if len(among) < 2 or not subject.name:
            raise
        raise UserError(f"{shown(subject.name)}: {error}") from error


def _checked(
    subject: Subject, source: ActivationSource, here: TrainedOn, lm: LanguageModel | None, elsewhere: bool
) -> Place | None:
    """The place of the language model to splice into, if there is one.

    Raises UserError where the SAE and the source, or the model, don't fit.
    """
    sae = subject.sae
    _check_finite_weights(sae)
    names = str if lm is None else lm.hook_points.one_name
    check_place(sae.trained_on, here.model, here.layer, here.hook, elsewhere, here.hook_to, names)
    if source.d_in != sae.d_in:
        raise UserError(f"the activations are {source.d_in} wide, the SAE {sae.d_in}: they don't belong together")
    if d_out_of(source) != sae.d_out:
        raise UserError(f"the targets are {d_out_of(source)} wide, the SAE's {sae.d_out}: they don't belong together")
    if lm is None:
        return None
    place = _place_of(lm, source, sae, subject.layer)
    check_place(sae.trained_on, lm.name, None, place.hook, elsewhere, place.to, names)
    return place


def _place_of(lm: LanguageModel, source: ActivationSource, sae: SAE, given: int | str | Place | None) -> Place:
    """The place to splice into: as given, or as the source says, by its one name."""
    if given is None:
        said = places_in(source.describe())
        if not said:
            raise UserError("the activations don't say which layer of the language model they are from: give the layer")
        given = said[0]
    found = lm.hook_points.places(*given) if isinstance(given, Place) else lm.hook_points.places(given)
    if len(found) > 1:
        raise UserError(f"layer: given {given}, {len(found)} places of {lm.name}; needed one: name it")
    place = found[0]
    for name, width in ((place.hook, sae.d_in), (place.to or place.hook, sae.d_out)):
        if lm.hook(name).width != width:
            raise UserError(
                f"{in_words(name, lm.name)} is {lm.hook(name).width} wide, the SAE {width}: give the model the "
                "activations come from"
            )
    return place


def _check_finite_weights(sae: SAE) -> None:
    for name, tensor in sae.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"NaN or Inf in {name} of the SAE: its files are damaged or its training failed; copy or train it again"
            )
