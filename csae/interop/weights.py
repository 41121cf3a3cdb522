"""What every library's file holds of a TopK SAE or transcoder: its weights, and an SAE made of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from csae.contextual_sae import ContextualSAE
from csae.errors import UserError
from csae.sae import SAE
from csae.topk_sae import TopKSAE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

AnySAE = TypeVar("AnySAE", bound=SAE)


class Weights(NamedTuple):
    """The weights of a TopK SAE that takes activations as they are."""

    W_enc: Tensor
    """[d_sae, d_in]"""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_out]"""
    b_dec: Tensor
    """[d_out]"""


def topk_weights(sae: SAE, library: str) -> Weights:
    """The weights of a TopKSAE as `library` has them: on the CPU, with a scale of one.

    Raises UserError for another SAE, and for a transcoder.
    """
    _check_topk(sae, library)
    if sae.is_transcoder:
        raise UserError(f"sae: given a transcoder; needed an SAE without d_out: {library} has no TopK transcoder")
    return _on_cpu(unscaled(sae))


@torch.no_grad()
def transcoder_weights(sae: SAE, library: str) -> tuple[Weights, Tensor | None]:
    """`topk_weights` of a TopK transcoder, with a mean of zero, and W_skip [d_out, d_in] where it has one."""
    _check_topk(sae, library)
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


def _on_cpu(sae: SAE) -> Weights:
    return Weights(*(getattr(sae, name).detach().cpu().contiguous() for name in Weights._fields))


def topk_sae(path: Path, weights: Weights, k: object) -> TopKSAE:
    """The TopKSAE of these weights, in their dtype and evaluation mode. path: the file, for the messages."""
    return _made(path, weights._asdict(), k, d_out=None)


def topk_transcoder(path: Path, weights: Weights, W_skip: Tensor | None, k: object) -> TopKSAE:
    """`topk_sae` for a transcoder, with a mean of zero."""
    skip = {} if W_skip is None else {"W_skip": W_skip}
    return _made(path, weights._asdict() | skip, k, d_out=weights.b_dec.numel())


def _made(path: Path, tensors: dict[str, Tensor], k: object, d_out: int | None) -> TopKSAE:
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
    try:
        with torch.device("meta"):  # no second copy, and no random numbers
            sae = TopKSAE(d_in, d_sae, k, d_out=d_out, skip="W_skip" in tensors)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a TopK SAE: {error}") from error
    return with_tensors(sae, tensors)


def with_tensors(sae: AnySAE, tensors: dict[str, Tensor]) -> AnySAE:
    """An SAE made on the meta device, with these parameters in place, a scale of one, in evaluation mode.

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
        raise UserError(f"{path}: {' and '.join(found)}; needed {', '.join(sorted(names))}, as a TopK SAE has them")


@torch.no_grad()
def unscaled(sae: AnySAE) -> AnySAE:
    """A copy that computes the same with a scale of one: its feature activations are in units of the activations.

    With s the scale, relu(topk) of s times the pre-activations is s times the code, so b_dec, b_enc and what c is
    made of are multiplied by s, and what reads codes or activations on the way to the keys, values and queries is
    divided by it. The encoder and the decoder stay as they are, unit rows of W_dec among them. Where s is one, or a
    power of two, this is exact.

    The code of a transcoder is in units of its target, so what it makes is multiplied by target_scale, t, and W_enc and
    W_skip, which take one to the other, by t / s.
    """
    sae = copy.deepcopy(sae)
    s, t = sae.scale.clone(), sae.out_scale.clone()
    for parameter in (sae.b_enc, sae.b_dec):
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
