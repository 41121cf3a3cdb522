"""How well an SAE reconstructs activations it was not trained on, and what that does to the language model.

The figure of a contextual SAE is that of its exact form, the recurrence. The sweeps, in which it was trained,
stand beside it, and the gap between the two is a figure of its own.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource, Batch, Place, d_out_of
from csae.data.language_model import LanguageModel
from csae.data.places import in_words, places_in
from csae.errors import UserError, shown
from csae.progress import Progress, quiet
from csae.sae import SAE, Output
from csae.trained_on import TrainedOn, check_place

if TYPE_CHECKING:
    from rich.table import Table

EVAL = "eval.json"
BATCH_WINDOWS = 16
CE_WINDOWS = 16
CE_BATCH_WINDOWS = 4  # the language model's logits are B * T * vocabulary numbers


@torch.no_grad()
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
        arch, k, d_in, d_sae, n_params; windows, and tokens, the positions evaluated.
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
    _check_finite_weights(sae)
    here = TrainedOn.of(source.describe())
    names = str if lm is None else lm.hook_points.one_name
    check_place(sae.trained_on, here.model, here.layer, here.hook, elsewhere, here.hook_to, names)
    if source.d_in != sae.d_in:
        raise UserError(f"the activations are {source.d_in} wide, the SAE {sae.d_in}: they don't belong together")
    if d_out_of(source) != sae.d_out:
        raise UserError(f"the targets are {d_out_of(source)} wide, the SAE's {sae.d_out}: they don't belong together")
    place = None if lm is None else _place_of(lm, source, sae, layer)
    if lm is not None and place is not None:
        check_place(sae.trained_on, lm.name, None, place.hook, elsewhere, place.to, names)
    was_training = sae.training
    sae.eval()
    try:
        result = _reconstruction(sae, source, windows, batch_windows, progress)
        if lm is not None and place is not None:
            result |= _cross_entropies(sae, source, windows[:ce_windows], lm, place, progress)
    finally:
        sae.train(was_training)
    return result | {name: getattr(here, name) for name in ("data", "model", "layer", "hook", "hook_to", "n_ctx")}


class _Form:
    """Running sums over batches for one form of an SAE: exact, or in sweeps."""

    def __init__(self, sae: SAE, exact: bool) -> None:
        self.sae, self.exact = sae, exact
        self.squared_error = self.cosines = self.seconds = 0.0
        self.active = 0
        self.fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_dec.device)

    def add(self, batch: Batch) -> None:
        acts = batch.acts
        start = _now(acts.device)
        out = run_form(self.sae, acts, batch.mask, batch.documents, self.exact)
        self.seconds += _now(acts.device) - start
        wanted = acts if batch.target is None else batch.target
        x, x_hat = wanted[batch.mask].double(), out.x_hat[batch.mask].double()  # [tokens, d_out]
        self.squared_error += float((x - x_hat).square().sum())
        self.cosines += float(torch.cosine_similarity(x, x_hat, dim=1).sum())
        active = out.code.values[batch.mask] > 0  # [tokens, k]
        self.active += int(active.sum())
        self.fired[out.code.indices[batch.mask][active]] = True

    def figures(self, tokens: int, variance: float) -> dict[str, float]:
        return {
            "fvu": self.squared_error / variance,
            "l0": self.active / tokens,
            "cosine": self.cosines / tokens,
            "tokens_per_s": tokens / max(self.seconds, 1e-9),
        }


def run_form(sae: SAE, acts: Tensor, mask: Tensor, documents: Tensor, exact: bool) -> Output:
    """The output of an SAE on windows [B, T, d_in], in the exact form or in sweeps where it has two forms."""
    if isinstance(sae, ContextualSAE):
        return sae(acts, mask, documents, exact=exact)
    return sae(acts, mask, documents)


def _reconstruction(
    sae: SAE, source: ActivationSource, windows: Sequence[int], batch_windows: int, progress: Progress
) -> dict[str, Any]:
    contextual = isinstance(sae, ContextualSAE)
    forms = [_Form(sae, exact=True)] + ([_Form(sae, exact=False)] if contextual else [])
    device = sae.W_dec.device
    b: Tensor | None = None
    total, squares, tokens = torch.zeros(sae.d_out, dtype=torch.float64, device=device), 0.0, 0
    for start in progress(range(0, len(windows), batch_windows), "evaluating"):
        batch = _read(source, windows[start : start + batch_windows], device)
        centred = (batch.acts if batch.target is None else batch.target)[batch.mask].double()
        # The sums for the variance are taken around the first batch's mean, so that a large mean costs no digits.
        b = centred.mean(dim=0) if b is None and len(centred) else b
        centred = centred if b is None else centred - b
        total += centred.sum(dim=0)
        squares += float(centred.square().sum())
        tokens += len(centred)
        for form in forms:
            form.add(batch)
    if tokens == 0:
        raise UserError(f"the mask leaves out every position of the {len(windows)} windows: nothing to evaluate on")
    variance = squares - float(total.square().sum()) / tokens
    if not variance > 1e-12 * squares:  # below this the difference is rounding only
        raise UserError("the activations to evaluate on are all the same: there is no variance to explain")
    exact = forms[0].figures(tokens, variance)
    result = {
        "arch": sae.arch,
        "k": sae.k,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "n_params": sae.n_params,
        "windows": len(windows),
        "tokens": tokens,
        **exact,
        "dead": sae.dead_features().numel() / sae.d_sae,
        "silent": 1 - int(forms[0].fired.sum()) / sae.d_sae,
    }
    if isinstance(sae, ContextualSAE):
        in_sweeps = forms[1].figures(tokens, variance)
        result |= {"query": sae.query, "sweeps": sae.sweeps, "fvu_exact": exact["fvu"]}
        result |= {f"{name}_sweeps": figure for name, figure in in_sweeps.items()}
        result["gap"] = exact["fvu"] / in_sweeps["fvu"] - 1 if in_sweeps["fvu"] > 0 else 0.0
    for name, figure in result.items():
        if isinstance(figure, float) and not math.isfinite(figure):
            raise UserError(f"{name} is {figure}: the SAE's reconstruction overflows; train it again, at a lower lr")
    return result


def _cross_entropies(
    sae: SAE, source: ActivationSource, windows: Sequence[int], lm: LanguageModel, place: Place, progress: Progress
) -> dict[str, Any]:
    contextual = isinstance(sae, ContextualSAE)
    names = ["ce_clean", "ce_zero", "ce_sae"] + (["ce_sae_sweeps"] if contextual else [])
    sums = dict.fromkeys(names, 0.0)
    tokens = 0
    for start in progress(range(0, len(windows), CE_BATCH_WINDOWS), "cross-entropy"):
        batch = _read(source, windows[start : start + CE_BATCH_WINDOWS], sae.W_dec.device)
        if batch.tokens is None:
            raise UserError("the activations come without token ids, which the cross-entropy needs: cache them anew")
        counted = batch.mask[:, :-1].to(lm.device)  # position t is counted by its loss on token t + 1
        tokens += int(counted.sum())
        for name in names:
            losses = _spliced_losses(sae, batch, lm, place, name)
            sums[name] += float(losses[counted].double().sum())
    if tokens == 0:
        raise UserError(f"the mask leaves out every position of the {len(windows)} windows for the cross-entropy")
    result: dict[str, Any] = {"ce_tokens": tokens} | {name: total / tokens for name, total in sums.items()}
    for name in names:
        if not math.isfinite(result[name]):
            raise UserError(f"{name} is {result[name]}: the language model overflows in {lm.model.dtype}: use float32")
    harm = result["ce_zero"] - result["ce_clean"]
    for form in ["", "_sweeps"] if contextual else [""]:
        recovered = (result["ce_zero"] - result["ce_sae" + form]) / harm if harm > 0 else None
        result["loss_recovered" + form] = recovered
    return result


def _spliced_losses(sae: SAE, batch: Batch, lm: LanguageModel, place: Place, name: str) -> Tensor:
    """The losses [B, T - 1] of one of the cross-entropies of `evaluate`."""
    assert batch.tokens is not None
    if name == "ce_clean":
        return lm.cross_entropy(batch.tokens)

    def reconstruct(acts: Tensor) -> Tensor:
        if name == "ce_zero":
            return acts.new_zeros(*acts.shape[:-1], sae.d_out)
        acts_here = acts.to(sae.W_dec)
        return run_form(sae, acts_here, batch.mask, batch.documents, exact=name == "ce_sae").x_hat.to(acts)

    return lm.cross_entropy(batch.tokens, place.hook, reconstruct, batch.mask, place.to)


def _read(source: ActivationSource, windows: Sequence[int], device: torch.device) -> Batch:
    batch = source.read(windows)
    if not batch.acts.isfinite().all():
        raise UserError(f"NaN or Inf in the activations of windows {windows[0]} to {windows[-1]}: make them again")
    return Batch(*(None if part is None else part.to(device) for part in batch))  # type: ignore[arg-type]


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A row for each SAE, and for a contextual one a second row for the form in sweeps.

    results: as `evaluate` or `csae.evaluate_run` gives them; where there is a key `name`, it is shown instead of arch.
    Below it stands what was evaluated on.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    with_lm = any("ce_sae" in result for result in results)
    headers = ["SAE", "k", "d_sae", "params", "FVU", "L0", "dead", "cosine", "eval\ntokens/s"]
    rows = Table(box=box.SIMPLE_HEAD, padding=0, caption=Text(_evaluated_on(results)), caption_justify="left")
    for header in headers + (["CE", "loss\nrecovered"] if with_lm else []):
        # Where a terminal is narrow, a name may break, a figure not.
        figure = header != "SAE"
        rows.add_column(header, justify="right" if figure else "left", no_wrap=figure, min_width=None if figure else 11)
    for result in results:
        contextual = "fvu_sweeps" in result
        for form in ["", "_sweeps"] if contextual else [""]:
            name = shown(result.get("name", result["arch"]))
            if contextual:
                name += f", {result['sweeps']} sweeps" if form else ", exact"
            row = [
                escape(name),
                str(result["k"]),
                str(result["d_sae"]),
                f"{result['n_params'] / 1e6:.2f}M",
                f"{result['fvu' + form]:.4f}",
                f"{result['l0' + form]:.1f}",
                f"{result['dead']:.1%}",
                f"{result['cosine' + form]:.4f}",
                f"{result['tokens_per_s' + form]:,.0f}",
            ]
            if with_lm:
                recovered = result.get("loss_recovered" + form)
                row.append(f"{result['ce_sae' + form]:.3f}" if "ce_sae" in result else "-")
                row.append("-" if recovered is None else f"{recovered:.1%}")
            rows.add_row(*row)
    return rows


def _evaluated_on(results: Sequence[dict[str, Any]]) -> str:
    """What each SAE was evaluated on, once where it is the same for all."""
    said = [data_in_words(result) for result in results]
    if len(set(said)) <= 1:
        return said[0] if said else ""
    names = [shown(result.get("name", result["arch"])) for result in results]
    return "\n".join(f"{name}: {what}" for name, what in zip(names, said, strict=True))


def data_in_words(result: dict[str, Any]) -> str:
    """On which windows of what an SAE was evaluated, from its figures."""
    count, trained, left_out = result["windows"], result.get("trained_windows"), result.get("left_out_windows")
    which = {"held out": "held-out windows", "not trained on": "windows that it did not train on"}
    said = f"on {count} {which.get(result.get('which', ''), 'windows')} of {result.get('data') or 'activations'}"
    of = TrainedOn(model=result.get("model"), layer=result.get("layer"), hook=result.get("hook"))
    if of.model is not None or of.layer is not None:
        said += f", {dataclasses.replace(of, hook_to=result.get('hook_to')).place()}"
    if trained:
        said += f"; {trained} of them are windows that it trained on"
    if left_out:
        said += f"; {left_out} that it trained on were left out"
    if result.get("which") == "unknown":
        said += "; which it trained on can't be told"
    return said
