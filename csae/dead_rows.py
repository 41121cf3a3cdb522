"""AuxK over few dead features by dense products: their rows are gathered once, and multiplied with every token.

Sparse ops gather a row for each of the k_aux dead features of a token, half of d_in by default, forwards and backwards,
and sort as many pairs for the gradient. Products of [n, d] and [n_dead, d] cost 2 n n_dead d operations each instead.
The gradient is dense too: one row for each dead feature, which joins the factors as a pair of weight one.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from csae.ops import topk_encode
from csae.ops.checks import autocast_to
from csae.ops.linear import linear

# So many times k features are few. On one core with AVX512-BF16 (n = 1,024, d_in = 576, k = 288) 288 dead features add
# 18 ms to a step of 96 ms by products, 47 ms by sparse ops; 576 add 46 and 77, 1,152 both 88. On CUDA rates alone allow
# 140 k, but [n, n_dead] is to stay small.
FEW = {"cpu": 2, "cuda": 8}
# A captured step takes dead features padded to a multiple of this, and of a quarter of the power of two at or below
# their number. A number that moves by a few percent from line to line of metrics mostly stays within one graph, and
# from 256 on a quarter more is multiplied at most. From none to 4,096 there are 21 capacities; powers of two would be 8
# of them, for up to twice the work.
LEAST = 64


class Dead(NamedTuple):
    """Dead features that AuxK chooses from, as its ops take them; in a captured step any number up to a capacity.

    A padded place has no part: its pre-activation is -inf, so it is chosen after all dead features, and its value is
    zero. Where it names a row, that is of a dead feature, so that no other row can bring a NaN in.
    """

    features: Tensor
    """[n_dead], or [capacity] where some are padded: numbers of rows"""
    real: Tensor | None = None
    """[capacity] bool: which are dead features; None: all"""

    @classmethod
    def unpadded(cls, padded: Tensor) -> Self:
        """What `pad` made, on the device that it is on, without waiting for it."""
        real = padded >= 0
        return cls(torch.where(real, padded, padded[:1].clamp_min(0)), real)

    def biases(self, b_enc: Tensor) -> Tensor:
        """[capacity]: those of the rows that `features` name, of b_enc [d_sae]."""
        rows = b_enc[self.features]
        return rows if self.real is None else torch.where(self.real, rows, -torch.inf)

    def named(self, d_sae: int) -> Tensor:
        """[capacity]: `features`, and d_sae, which is none, in a padded place."""
        return self.features if self.real is None else torch.where(self.real, self.features, d_sae)

    def share(self, k_aux: int, n_dead: int, dtype: torch.dtype) -> float | Tensor:
        """How much of AuxK is asked for: a few dead features can't be asked for as much as many.

        n_dead: how many there are, with those of other processes, where none are padded.
        """
        if self.real is None:
            return min(k_aux, n_dead) / k_aux
        return self.real.sum(dtype=dtype).clamp_max(k_aux) / k_aux


def pad(dead: Tensor, rows: int) -> Tensor:
    """dead [n_dead] of so many rows -> [capacity]: with -1 behind. Of none it has no places, and AuxK is off."""
    n_dead = len(dead)
    step = max(LEAST, 1 << n_dead.bit_length() >> 3)
    padded = dead.new_full((min(-(-n_dead // step) * step, rows),), -1)
    padded[:n_dead].copy_(dead)
    return padded


class OfRows(NamedTuple):
    """Gradients of the rows of dead features; None where they are not asked for."""

    W_enc: Tensor | None  # [n_dead, d_in]
    b_enc: Tensor | None  # [n_dead]
    W_dec: Tensor | None  # [n_dead, d_out]


class DeadRows(NamedTuple):
    """A residual that dead features rebuilt."""

    features: Tensor  # [n_dead]; the number of rows where there is none
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
