"""LookBack: attention from each position to the codes before it.

    m_j           = sum_i code_j.values_i * W_mem[code_j.indices_i]
    q_t           = gain_h * unit(W_Q query_t),  k_j = unit(W_K m_j),  v_j = bounded(W_V m_j)      for each head h
    score_h(t, j) = <q_t, k_j>_h / sqrt(d_head) - slope_h * log(t - j)                            for j < t
    A_h(t, .)     = softmax over the scores of all j < t and the null score of the head
    a_t           = concat_h sum_{j<t} A_h(t, j) v_j
    c_t           = W_O a_t

A transcoder reads and writes different spaces. So c_t, in the target's, is what the decoder adds, and the encoder
subtracts W_I a_t, in the input's. The attention is the same for both.

unit() is RMSNorm of a head: a mean square of one. bounded() keeps the mean square below VALUE_BOUND squared. So no
score exceeds gain * sqrt(d_head), and c has a bound whatever the codes are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function

from csae.ops import lookback_attention
from csae.ops.checks import autocast_dtype
from csae.ops.heads import VALUE_BOUND, bounded_heads, unit_heads, value_scale
from csae.ops.linear import linear
from csae.ops.lookback_attention import document_starts
from csae.tables import random_table


class LookBack(NamedTuple):
    """The parameters of a look-back, and what is computed with them. An SAE holds them under the same names."""

    W_mem: Tensor
    """[d_sae, d_memory]: what a feature writes into the memory of its position"""
    W_Q: Tensor
    """[n_heads * d_head, d_in], or d_out for a transcoder's query="past", which reads the reconstruction"""
    W_K: Tensor
    """[n_heads * d_head, d_memory]"""
    W_V: Tensor
    """[n_heads * d_value, d_memory]"""
    W_O: Tensor
    """[d_out, n_heads * d_value]"""
    gain: Tensor
    """[n_heads]: how sharply a head tells positions apart"""
    slope: Tensor
    """[n_heads]: the price of log-distance"""
    null: Tensor
    """[n_heads]: the score of looking at nothing"""
    W_I: Tensor | None = None
    """[d_in, n_heads * d_value], of a transcoder; None where W_O does both"""

    @classmethod
    def of(cls, sae: nn.Module) -> Self:
        """The look-back of an SAE as it is now: its own tensors, not copies."""
        return cls(*(getattr(sae, name) for name in cls._fields))

    @classmethod
    def initial(
        cls,
        d_in: int,
        d_sae: int,
        n_heads: int,
        d_head: int,
        d_value: int,
        d_memory: int,
        steepest: float,
        d_out: int | None = None,
        d_query: int | None = None,
    ) -> Self:
        """Random maps, and slopes from 0 to `steepest`. d_out: of a transcoder. d_query: d_in if not given."""
        d_query = d_in if d_query is None else d_query
        # A code of k features has a squared norm near d_in in normalised units. So the memory and the values start
        # near unit variance; c starts small against x.
        W_mem = random_table(d_sae, d_memory) / math.sqrt(d_in)
        return cls(
            W_mem=W_mem,
            W_Q=torch.randn(n_heads * d_head, d_query) / math.sqrt(d_query),
            W_K=torch.randn(n_heads * d_head, d_memory) / math.sqrt(d_memory),
            W_V=torch.randn(n_heads * d_value, d_memory) / math.sqrt(d_memory),
            W_O=0.1 * torch.randn(d_in if d_out is None else d_out, n_heads * d_value) / math.sqrt(n_heads * d_value),
            gain=torch.ones(n_heads),
            # transformers replaces linspace while it loads a model. Then, and at times later, torch.device
            # does not reach it.
            slope=torch.linspace(0, steepest, n_heads, device=W_mem.device),
            null=torch.zeros(n_heads),
            # It begins as a per-token encoder. What W_O carries has no place in the input's space yet.
            W_I=None if d_out is None else torch.zeros(d_in, n_heads * d_value),
        )

    def by_head(self, x: Tensor) -> Tensor:
        """x [..., n_heads * d] -> [..., n_heads, d]."""
        return x.unflatten(-1, (self.slope.shape[0], -1))

    def under_autocast(self) -> Self:
        """Where autocast is on, with the maps but W_mem in its dtype: cast together, and so are their gradients."""
        dtype = autocast_dtype(self.W_Q)
        if dtype == self.W_Q.dtype or torch.compiler.is_compiling():
            return self
        maps = {"W_Q": self.W_Q, "W_K": self.W_K, "W_V": self.W_V, "W_O": self.W_O}
        maps |= {} if self.W_I is None else {"W_I": self.W_I}
        return self._replace(**dict(zip(maps, _Cast.apply(dtype, *maps.values()), strict=True)))

    def queries(self, query: Tensor, shift: Tensor | None = None) -> Tensor:
        """query [..., d_query] -> [..., n_heads, d_head].

        shift [d_query] is zero; it gets the gradient that it would have if it were added to each query.
        """
        heads = linear(query, self.W_Q)
        if shift is not None:
            heads = _Shifted.apply(heads, shift, self.W_Q)
        return unit_heads(self.by_head(heads), self.gain)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [..., d_memory] -> keys [..., n_heads, d_head], values [..., n_heads, d_value]."""
        keys, values = self.by_head(linear(memory, self.W_K)), self.by_head(linear(memory, self.W_V))
        return unit_heads(keys), bounded_heads(values)

    def read(self, queries: Tensor, memory: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
        """What each position reads: a [B, T, n_heads * d_value], which W_O makes c.

        queries: [B, T, n_heads, d_head]. memory: [B, T, d_memory]. mask, documents: as `lookback_attention`.
        """
        keys, values = self.keys_values(memory)
        return lookback_attention(queries, keys, values, self.slope, self.null, mask, documents).flatten(-2)

    def written(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """a [B, T, n_heads * d_value] -> c [B, T, d_out], and what the encoder subtracts, [B, T, d_in]."""
        c = linear(a, self.W_O)
        return c, c if self.W_I is None else linear(a, self.W_I)

    def attention(self, query: Tensor, memory: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
        """The attention weights of one window, [n_heads, T, T]: of position t (row) to position j (column).

        query: [T, d_query]. memory: [T, d_memory]. mask: [T] bool. documents: [T] integer.
        """
        queries, (keys, _) = self.queries(query), self.keys_values(memory)
        position = torch.arange(len(query), device=query.device)
        distance = position[:, None] - position[None, :]
        visible = distance > 0
        if documents is not None:
            visible &= position[None, :] >= document_starts(documents[None])[0][:, None]
        if mask is not None:
            visible &= mask[None, :] & mask[:, None]
        scores = torch.einsum("thd,jhd->htj", queries, keys) / math.sqrt(keys.shape[-1])
        scores = scores - self.slope[:, None, None] * distance.clamp_min(1).to(scores.dtype).log()
        nothing = self.null[:, None, None].expand(-1, len(query), 1)
        return torch.cat([scores.masked_fill(~visible, -math.inf), nothing], dim=-1).softmax(dim=-1)[..., :-1]

    def slots(self, values: Tensor, indices: Tensor) -> Tensor:
        """What each active feature puts into the values of its position, without W_O: [..., k, n_heads, d_value].

        values, indices: [..., k], of a code.
        """
        slots = self.by_head(nn.functional.linear(values[..., None] * self.W_mem[indices], self.W_V))
        return slots * value_scale(slots.sum(dim=-3, keepdim=True))

    def carried_by(self, features: Tensor) -> Tensor:
        """What each head adds to c where it reads a feature at an activity of one: [m] -> [n_heads, m, d_out]."""
        with torch.autocast(features.device.type, enabled=False):
            values = self.by_head(linear(self.W_mem[features], self.W_V))  # [m, n_heads, d_value]
            return torch.einsum("mhv,dhv->hmd", values, self.by_head(self.W_O))

    def bound(self) -> float:
        """What the length of c, in normalised units, never exceeds."""
        heads = self.by_head(self.W_O).unbind(1)  # [d_out, d_value] each
        written = sum(float(torch.linalg.matrix_norm(head.double(), 2)) for head in heads)
        return written * VALUE_BOUND * math.sqrt(heads[0].shape[1])


class _Cast(Function):
    """Tensors in a narrower dtype: all in one launch, and their gradients in one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *wide: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = wide[0].dtype
        return tuple(_cast(wide, dtype))

    @staticmethod
    def backward(ctx: Any, *d_cast: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(_cast([d for d in d_cast if d is not None], ctx.dtype))
        return None, *(None if d is None else next(found) for d in d_cast)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    cast = [torch.empty_like(of, dtype=dtype) for of in tensors]
    if cast:
        torch._foreach_copy_(cast, list(tensors))
    return cast


class _Shifted(Function):
    """heads [..., m] = W_Q (query + shift), made without the shift [d], which is zero: it only gets its gradient."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, shift: Tensor, W_Q: Tensor) -> Tensor:
        ctx.save_for_backward(W_Q)
        return heads.view_as(heads)

    @staticmethod
    def backward(ctx: Any, d_heads: Tensor) -> tuple[Tensor, Tensor, None]:
        (W_Q,) = ctx.saved_tensors
        return d_heads, d_heads.sum_to_size(W_Q.shape[0]) @ W_Q, None
