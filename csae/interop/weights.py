"""What every library's file holds of a TopK SAE: its four weights, and an SAE made of them."""

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
    """[d_sae, d_in]"""
    b_dec: Tensor
    """[d_in]"""


def topk_weights(sae: SAE, library: str) -> Weights:
    """The weights of a TopKSAE as `library` has them: on the CPU, with a scale of one."""
    if not isinstance(sae, TopKSAE):
        raise UserError(f"sae: given a {type(sae).__name__}; needed a TopKSAE: {library} has no class for others")
    plain = unscaled(sae)
    return Weights(*(getattr(plain, name).detach().cpu().contiguous() for name in Weights._fields))


def topk_sae(path: Path, weights: Weights, k: object) -> TopKSAE:
    """The TopKSAE of these weights, in their dtype and evaluation mode. path: the file, for the messages."""
    if weights.W_enc.dim() != 2:
        raise UserError(f"{path}: W_enc has shape {list(weights.W_enc.shape)}; needed [d_sae, d_in]")
    d_sae, d_in = weights.W_enc.shape
    shapes = ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))
    for name, tensor, shape in zip(Weights._fields, weights, shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}; needed {list(shape)}, as W_enc tells")
    check_dtypes(path, weights)
    try:
        with torch.device("meta"):  # no second copy, and no random numbers
            sae = TopKSAE(d_in, d_sae, k)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a TopK SAE: {error}") from error
    return with_tensors(sae, weights._asdict())


def with_tensors(sae: AnySAE, tensors: dict[str, Tensor]) -> AnySAE:
    """An SAE made on the meta device, with these parameters in place, a scale of one, in evaluation mode."""
    dtype = next(iter(tensors.values())).dtype
    buffers = {"scale": torch.ones((), dtype=dtype), "tokens_since_fired": torch.zeros(sae.d_sae, dtype=torch.int64)}
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
    """
    sae = copy.deepcopy(sae)
    for parameter in (sae.b_enc, sae.b_dec):
        parameter.mul_(sae.scale)
    if isinstance(sae, ContextualSAE):
        sae.W_O.mul_(sae.scale)
        for parameter in (sae.W_mem, sae.W_Q):
            parameter.div_(sae.scale)
    sae.scale.fill_(1)
    return sae
