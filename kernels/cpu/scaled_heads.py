"""RMSNorm of each head with an optional gain, and its gradients: float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import FLOATS, check_strided
from .library import check_status, native


def scale_heads(heads: Tensor, gain: Tensor | None, least: float, weight: float) -> tuple[Tensor, Tensor]:
    """heads [..., H, d], gain [H] (None: 1) -> heads * scale * gain, and scale [..., H, 1].

    scale = 1 / sqrt(least + weight * mean square of the head). With weight 1 and a small `least` this is RMSNorm; with
    least 1 and weight 1/b^2 the root mean square stays below b. TypeError and ValueError name the argument that doesn't
    fit.
    """
    n, H, d = _sizes("heads", heads)
    heads, gain = heads.contiguous(), _gain(gain, H)
    out, scale = torch.empty_like(heads), heads.new_empty(*heads.shape[:-1], 1)
    status = native().csae_scale_heads(
        *(heads.data_ptr(), n, H, d, least, weight, None if gain is None else gain.data_ptr()),
        *(out.data_ptr(), scale.data_ptr(), torch.get_num_threads()),
    )
    check_status("scale_heads", status)
    return out, scale


def scale_heads_backward(
    grad: Tensor, heads: Tensor, gain: Tensor | None, scale: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """grad, heads [..., H, d] -> the gradient of heads, and that of gain [H], also if there is no gain.

    scale: as `scale_heads` returned it for these heads.
    """
    n, H, d = _sizes("heads", heads)
    check_strided("grad", grad, torch.float32, tuple(heads.shape))
    check_strided("scale", scale, torch.float32, (*heads.shape[:-1], 1))
    grad, heads, scale = grad.contiguous(), heads.contiguous(), scale.contiguous()
    given, gain = gain, _gain(gain, H)
    d_heads, d_gains = torch.empty_like(heads), torch.empty_like(scale)
    status = native().csae_scale_heads_backward(
        *(grad.data_ptr(), heads.data_ptr(), scale.data_ptr(), n, H, d, weight),
        *(None if gain is None else gain.data_ptr(), d_heads.data_ptr(), d_gains.data_ptr(), torch.get_num_threads()),
    )
    check_status("scale_heads_backward", status)
    d_gain = d_gains.view(n, H).sum(dim=0)
    return d_heads, d_gain if given is None else d_gain.to(given.dtype)


def _sizes(name: str, heads: Tensor) -> tuple[int, int, int]:
    """(number of tokens, heads, width of a head), after checks."""
    check_strided(name, heads, torch.float32, (None,) * (heads.ndim if isinstance(heads, Tensor) else 2))
    if heads.ndim < 2 or 0 in heads.shape[-2:]:
        raise ValueError(f"{name}: given shape {list(heads.shape)}; needed [..., H, d], with H and d 1 or more")
    return heads.shape[:-2].numel(), heads.shape[-2], heads.shape[-1]


def _gain(gain: Tensor | None, H: int) -> Tensor | None:
    if gain is None:
        return None
    check_strided("gain", gain, FLOATS, (H,))
    return gain.float().contiguous()
