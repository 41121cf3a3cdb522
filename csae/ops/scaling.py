"""over_scale: activations in normalised units, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import fake, kernels, no_gradient, operator, place


def over_scale(acts: Tensor, scale: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """acts [..., d] / scale, divided in float32 or wider and given in `dtype`; zero where the mask [...] is False.

    What is left out may be NaN, or too large for its dtype. scale: a scalar.
    """
    wide = torch.promote_types(torch.promote_types(acts.dtype, dtype), torch.float32)
    one_launch = (
        not torch.compiler.is_compiling()
        and not acts.requires_grad
        and {wide, dtype, scale.dtype} == {torch.float32}
        and place("scaling", acts.device, acts.dtype) == "triton"
    )
    if one_launch:
        return _over_scale(acts, scale, mask)
    x = (acts.to(wide) / scale.to(wide)).to(dtype)
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


@operator("over_scale")
def _over_scale(acts: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    rows = acts.reshape(acts.shape[:-1].numel(), acts.shape[-1])
    by = kernels("scaling", acts.device, acts.dtype)
    return by.over_scale(rows, scale, None if mask is None else mask.reshape(-1)).view(acts.shape)


@fake("over_scale")
def _(acts, scale, mask):
    return acts.new_empty(acts.shape, dtype=torch.float32)


no_gradient("over_scale")
