"""RMSNorm of each head with an optional gain, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_heads(heads: Tensor, gain: Tensor | None, least: float, weight: float) -> tuple[Tensor, Tensor]:
    """heads [..., H, d], gain [H] -> heads * scale * gain in heads' dtype, and scale [..., H, 1].

    scale is (least + weight * mean square of the head)^(-1/2), in float32 or wider; a gain that is not given is 1.
    """
    scale = head_scale(heads, least, weight)
    return (heads * (scale if gain is None else scale * gain.unsqueeze(-1))).to(heads.dtype), scale


def scale_heads_backward(
    grad: Tensor, heads: Tensor, gain: Tensor | None, scale: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """grad [..., H, d] of what `scale_heads` gave -> the gradient of heads, and that of gain [H], also if not given."""
    d_gains = (grad * heads).sum(dim=-1, keepdim=True) * scale
    factor = scale if gain is None else scale * gain.unsqueeze(-1)
    along = d_gains * (factor * scale * (-weight / heads.shape[-1]))
    d_heads = torch.addcmul(grad * factor, heads, along).to(heads.dtype)
    d_gain = d_gains.reshape(heads.shape[:-2].numel(), heads.shape[-2]).sum(dim=0)
    return d_heads, d_gain if gain is None else d_gain.to(gain.dtype)


def head_scale(heads: Tensor, least: float, weight: float) -> Tensor:
    """(least + weight * mean square)^(-1/2) of each head: heads [..., H, d] -> [..., H, 1], in float32 or wider."""
    wide = torch.promote_types(heads.dtype, torch.float32)
    norms = torch.linalg.vector_norm(heads, dim=-1, keepdim=True, dtype=wide)
    return torch.rsqrt(least + norms.square() * (weight / heads.shape[-1]))
