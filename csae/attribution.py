"""What was carried to each position, and from where: the exact parts of c in a contextual SAE.

c is a sum with one part for each earlier position j and each feature f that is active there,

    part(t, j, f) = sum_h A_h(t, j) * s_h(j) * code_j[f] * W_O_h W_V_h W_mem[f]

and nothing is left over. s_h(j) <= 1 is the factor that bounds the values of position j. The codes are those of the
exact form. A transcoder's c is a part of what it predicts: its parts are in the target's space.

This is for one window at a time: it forms the attention weights [n_heads, T, T]. It makes two numbers for each part,
for one position at a time, or [T, T, k] where all are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from csae.contextual_sae import ContextualSAE
from csae.look_back import LookBack
from csae.ops import sparse_decode
from csae.outputs import Output

Result = TypeVar("Result")


def _precisely(method: Callable[..., Result]) -> Callable[..., Result]:
    """The method without autocast and without a gradient."""

    @functools.wraps(method)
    def run(self: Attribution, *given: Any) -> Result:
        with torch.no_grad(), torch.autocast(self.weights.device.type, enabled=False):
            return method(self, *given)

    return run


class Part(NamedTuple):
    """What one feature at one earlier position carried to a position."""

    position: int
    """where it was active"""
    feature: int
    norm: float
    """length of the part, in the units of c"""
    share: float
    """its projection on c, over the length of c: the shares at a position sum to one; negative where a part
    works against the others"""


class Attribution:
    """The parts of c for one window of T positions, as `attribute` makes them; all in the dtype of the weights.

    output: x_hat [T, d_out], code [T, k] and c [T, d_out] of the exact form.
    weights: [n_heads, T, T], the attention of position t (row) to the earlier position j (column).
    norm, share: [T, T, k], of the part that slot i of the code at j carried to t; see `Part`. Zero for j >= t.
        Where c is zero, so are the shares.
    """

    def __init__(self, sae: ContextualSAE, output: Output, weights: Tensor) -> None:
        self.output, self.weights = output, weights
        look_back = LookBack.of(sae)
        values, indices = output.code
        values = nn.functional.pad(values[:, : sae.k_mem], (0, sae.k_max - sae.k_mem))
        # Each slot by head: what it adds to c at a position that gives it all attention.
        self._written = look_back.slots(values, indices) * sae.out_scale  # [T, k, H, d_value]
        self._W_O = look_back.by_head(look_back.W_O.detach())  # [d_out, H, d_value]
        length = output.c.norm(dim=-1)  # [T]
        direction = output.c / torch.where(length > 0, length, 1)[:, None].square()
        self._onto_c = torch.einsum("td,dhv->thv", direction, self._W_O)

    @cached_property
    @_precisely
    def _gram(self) -> Tensor:
        """The scalar products of what a slot's heads write: [T, k, H, H], made a head at a time to save memory."""
        overlap = torch.einsum("dhv,dgw->hvgw", self._W_O, self._W_O)
        heads = zip(self._written.unbind(2), overlap, strict=True)
        return torch.stack([torch.einsum("jiv,vgw,jigw->jig", u, o, self._written) for u, o in heads], dim=2)

    @cached_property
    @_precisely
    def norm(self) -> Tensor:
        return torch.stack([self.norm_at(t) for t in range(self.weights.shape[1])])

    @cached_property
    @_precisely
    def share(self) -> Tensor:
        return torch.stack([self.share_at(t) for t in range(self.weights.shape[1])])

    @_precisely
    def norm_at(self, t: int) -> Tensor:
        """norm[t], [T, k], without making all of it."""
        attended = self.weights[:, t]  # [H, T]
        return torch.einsum("hj,jihg,gj->ji", attended, self._gram, attended).clamp_min(0).sqrt()

    @_precisely
    def share_at(self, t: int) -> Tensor:
        """share[t], [T, k], without making all of it."""
        # A head at a time, and of earlier positions only: a quarter of the time that one product takes.
        heads = zip(self._written[:t].unbind(2), self._onto_c[t], strict=True)
        onto_c = torch.stack([written @ direction for written, direction in heads])  # [H, t, k]
        share = torch.einsum("hj,hji->ji", self.weights[:, t, :t], onto_c)
        return nn.functional.pad(share, (0, 0, 0, self.weights.shape[1] - t))

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor]:
        """The features of the window, in order, and the place among them of each slot [T, k]."""
        return self.output.code.indices.unique(return_inverse=True)

    @property
    def features(self) -> Tensor:
        """[m] int64, in order: the features in the codes of the window."""
        return self._by_feature[0]

    @_precisely
    def share_by_feature(self, start: int, end: int) -> Tensor:
        """What each of `features` carried to the positions from start to end, all its parts together: [end - start, m].

        The sums of share[start:end] over the slots of a feature. It makes [end - start, end, k] numbers on the way.
        """
        share = self.weights.new_zeros(())
        for head, weights in enumerate(self.weights[:, start:end, :end]):
            onto_c = self._written[:end, :, head] @ self._onto_c[start:end, head].T  # [end, k, end - start]
            share = share + onto_c.permute(2, 0, 1) * weights[:, :, None]
        features, row = self._by_feature
        by_feature = self.weights.new_zeros(end - start, len(features))
        return by_feature.index_add_(1, row[:end].flatten(), share.flatten(1))

    @_precisely
    def remainder(self) -> Tensor:
        """What all parts together miss of c, in its own length: [T]. Rounding, and zero where c is."""
        parts = torch.einsum("htj,jhv,dhv->td", self.weights, self._written.sum(dim=1), self._W_O)
        length = self.output.c.norm(dim=-1)
        return (parts - self.output.c).norm(dim=-1) / torch.where(length > 0, length, 1)

    @_precisely
    def written(self) -> tuple[Tensor, Tensor]:
        """The features of the window, [m] in order, and for each the sum of all of its parts, [m, d_out]."""
        features, row = self._by_feature
        received = self.weights.sum(dim=1)  # [H, T]
        slots = torch.einsum("hj,jihv->jihv", received, self._written).flatten(0, 1)  # [T * k, H, d_value]
        by_feature = slots.new_zeros(len(features), *slots.shape[1:]).index_add_(0, row.flatten(), slots)
        return features, torch.einsum("fhv,dhv->fd", by_feature, self._W_O)

    @_precisely
    def parts(self, t: int) -> Tensor:
        """All parts of c[t]: [T, k, d_out], for position j and slot i of its code; they sum to c[t]."""
        return torch.einsum("hj,jihv,dhv->jid", self.weights[:, t], self._written, self._W_O)

    def top(self, t: int, n: int) -> list[Part]:
        """The n parts with the largest share in c[t], largest first; fewer where there are no more."""
        share, norm, k = self.share_at(t).flatten(), self.norm_at(t), self.output.code.indices.shape[-1]
        largest = share.topk(min(n, t * k))
        found = []
        for value, at in zip(largest.values.tolist(), largest.indices.tolist(), strict=True):
            j, i = divmod(at, k)
            if value > 0:
                found.append(Part(j, int(self.output.code.indices[j, i]), float(norm[j, i]), value))
        return found


@torch.no_grad()
def attribute(
    sae: ContextualSAE,
    acts: Tensor,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    output: Output | None = None,
) -> Attribution:
    """The parts of c for one window, in the exact form, in the dtype of the weights, autocast or not.

    acts [T, d_in], mask [T] bool, documents [T] integer -> `Attribution`. output: what the exact form of this SAE makes
    of the window, where that is known: several windows are encoded faster together.
    """
    if not isinstance(sae, ContextualSAE):
        raise TypeError(f"sae: given a {type(sae).__name__}; needed a ContextualSAE: only that carries anything")
    if acts.dim() != 2:
        raise ValueError(f"acts: given shape {list(acts.shape)}; needed one window [T, d_in]")
    with torch.autocast(acts.device.type, enabled=False):
        acts = acts.to(sae.W_enc.dtype)
        if output is None:
            x_hat, code, c = sae(
                acts[None], *(None if of is None else of[None] for of in (mask, documents)), exact=True
            )
            output = Output(x_hat[0], type(code)(code.values[0], code.indices[0]), c[0])
        look_back, (values, indices) = LookBack.of(sae), output.code
        if sae.query == "current":
            query = acts / sae.scale - sae.centre
        else:
            past = sparse_decode(values, indices, sae.W_dec) + output.c / sae.out_scale
            query = nn.functional.pad(past[:-1], (0, 0, 1, 0))
        memory = sparse_decode(values[:, : sae.k_mem], indices[:, : sae.k_mem], look_back.W_mem)
        return Attribution(sae, output, look_back.attention(query, memory, mask, documents))
