"""AuxK over few dead features by dense products: their rows are gathered once, and multiplied with every token.

Sparse ops gather a row for each of the k_aux dead features of a token, half of d_in by default, forwards and backwards,
and sort as many pairs for the gradient. Products of [n, d] and [n_dead, d] cost 2 n n_dead d operations each instead.
The gradient is dense too: one row for each dead feature, which joins the factors as a pair of weight one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csae.ops import topk_encode
from csae.ops.checks import autocast_to
from csae.ops.linear import linear

# So many times k features are few. On one core with AVX512-BF16 (n = 1,024, d_in = 576, k = 288) 288 dead features add
# 18 ms to a step of 96 ms by products, 47 ms by sparse ops; 576 add 46 and 77, 1,152 both 88. On CUDA rates alone allow
# 140 k, but [n, n_dead] is to stay small.
FEW = {"cpu": 2, "cuda": 8}


class OfRows(NamedTuple):
    """Gradients of the rows of dead features; None where they are not asked for."""

    W_enc: Tensor | None  # [n_dead, d_in]
    b_enc: Tensor | None  # [n_dead]
    W_dec: Tensor | None  # [n_dead, d_out]


class DeadRows(NamedTuple):
    """A residual that dead features rebuilt."""

    features: Tensor  # [n_dead]
    x: Tensor  # [n, d_in]
    acts: Tensor  # [..., n_dead]
    out: Tensor  # [..., d_out]

    def gradients(self, d_acts: Tensor | None, d_out: Tensor | None) -> OfRows:
        """Of the rows, from the gradients of acts and out."""
        acts = self.acts.detach().reshape(-1, self.acts.shape[-1])
        W_enc = b_enc = W_dec = None
        if d_acts is not None:
            d_pre = d_acts.reshape(acts.shape).masked_fill(acts <= 0, 0)  # a NaN counts as active, so that it is seen
            wide = torch.promote_types(acts.dtype, torch.float32)
            W_enc, b_enc = linear(d_pre.T, self.x.T), d_pre.sum(dim=0, dtype=wide)
        if d_out is not None:
            W_dec = linear(acts.T, d_out.reshape(-1, d_out.shape[-1]).T)
        return OfRows(W_enc, b_enc, W_dec)


def are_few(n_dead: int, k: int, device: torch.device) -> bool:
    """Whether dense products of so many features cost less than the sparse ops of the k most active of each token."""
    return n_dead <= FEW.get(device.type, 1) * k


def dead_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """x [..., d_in], the rows [n_dead, d_in], [n_dead] -> [..., n_dead]: the k largest, and zeros."""
    if k < len(W_enc):
        values, indices = topk_encode(x, W_enc, b_enc, k)
        # A slot that is not active has index 0 and adds nothing there.
        return values.new_zeros(*x.shape[:-1], len(W_enc)).scatter_add(-1, indices, values)
    x, W_enc, b_enc = autocast_to(x, W_enc, b_enc)
    return (linear(x, W_enc) + b_enc).relu()
