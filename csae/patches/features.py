"""Dense tensors [n, d_sae] that answer a training step sparsely, and become dense for whoever asks more.

Other libraries hand a dense tensor from their encoder to their decoder, to their losses and to whoever asks. `PreActs`
and `Features` stand for such tensors. They know their shape, dtype and device, and answer the few questions that a
training step asks: the k largest, those of dead features, the decoder's product. For anything else they become the
tensor that they stand for, with its place in autograd's graph, at once and for good: it is read, saved or changed as
before.

What they can't do is be dense after the fact: the gradient of a loss by such a tensor is there only where the tensor
was read before the decoder used it. Where hooks look at tensors between (SAELens), `csae.patches.lazy` has the ones
that are in the graph from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from csae.ops import sparse_decode, topk_encode
from csae.ops.checks import autocast_to

from .lazy import versions_of

# A code of fewer tokens is decoded as the dense tensor: to bring W_dec into rows takes longer than the product.
FEW_TOKENS = 128

# What can be told of a tensor without its numbers.
METADATA = {
    Tensor.__hash__,
    Tensor.__len__,
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_floating_point,
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.numel,
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.size,
}


class StandIn(Tensor):
    """A tensor that stands for `dense()`, which is made by `make_dense` when it is first read."""

    known: Tensor | None
    """what it stands for, from when it was first read on"""
    with_grad: bool
    """whether a gradient was recorded where this was made, which need not be so where it is read"""

    def __new__(cls, shape: tuple[int, ...], like: Tensor) -> Self:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        self.known = None
        self.with_grad = torch.is_grad_enabled()
        return self

    def make_dense(self) -> Tensor:
        raise NotImplementedError

    def dense(self) -> Tensor:
        if self.known is None:
            with torch.set_grad_enabled(self.with_grad), torch.autocast(self.device.type, enabled=False):
                self.known = self.make_dense()
        return self.known

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in ANSWERS:
            answer = ANSWERS[func](*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        args, kwargs = tree_map(lambda value: value.dense() if isinstance(value, StandIn) else value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{cls.__name__}: given to {func}, past __torch_function__; needed its dense()")


class PreActs(StandIn):
    """relu(x W_enc^T + b_enc) [..., d_sae], computed from x, W_enc and b_enc as they were. A gradient flows to them.

    only: [d_sae] bool: the features that it has; the others are -inf.
    """

    weights: tuple[Tensor, Tensor, Tensor]
    versions: tuple[int, ...]
    only: Tensor | None

    def __new__(cls, x: Tensor, W_enc: Tensor, b_enc: Tensor, only: Tensor | None = None) -> Self:
        (like,) = autocast_to(x[..., :0])
        self = super().__new__(cls, (*x.shape[:-1], W_enc.shape[0]), like=like)
        self.weights, self.only = (x, W_enc, b_enc), only
        self.versions = versions_of(*self.weights)
        return self

    def make_dense(self) -> Tensor:
        pre_acts = torch.nn.functional.linear(*self.unchanged()).relu()
        return pre_acts if self.only is None else torch.where(self.only, pre_acts, -math.inf)

    def unchanged(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, W_enc and b_enc, which autocast may have left in another dtype."""
        if versions_of(*self.weights) != self.versions:
            raise RuntimeError(
                "pre-activations: given weights that were changed since they encoded; needed as they were: "
                "read the pre-activations before the optimizer's step, or encode again"
            )
        x, W_enc, b_enc = self.weights
        return x.to(self.dtype), W_enc.to(self.dtype), b_enc.to(self.dtype)


class Features(StandIn):
    """The dense tensor [..., d_sae] of a code: values, indices [..., k], no feature twice in a token."""

    code: tuple[Tensor, Tensor]
    versions: tuple[int, ...]

    def __new__(cls, values: Tensor, indices: Tensor, d_sae: int) -> Self:
        self = super().__new__(cls, (*values.shape[:-1], d_sae), like=values)
        self.hold(values, indices)
        return self

    def hold(self, values: Tensor, indices: Tensor) -> None:
        self.code = values, indices
        self.versions = versions_of(*self.code)

    def make_dense(self) -> Tensor:
        values, indices = self.unchanged()
        return values.new_zeros(self.shape).scatter_(-1, indices, values)

    def unchanged(self) -> tuple[Tensor, Tensor]:
        """The code, which others hold too: a dense tensor would not change with it."""
        if versions_of(*self.code) != self.versions:
            raise RuntimeError(
                "features: given a code whose values or indices were changed in place since; needed as they were: "
                "read or decode the features before that, or change a copy"
            )
        return self.code


# --- the answers: each with the arguments of the function that it answers, or NotImplemented ---------------------


def _where(condition: Tensor, input: Any, other: Any) -> Any:
    """Pre-activations of some features only, -inf for the others."""
    if not isinstance(input, PreActs) or input.known is not None or input.only is not None or other != -math.inf:
        return NotImplemented
    if condition.numel() != input.shape[-1] or condition.shape[-1] != input.shape[-1]:
        return NotImplemented
    return PreActs(*input.unchanged(), only=condition.flatten())


def _topk(input: Any, k: int | Tensor, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The k largest pre-activations, encoded from the features that are asked for."""
    if not isinstance(input, PreActs) or input.known is not None or dim not in (-1, input.dim() - 1) or not largest:
        return NotImplemented
    x, W_enc, b_enc = input.unchanged()
    features = None if input.only is None else input.only.nonzero().flatten()
    if features is not None:
        W_enc, b_enc = W_enc.index_select(0, features), b_enc.index_select(0, features)
    if not 1 <= int(k) <= W_enc.shape[0]:
        return NotImplemented
    values, indices = topk_encode(x, W_enc, b_enc, int(k))
    return torch.return_types.topk((values, indices if features is None else features[indices]))  # type: ignore[attr-defined]


def _zeros_like(input: Any, **kwargs: Any) -> Any:
    """Features of which none is active yet."""
    if kwargs:
        return NotImplemented
    none = torch.zeros(*input.shape[:-1], 0, dtype=input.dtype, device=input.device)
    return Features(none, none.long(), input.shape[-1])


def _scatter_(input: Any, dim: int, index: Any, src: Any) -> Any:
    """A code put into features of which none is active."""
    if not isinstance(input, Features) or input.known is not None or input.code[0].numel() > 0:
        return NotImplemented
    if dim not in (-1, input.dim() - 1) or not isinstance(src, Tensor) or src.shape != index.shape:
        return NotImplemented
    if src.shape[:-1] != input.shape[:-1] or src.dtype != input.dtype:
        return NotImplemented
    # Written to the dense tensor, a feature that comes twice keeps one of its values; decoded, it would have both.
    if bool((index.sort(dim=-1).values.diff(dim=-1) == 0).any()):
        return NotImplemented
    input.hold(src, index)
    return input


def _linear(input: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The decoder's product, weight [d_in, d_sae]."""
    if not isinstance(input, Features) or input.known is not None or bias is not None:
        return NotImplemented
    if input.shape[:-1].numel() < FEW_TOKENS:
        return NotImplemented
    # Rows of features once, for both passes: the op would make them contiguous in each.
    return sparse_decode(*input.unchanged(), weight.T.contiguous())


ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.where: _where,
    torch.topk: _topk,
    Tensor.topk: _topk,
    torch.zeros_like: _zeros_like,
    Tensor.scatter_: _scatter_,
    torch.nn.functional.linear: _linear,
}
