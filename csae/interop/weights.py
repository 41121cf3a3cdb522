"""What every library's file holds of a per-token SAE or transcoder: its weights, and an SAE made of them.

A code is selected by k, or by what is above a threshold: one for all features ("batch"), or one for each ("jumprelu").
Other libraries have no `k_max`: there a token has all features that are above the threshold. So what is loaded has room
for d_sae features a token, unless less is asked for. And where ours has a smaller `k_max`, a token with more features
above the threshold has them all once it is exported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from csae.contextual_sae import ContextualSAE
from csae.errors import UserError
from csae.sae import SAE
from csae.topk_sae import TopKSAE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

AnySAE = TypeVar("AnySAE", bound=SAE)


SELECTION_KEY = "csae_selection"  # in another library's config: what it has no field for


class Weights(NamedTuple):
    """The weights of a per-token SAE that takes activations as they are."""

    W_enc: Tensor
    """[d_sae, d_in]"""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_out]"""
    b_dec: Tensor
    """[d_out]"""


class Asked(NamedTuple):
    """What `csae.interop.load` was asked for beside a file."""

    k: int | None = None
    k_max: int | None = None

    def nothing(self, path: Path) -> None:
        """Raise UserError where something was asked for that a TopK SAE has in its file, or has not."""
        for name, given in self._asdict().items():
            if given is not None:
                raise UserError(f"{name}: given {given} for a TopK SAE: leave it out, {path.name} says which k it has")


def topk_weights(sae: SAE, library: str) -> Weights:
    """The weights of a TopKSAE that selects by k, as `library` has them: on the CPU, with a scale of one.

    Raises UserError for another SAE, and for a transcoder.
    """
    _check_by_k(sae, library)
    return _plain_weights(sae, library)[0]


def weights_and_threshold(sae: SAE, library: str) -> tuple[Weights, Tensor | None]:
    """`topk_weights` of any selection, with the threshold, [] or [d_sae], in the same units; None of "topk"."""
    _check_topk(sae, library)
    return _plain_weights(sae, library)


def _plain_weights(sae: SAE, library: str) -> tuple[Weights, Tensor | None]:
    if sae.is_transcoder:
        raise UserError(f"sae: given a transcoder; needed an SAE without d_out: {library} has no TopK transcoder")
    plain = unscaled(sae)
    return _on_cpu(plain), None if plain.threshold is None else plain.threshold.detach().cpu().clone()


def selection_record(sae: SAE) -> dict[str, Any]:
    """What to add to another library's config for `threshold_sae` to give back the same SAE."""
    if sae.selection == "topk":
        return {}
    return {SELECTION_KEY: {"selection": sae.selection, "k": sae.k, "k_max": sae.k_max, "prefixes": list(sae.prefixes)}}


@torch.no_grad()
def subtracting_b_dec(path: Path, weights: Weights) -> Weights:
    """Weights of an encoder that reads x as those of one that reads x - b_dec; in float32 or wider."""
    check_shapes(path, weights._asdict())
    return _with_b_dec(weights, 1)


@torch.no_grad()
def reading_plain(weights: Weights) -> Weights:
    """Weights of an encoder that reads x - b_dec as those of one that reads x; in float32 or wider."""
    return _with_b_dec(weights, -1)


def _with_b_dec(weights: Weights, sign: int) -> Weights:
    wide = torch.promote_types(weights.W_enc.dtype, torch.float32)
    W_enc, b_enc, W_dec, b_dec = (tensor.to(wide) for tensor in weights)
    # In float64, so that it is rounded once: a pre-activation near its threshold should stay on its side.
    product = torch.cat([rows.double() @ b_dec.double() for rows in W_enc.split(1 << 14)])
    shifted = b_enc.double() + sign * product
    return Weights(W_enc, shifted.to(wide), W_dec, b_dec)


@torch.no_grad()
def transcoder_weights(sae: SAE, library: str) -> tuple[Weights, Tensor | None]:
    """`topk_weights` of a TopK transcoder, with a mean of zero, and W_skip [d_out, d_in] where it has one."""
    _check_by_k(sae, library)
    plain = unscaled(sae)
    assert plain.mean is not None
    # What reads x - mean can read x, with other biases.
    plain.b_enc.sub_(plain.W_enc @ plain.mean)
    if plain.W_skip is None:
        return _on_cpu(plain), None
    plain.b_dec.sub_(plain.W_skip @ plain.mean)
    return _on_cpu(plain), plain.W_skip.detach().cpu().contiguous()


def _check_topk(sae: SAE, library: str) -> None:
    if not isinstance(sae, TopKSAE):
        raise UserError(f"sae: given a {type(sae).__name__}; needed a TopKSAE: {library} has no class for others")


def _check_by_k(sae: SAE, library: str) -> None:
    _check_topk(sae, library)
    if sae.selection != "topk":
        raise UserError(f'sae: given selection="{sae.selection}"; needed "topk": {library} knows no thresholds')


def _on_cpu(sae: SAE) -> Weights:
    return Weights(*(getattr(sae, name).detach().cpu().contiguous() for name in Weights._fields))


def topk_sae(path: Path, weights: Weights, k: object) -> TopKSAE:
    """The TopKSAE of these weights, in their dtype and evaluation mode. path: the file, for the messages."""
    return _made(path, weights._asdict(), {"k": k})


def threshold_sae(
    path: Path,
    weights: Weights,
    threshold: Tensor,
    k: object,
    asked: Asked,
    config: dict[str, Any],
    prefixes: tuple[int, ...] = (),
) -> TopKSAE:
    """The TopKSAE with these weights and this threshold, [] ("batch") or [d_sae] ("jumprelu").

    k: the mean number of active features a token as the file says it, None where it doesn't. config: where
    `selection_record` may be.
    """
    known = config.get(SELECTION_KEY)
    record: dict[str, Any] = known if isinstance(known, dict) else {}
    k = record.get("k", k) if k is None else k
    if isinstance(k, float):
        if not k.is_integer() and asked.k is None:
            raise UserError(f"{path}: k is {k}; needed a whole number: give k={max(1, round(k))}, or another")
        k = int(k) if k.is_integer() else None
    if k is None and asked.k is None:
        raise UserError(
            f"k: not given, and {path} doesn't say; needed the mean number of active features a token, as published"
        )
    if None not in (k, asked.k) and k != asked.k:
        raise UserError(f"k: given {asked.k}; the file says {k}: leave it out")
    d_sae = weights.b_enc.numel()
    k_max = record.get("k_max", d_sae) if asked.k_max is None else asked.k_max
    if threshold.dim() == 1 and record.get("selection") == "batch" and threshold.numel():
        if not bool((threshold == threshold[0]).all()):
            raise UserError(f"{path}: thresholds that differ, of an SAE that was saved with one: copy it again")
        threshold = threshold[0]
    if tuple(threshold.shape) not in ((), (d_sae,)):
        raise UserError(f"{path}: threshold has shape {list(threshold.shape)}; needed [d_sae] = [{d_sae}], or one")
    one = threshold.dim() == 0
    least = torch.promote_types(weights.W_enc.dtype, torch.float32) if one else weights.W_enc.dtype
    selecting: dict[str, Any] = {"k": asked.k if k is None else k, "k_max": k_max}
    selecting |= {"selection": "batch" if one else "jumprelu", "prefixes": record.get("prefixes", prefixes)}
    return _made(path, weights._asdict(), selecting, threshold=threshold.to(least, copy=True))


def topk_transcoder(path: Path, weights: Weights, W_skip: Tensor | None, k: object) -> TopKSAE:
    """`topk_sae` for a transcoder, with a mean of zero."""
    skip = {} if W_skip is None else {"W_skip": W_skip}
    return _made(path, weights._asdict() | skip, {"k": k}, d_out=weights.b_dec.numel())


def check_shapes(path: Path, tensors: dict[str, Tensor], d_out: int | None = None) -> tuple[int, int]:
    """d_in and d_sae of these weights. UserError where their shapes or dtypes don't fit."""
    if tensors["W_enc"].dim() != 2:
        raise UserError(f"{path}: W_enc has shape {list(tensors['W_enc'].shape)}; needed [d_sae, d_in]")
    d_sae, d_in = tensors["W_enc"].shape
    width = d_in if d_out is None else d_out
    shapes = {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_sae, width), "b_dec": (width,)}
    shapes["W_skip"] = (width, d_in)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)}; needed {list(shapes[name])}, as W_enc tells"
            )
    check_dtypes(path, tensors.values())
    return d_in, d_sae


def _made(
    path: Path,
    tensors: dict[str, Tensor],
    selecting: dict[str, Any],
    d_out: int | None = None,
    threshold: Tensor | None = None,
) -> TopKSAE:
    d_in, d_sae = check_shapes(path, tensors, d_out)
    try:
        with torch.device("meta"):  # no second copy, and no random numbers
            sae = TopKSAE(d_in, d_sae, d_out=d_out, skip="W_skip" in tensors, **selecting)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a TopK SAE: {error}") from error
    return with_tensors(sae, tensors if threshold is None else tensors | {"threshold": threshold})


def with_tensors(sae: AnySAE, tensors: dict[str, Tensor]) -> AnySAE:
    """An SAE made on the meta device, with these parameters and threshold, a scale of one, in evaluation mode.

    A transcoder's mean is zero.
    """
    dtype = next(iter(tensors.values())).dtype
    buffers = {"scale": torch.ones((), dtype=dtype), "tokens_since_fired": torch.zeros(sae.d_sae, dtype=torch.int64)}
    if sae.is_transcoder:
        buffers |= {"mean": torch.zeros(sae.d_in, dtype=dtype), "target_scale": torch.ones((), dtype=dtype)}
    sae.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()} | buffers, assign=True)
    return sae.eval()


def check_dtypes(path: Path, tensors: Iterable[Tensor]) -> None:
    """UserError unless all tensors have one dtype, a floating one that the ops take."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    wanted = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    if len(dtypes) != 1 or dtypes[0] not in wanted:
        raise UserError(f"{path}: weights in {' and '.join(dtypes)}; needed one of {', '.join(wanted)} for all")


def check_names(path: Path, tensors: dict[str, Tensor], names: Iterable[str]) -> None:
    """UserError unless the file holds these tensors and no others."""
    missing, extra = sorted(set(names) - tensors.keys()), sorted(tensors.keys() - set(names))
    if missing or extra:
        found = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(extra)}"] * bool(extra)
        raise UserError(f"{path}: {' and '.join(found)}; needed {', '.join(sorted(names))}, as such an SAE has them")


@torch.no_grad()
def unscaled(sae: AnySAE) -> AnySAE:
    """A copy that computes the same with a scale of one: its feature activations are in units of the activations.

    With s the scale, relu(topk) of s times the pre-activations is s times the code, so b_dec, b_enc, the threshold and
    what c is made of are multiplied by s, and what reads codes or activations on the way to the keys, values and
    queries is divided by it. The encoder and the decoder stay as they are, unit rows of W_dec among them. Where s is
    one, or a power of two, this is exact.

    The code of a transcoder is in units of its target, so what it makes is multiplied by target_scale, t, and W_enc and
    W_skip, which take one to the other, by t / s.
    """
    sae = copy.deepcopy(sae)
    s, t = sae.scale.clone(), sae.out_scale.clone()
    for parameter in (sae.b_enc, sae.b_dec, sae.threshold):
        if parameter is not None:
            parameter.mul_(t)
    if isinstance(sae, ContextualSAE):
        sae.W_O.mul_(t)
        sae.W_mem.div_(t)
        sae.W_Q.div_(t if sae.query == "past" else s)
        if sae.W_I is not None:
            sae.W_I.mul_(s)
    if sae.mean is not None and sae.target_scale is not None:
        sae.mean.mul_(s)
        for weight in (sae.W_enc, sae.W_skip):
            if weight is not None:
                weight.mul_(t / s)
        sae.target_scale.fill_(1)
    sae.scale.fill_(1)
    return sae
