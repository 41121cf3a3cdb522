"""Lazy tensors for libraries that encode with relu and decode with a linear layer: dictionary_learning and sparsify.

`pre_acts` and `scattered` give `Lazy` tensors in the place of the library's dense [n, d_sae] ones. The few questions
that a training step asks of them are answered without making them (`lazy.ANSWERS`): the k largest, those of dead
features, the decoder's product. Whoever asks anything else gets the dense tensor's answer.

The gradient of the k largest goes straight to the weights. So `retain_grad` on pre-activations does not see it, only
the gradients of other reads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from csae.ops import topk_encode
from csae.ops.checks import autocast_to
from csae.ops.threshold_encode import rows_of

from .lazy import ANSWERS, Code, Content, Lazy, dense, versions_of
from .topk_graph import Decode, Scatter

# A code of fewer tokens is decoded as the dense tensor: to bring W_dec into rows takes longer than the product.
FEW_TOKENS = 128


class Rectified(NamedTuple):
    """relu(x W_enc^T + b_enc) [..., d_sae], not yet computed; in this dtype, which is autocast's where it was on."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    only: Tensor | None
    """[d_sae] bool: the features that it has; the others are -inf"""
    dtype: torch.dtype
    versions: tuple[int, ...]

    def dense(self) -> Tensor:
        pre_acts = torch.nn.functional.linear(*self.unchanged()).relu()
        return pre_acts if self.only is None else torch.where(self.only, pre_acts, -math.inf)

    def unchanged(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, W_enc and b_enc in the dtype; RuntimeError where one was changed."""
        if versions_of(*self[:3]) != self.versions:
            raise RuntimeError(
                "pre-activations: given weights that were changed since they encoded; needed as they were: "
                "read the pre-activations before the optimizer's step, or encode again"
            )
        return self.x.to(self.dtype), self.W_enc.to(self.dtype), self.b_enc.to(self.dtype)


class _PreActs(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, only: Tensor | None) -> Tensor:
        (like,) = autocast_to(x[..., :0])
        source = Rectified(x, W_enc, b_enc, only, like.dtype, versions_of(x, W_enc, b_enc))
        ctx.source = source
        return Lazy(source, (*x.shape[:-1], W_enc.shape[0]), like.dtype, x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc = ctx.source[:3]
        need_x, need_W, need_b, _ = ctx.needs_input_grad
        # Computed again: the lazy tensor may have been written to since.
        made = Content(ctx.source, x.device.type).dense()
        d_pre = rows_of(torch.where(made <= 0, 0, dense(grad)))
        of = x.to(d_pre.dtype).reshape(-1, x.shape[-1])
        return (
            (d_pre @ W_enc.to(d_pre.dtype)).view(x.shape).to(x.dtype) if need_x else None,
            (d_pre.T @ of).to(W_enc.dtype) if need_W else None,
            d_pre.sum(dim=0).to(b_enc.dtype) if need_b else None,
            None,
        )


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, only: Tensor | None = None) -> Tensor:
    """relu(x W_enc^T + b_enc) [..., d_sae], lazy; x [..., d_in], W_enc [d_sae, d_in], b_enc [d_sae].

    only: [d_sae] bool: the features that it has; the others are -inf.
    """
    return _PreActs.apply(x, W_enc, b_enc, only)


def scattered(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """The dense tensor [..., d_sae] of a code, lazy: values, indices [..., k], no feature twice in a token."""
    return Scatter.apply(_zeros((*values.shape[:-1], d_sae), values), values, indices)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Lazy:
    none = torch.zeros(*shape[:-1], 0, dtype=like.dtype, device=like.device)
    return Lazy.of(Code(none, none.long(), shape[-1]))


# --- the answers: each with the arguments of the function that it answers, or NotImplemented ---------------------


def _source(input: Any) -> Any:
    return input.source if isinstance(input, Lazy) else None


def _where(condition: Tensor, input: Any, other: Any) -> Any:
    """Pre-activations of some features only, -inf for the others."""
    source = _source(input)
    if not isinstance(source, Rectified) or source.only is not None or other != -math.inf:
        return NotImplemented
    if condition.numel() != input.shape[-1] or condition.shape[-1] != input.shape[-1]:
        return NotImplemented
    return pre_acts(*source.unchanged(), only=condition.flatten())


def _topk(input: Any, k: int | Tensor, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The k largest pre-activations, encoded from the features that are asked for."""
    source = _source(input)
    if not isinstance(source, Rectified) or dim not in (-1, input.dim() - 1) or not largest:
        return NotImplemented
    x, W_enc, b_enc = source.unchanged()
    features = None if source.only is None else source.only.nonzero().flatten()
    if features is not None:
        W_enc, b_enc = W_enc.index_select(0, features), b_enc.index_select(0, features)
    if not 1 <= int(k) <= W_enc.shape[0]:
        return NotImplemented
    values, indices = topk_encode(x, W_enc, b_enc, int(k))
    return torch.return_types.topk((values, indices if features is None else features[indices]))  # type: ignore[attr-defined]


def _zeros_like(input: Any, **kwargs: Any) -> Any:
    """Features of which none is active yet."""
    return NotImplemented if kwargs else _zeros(tuple(input.shape), input)


def _scatter_(input: Any, dim: int, index: Any, src: Any) -> Any:
    """A code put into features of which none is active."""
    source = _source(input)
    if not isinstance(source, Code) or source.values.numel() > 0:
        return NotImplemented
    if dim not in (-1, input.dim() - 1) or not isinstance(src, Tensor) or src.shape != index.shape:
        return NotImplemented
    if src.shape[:-1] != input.shape[:-1] or src.dtype != input.dtype:
        return NotImplemented
    # Written to the dense tensor, a feature that comes twice keeps one of its values; decoded, it would have both.
    if bool((index.sort(dim=-1).values.diff(dim=-1) == 0).any()):
        return NotImplemented
    return Scatter.apply(input, src, index)


def _linear(input: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The decoder's product, weight [d_in, d_sae]."""
    source = _source(input)
    if not isinstance(source, Code) or bias is not None or input.shape[:-1].numel() < FEW_TOKENS:
        return NotImplemented
    # Rows of features once, for both passes: the op would make them contiguous in each.
    return Decode.apply(input, weight.T.contiguous(), None, source)


ANSWERS |= {
    torch.where: _where,
    torch.topk: _topk,
    Tensor.topk: _topk,
    torch.zeros_like: _zeros_like,
    Tensor.scatter_: _scatter_,
    torch.nn.functional.linear: _linear,
}
