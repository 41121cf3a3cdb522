"""Checks of what an SAE's methods are given: each error names the argument, what was given, what is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csae.dead_rows import Dead
from csae.ops.checks import FLOATS, INTEGERS, check_device, check_tensor

if TYPE_CHECKING:
    from csae.sae import SAE


def check_acts(sae: SAE, acts: Tensor, mask: Tensor | None, documents: Tensor | None) -> None:
    """Activations [..., d_in], with an entry of mask and documents for each position."""
    if not isinstance(acts, Tensor):
        raise TypeError(f"acts: given a {type(acts).__name__}; needed a torch.Tensor")
    if acts.dim() == 0 or acts.shape[-1] != sae.d_in:
        raise ValueError(f"acts: given shape {list(acts.shape)}; needed [..., d_in] with d_in = {sae.d_in}")
    if acts.dtype not in FLOATS:
        raise TypeError(f"acts: given dtype {acts.dtype}; needed a floating dtype of 16 to 64 bits")
    check_device("acts", acts, "the SAE", sae.W_enc)
    check_bounds(acts.shape[:-1], mask, documents)
    for name, tensor in (("mask", mask), ("documents", documents)):
        if tensor is not None:
            check_device(name, tensor, "acts", acts)


def check_target(sae: SAE, acts: Tensor, target: Tensor | None) -> None:
    """A transcoder's target [..., d_out]; None for an autoencoder."""
    if not sae.is_transcoder:
        if target is not None:
            raise ValueError("target: given one; needed None: this is no transcoder (it has no d_out)")
        return
    if target is None:
        raise ValueError("target: not given; needed [..., d_out], the activations that the transcoder predicts")
    check_tensor("target", target)
    if target.shape != (*acts.shape[:-1], sae.d_out):
        raise ValueError(
            f"target: given shape {list(target.shape)}; needed {[*acts.shape[:-1], sae.d_out]}, as acts is, with "
            f"d_out = {sae.d_out}"
        )
    if target.dtype not in FLOATS:
        raise TypeError(f"target: given dtype {target.dtype}; needed a floating dtype of 16 to 64 bits")
    check_device("target", target, "acts", acts)


def check_dead(sae: SAE, dead: Tensor | Dead | None) -> None:
    """Numbers of rows that are here, [n_dead] int64, or None; padded ones, [capacity], where all rows are."""
    if isinstance(dead, Dead):
        if sae.shard is not None:
            raise ValueError("dead: given padded, where other processes own rows too; needed [n_dead] int64")
        dead, real = dead
        check_tensor("dead", dead)
        if real is not None:
            check_tensor("dead.real", real)
            if real.dtype != torch.bool or real.shape != dead.shape or real.device != dead.device:
                raise TypeError(
                    f"dead.real: given {real.dtype}, {list(real.shape)} on {real.device}; needed torch.bool, "
                    f"{list(dead.shape)} on {dead.device}, as dead.features"
                )
    if dead is None:
        return
    check_tensor("dead", dead)
    if dead.dtype not in (torch.int64, torch.int32) or dead.dim() != 1:
        raise TypeError(
            f"dead: given dtype {dead.dtype}, shape {list(dead.shape)}; needed [n_dead] int64, numbers of features "
            "as dead_features() gives them"
        )
    if dead.device.type != "cpu" or dead.numel() == 0 or torch.compiler.is_compiling():
        return  # the lookup itself fails there, where a number is out of range
    numbers, rows = dead.numpy(), sae.W_dec.shape[0]
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or most >= rows:
        needed = f"d_sae = {rows}" if rows == sae.d_sae else f"{rows}, the rows of this process"
        raise ValueError(f"dead: given {least} to {most}; needed 0 <= feature < {needed}")


def check_bounds(positions: torch.Size, mask: Tensor | None, documents: Tensor | None) -> None:
    """Raise ValueError or TypeError where the mask or the documents are not an entry for each of the positions."""
    for name, tensor in (("mask", mask), ("documents", documents)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: given a {type(tensor).__name__}; needed a torch.Tensor, or None")
        if tensor is not None and tensor.shape != positions:
            raise ValueError(
                f"{name}: given shape {list(tensor.shape)}; needed one entry a position, {list(positions)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: given dtype {mask.dtype}; needed torch.bool, True where a position takes part")
    if documents is not None and documents.dtype not in INTEGERS:
        raise TypeError(f"documents: given dtype {documents.dtype}; needed integer ids, such as torch.int64")


def check_trained(sae: SAE) -> set[str]:
    """The names of the parameters that are not frozen; ValueError where there is none, or where two are one."""
    named = list(sae.named_parameters(remove_duplicate=False))
    names = {name for name, _ in named}
    twice: list[str] = []
    if len({id(parameter) for _, parameter in named}) < len(named):
        twice = sorted(names - {name for name, _ in sae.named_parameters()})
    if twice:
        raise ValueError(
            f"sae: {', '.join(twice)} is another name of a parameter; needed one for each name: tied parameters train "
            "by loss(...).loss.backward()"
        )
    own = {"W_enc", "b_enc", "W_dec", "b_dec", *sae.look_back} | ({"W_skip"} if sae.skip else set())
    foreign = sorted(own - names)
    if foreign:
        raise ValueError(
            f"sae: {', '.join(foreign)} is computed from something else; needed a parameter: such an SAE trains by "
            "loss(...).loss.backward()"
        )
    trained = {name for name, parameter in named if parameter.requires_grad}
    if not trained:
        raise ValueError("sae: all of its parameters are frozen; needed one with requires_grad=True to train")
    return trained
