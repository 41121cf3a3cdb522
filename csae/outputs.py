"""What an SAE gives: the code of each token, the reconstruction, and the training loss."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """The mask and the documents that windows were encoded with."""

    mask: Tensor | None
    """[B, T] bool: which positions took part; None: all"""
    documents: Tensor | None
    """[B, T] integer: a document is a run of equal ids; None: one in each window"""


def _shortly(what: tuple[Any, ...]) -> str:
    """What `print` shows of a tuple of tensors: their shapes and dtypes, and a number where there is one."""
    names: tuple[str, ...] = what._fields  # type: ignore[attr-defined]
    return f"{type(what).__name__}({', '.join(map(_part, names, what))})"


def _part(name: str, value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{name}={value!r}"
    dtype, on = str(value.dtype).removeprefix("torch."), "" if value.device.type == "cpu" else f" on {value.device}"
    if value.dim() == 0 and value.device.type != "meta" and type(value) in (Tensor, torch.nn.Parameter):
        return f"{name}={value.item():.6g}"
    return f"{name}=<{list(value.shape)} {dtype}{on}>"


class _Pair(NamedTuple):
    values: Tensor
    """[..., k]: how active, in units of normalised activations; zero where fewer than k are active"""
    indices: Tensor
    """[..., k] int64: which features"""


class Code(_Pair):
    """The active features of each token: values [..., k] and indices [..., k] int64, as a tuple of two."""

    bounds: Bounds | None = None
    """what `ContextualSAE.decode` needs beside the values and indices of whole windows. None for a code that was put
    together from its parts, or of a piece of a sequence"""

    def __repr__(self) -> str:
        return _shortly(self)

    @classmethod
    def of_windows(cls, values: Tensor, indices: Tensor, mask: Tensor | None, documents: Tensor | None) -> Self:
        """A code that knows what it was encoded with."""
        code = cls(values, indices)
        code.bounds = Bounds(*(None if tensor is None else tensor.clone() for tensor in (mask, documents)))
        return code

    def _replace(self, /, **given: Any) -> Self:
        code = super()._replace(**given)
        code.bounds = self.bounds
        return code


class Output(NamedTuple):
    """What an SAE makes of activations [..., d_in]."""

    x_hat: Tensor
    """[..., d_out]: the reconstruction, in the units of the activations, for a transcoder of its target, and in the
    dtype of the activations"""
    code: Code
    """the features that are active here: for a contextual SAE, what is new"""
    c: Tensor
    """[..., d_out]: the look-back's part of x_hat, in the same units and dtype; zero for a per-token SAE"""

    def __repr__(self) -> str:
        return _shortly(self)


class Ran(NamedTuple):
    """What an SAE makes of normalised activations, in normalised units."""

    parts: tuple[Tensor, ...]
    """what adds up to x_hat: tensors of its shape, and b_dec [d_out]"""
    code: Code
    c: Tensor
    """[..., d_out]"""
    suppressed: Tensor
    """[..., d_in]: what the look-back makes the encoder subtract; the same as c but for a transcoder"""
    groups: Tensor | None = None
    """[..., G, d_out]: the parts of x_hat by the groups of features between prefixes, for the loss of an SAE that has
    prefixes"""

    @property
    def x_hat(self) -> Tensor:
        """[..., d_out]"""
        return functools.reduce(torch.add, self.parts)


class Sweeps(NamedTuple):
    """How a contextual SAE runs in parallel: a sweep looks back at the codes of the sweep before, and encodes again."""

    times: int
    """how many sweeps look back"""
    from_exact: bool = False
    """whether the first one looks at the exact codes, so that the sweeps give what running exactly does, with a
    gradient. Gradients do not flow into the recurrence, only through the sweeps."""


class Losses(NamedTuple):
    """The training loss of a batch and its parts, each a scalar."""

    loss: Tensor
    """fvu + aux_coef * aux: what to call backward() on; with prefixes, the mean of their FVUs instead of fvu, and with
    selection="jumprelu" also what `SAE.loss` says of L0"""
    fvu: Tensor
    """fraction of the batch's variance that is unexplained, over positions in the mask"""
    aux: Tensor
    """what dead features leave unexplained of the residual (AuxK); zero where none is dead"""
    code: Code
    """the code of the batch"""

    def __repr__(self) -> str:
        return _shortly(self)
