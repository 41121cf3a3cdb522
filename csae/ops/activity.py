"""Which features of a code are active, as training counts and sorts them."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from .backend import fake, kernels, no_gradient, operator


def active_features(values: Tensor, indices: Tensor, mask: Tensor | None, d_sae: int) -> Tensor:
    """indices [..., k] of a code, and d_sae where a slot is not active: its value is not positive or the mask False.

    values: [..., k]; NaN is active, so that it is seen. mask: [...] bool, or None. No gradient flows.
    """
    return _active_features(values.detach(), indices, mask, d_sae)


def fired(since: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None) -> None:
    """Set since [d_sae] int64 to zero for each feature that is active in the code values, indices [..., k]."""
    _fired(since, values.detach(), indices, mask)


@operator("active_features")
def _active_features(values: Tensor, indices: Tensor, mask: Tensor | None, d_sae: int) -> Tensor:
    rows = _rows(values, indices, mask)
    return kernels("activity", values.device, values.dtype).active_features(*rows, d_sae).view(indices.shape)


@fake("active_features")
def _(values, indices, mask, d_sae):
    return indices.new_empty(indices.shape)


@operator("fired", ("since",))
def _fired(since: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None) -> None:
    increment_version(since)
    kernels("activity", values.device, values.dtype).fired(since, *_rows(values, indices, mask))


@fake("fired")
def _(since, values, indices, mask):
    return None


no_gradient("active_features")


def _rows(values: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = indices.shape[:-1].numel(), indices.shape[-1]
    return values.reshape(shape), indices.reshape(shape), None if mask is None else mask.reshape(-1)
