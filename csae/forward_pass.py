"""The forward pass of an SAE: its ops, which autograd differentiates. `csae.factors` gives the gradients in factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csae.dead_rows import Dead, are_few, dead_acts
from csae.losses import Total, here
from csae.matryoshka import Prefixes, by_group
from csae.ops import near_threshold, sparse_decode, topk_encode
from csae.ops.checks import autocast_to
from csae.ops.linear import linear
from csae.ops.straight_through import decode_steps, threshold_steps
from csae.ops.threshold_encode import threshold_and_near
from csae.ops.topk_encode import Encode, with_encode_gradient
from csae.selection import Rule

_Code = tuple[Tensor, Tensor]  # values and indices, [..., k]


class Near(NamedTuple):
    """The pre-activations of a code that are near their thresholds, of JumpReLU (`csae.ops.straight_through`)."""

    indices: Tensor  # of the code
    values: Tensor  # [..., k_max]
    features: Tensor  # [..., k_max]
    steps: Tensor  # [..., k_max]: zeros with the gradient of H(v - threshold)

    def of_rows(self, d_sae: int) -> Tensor:
        """[n, k_max]: the features, d_sae in a slot without one; NaN is one."""
        features = torch.where(self.values != 0, self.features, d_sae)
        return features.reshape(features.shape[:-1].numel(), features.shape[-1])


class Pass:
    """The ops of an SAE's forward pass, differentiated by autograd.

    training: whether codes are selected as in training, or as in use (`csae.selection`).

    Where a method takes a mask [...] bool, tokens that don't count add nothing to a gradient in factors.

    prefixes: whose groups `reconstruct` keeps apart.
    """

    def __init__(self, sae: Any, training: bool, prefixes: Prefixes = ()) -> None:
        self.total: Total = here
        """the sum of a tensor over all processes that share the batch"""
        self.sae, self.rule, self.prefixes = sae, Rule.of(sae, training), prefixes
        self.trains_threshold = training and sae.selection == "jumprelu" and sae.threshold.requires_grad
        self.near: list[Near] = []
        self._searched: tuple[Any, ...] = ()  # the indices of the last code, and what was found near thresholds

    def centred(self, x: Tensor, cast: bool = False) -> Tensor:
        """x - b_dec, or a transcoder's x - mean: what `encode` takes, before what the look-back subtracts.

        cast: it may be in autocast's dtype.
        """
        return x - self.sae.centre

    def left(self, x: Tensor, suppressed: Tensor) -> Tensor:
        """`centred` x [..., d_in] less what the look-back subtracts, for `encode`; it may be in autocast's dtype."""
        return x - suppressed

    def shift(self) -> Tensor | None:
        """What is to be added to a query made of `centred`, [d_in]; None for nothing."""
        return None

    def n_dead(self, dead: Dead) -> int:
        """How many features `dead` are, with those of other processes, and with padded places."""
        return dead.features.numel()

    def table(self, name: str) -> Tensor:
        """A table (`csae.tables.TABLES`), held constant; it may be in autocast's dtype."""
        parameter: Tensor = getattr(self.sae, name)
        return parameter.detach()

    def encoder(self, mask: Tensor | None) -> Encode:
        """A function of x [..., d_in] that gives its code, without a gradient, for repeated use with one mask [...]."""
        return self._encode_and_near if self._notes_near else self.rule.encoder(*self._encoder_tables(), mask)

    def encode_and_keep(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`encode` without a gradient, and the pre-activations that it chose from (`Rule.encode_and_keep`)."""
        return self.rule.encode_and_keep(x, *self._encoder_tables(), mask)

    def _encoder_tables(self) -> tuple[Tensor, Tensor]:
        return self.table("W_enc"), self.table("b_enc")

    @property
    def _notes_near(self) -> bool:
        """Whether what is near the thresholds is to be kept, of each code."""
        return self.trains_threshold and torch.is_grad_enabled()

    def _encode_and_near(self, x: Tensor) -> _Code:
        """The code of x [..., d_in], and what is near the thresholds, for `_near_threshold`."""
        sae, (like,) = self.sae, autocast_to(x)
        tables = self._encoder_tables()
        values, indices, *near = threshold_and_near(x, *tables, sae.threshold, sae.bandwidth, sae.k_max)
        if values.dtype != like.dtype:
            values = values.to(like.dtype)
            indices = indices.masked_fill(values == 0, 0)
        self._searched = indices, *near
        return values, indices

    def encode(self, x: Tensor, mask: Tensor | None, found: tuple[Tensor, Tensor] | None = None) -> _Code:
        """The code of x [..., d_in], values and indices [..., k_max], with its gradient.

        found: the code, where it was computed already, without a gradient.
        """
        return self._encode(x, self.sae.W_enc, self.sae.b_enc, mask, found)

    def _encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, mask: Tensor | None, found: _Code | None) -> _Code:
        if found is None and self._notes_near:
            found = self._encode_and_near(x)
        if found is None:
            code = self.rule.encode(x, W_enc, b_enc, mask)
        else:
            code = with_encode_gradient(x, W_enc, b_enc, *found), found[1]
        self._note_near(x, code, mask)
        return code

    def _note_near(self, x: Tensor, code: _Code, mask: Tensor | None) -> None:
        """Keep what of x [..., d_in] says something about the gradient of the thresholds."""
        if not self._notes_near:
            return
        values, features = self._near_threshold(x, code[1], mask)
        steps = threshold_steps(values, features, self.sae.threshold, self.sae.bandwidth)
        self.near.append(Near(code[1], values, features, steps))

    def _near_threshold(self, x: Tensor, indices: Tensor, mask: Tensor | None) -> _Code:
        """Values and features of `Near`, of x [..., d_in] with these indices; zero where the mask [...] is False."""
        sae = self.sae
        if self._searched and self._searched[0] is indices:
            _, values, features = self._searched
        else:
            tables = self._encoder_tables()
            values, features = near_threshold(x, *tables, sae.threshold, sae.bandwidth, sae.k_max)
        return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0), features

    def active(self, code: _Code) -> Tensor:
        """[...]: how many features of a code that was encoded here are active, with the gradient of the thresholds."""
        near = self._near(code)
        counts = (code[0] > 0).sum(dim=-1)
        return counts if near is None else counts + near.steps.sum(dim=-1)

    def _near(self, code: _Code) -> Near | None:
        return next((near for near in self.near if near.indices is code[1]), None)

    def encode_dead(self, x: Tensor, dead: Dead, k: int, mask: Tensor | None) -> _Code:
        """The k most active of the features `dead`; indices are places in it. x needs no gradient."""
        return topk_encode(x, self._rows("W_enc", dead.features), dead.biases(self.sae.b_enc), k)

    def rebuild(self, x: Tensor, dead: Dead, k: int, mask: Tensor | None) -> Tensor:
        """What the k most active of the features `dead` make of x [..., d_in] by W_dec: [..., d_out]."""
        if not self._are_few(dead, k):
            return self.decode("W_dec", self.encode_dead(x, dead, k, mask), features=dead.features)
        acts = dead_acts(x, self._rows("W_enc", dead.features), dead.biases(self.sae.b_enc), k)
        acts, W_dec = autocast_to(acts, self._rows("W_dec", dead.features))
        return linear(acts, W_dec.T)

    def _are_few(self, dead: Dead, k: int) -> bool:
        return are_few(dead.features.numel(), k, dead.features.device)

    def decode(self, table: str, code: _Code, most_active: int | None = None, features: Tensor | None = None) -> Tensor:
        """`sparse_decode` of a code that was encoded here, by the table of that name, or by its rows `features`.

        most_active: only so many features of each token, the most active ones.
        """
        near = self._near(code)
        values, indices = code
        if most_active is not None:
            values, indices = values[..., :most_active], indices[..., :most_active]
        rows = self._rows(table, features)
        out = sparse_decode(values, indices, rows)
        if near is None or most_active is not None:  # the most active ones are not near their thresholds
            return out
        return out + decode_steps(near.steps, near.values, near.features, self.sae.threshold, rows)

    def reconstruct(self, code: _Code) -> tuple[Tensor, Tensor | None]:
        """What W_dec makes of a code, [..., d_out], and where there are prefixes its parts by group (`Ran.groups`)."""
        if not self.prefixes:
            return self.decode("W_dec", code), None
        groups = self._groups(code)
        return groups.sum(dim=-2), groups

    def _groups(self, code: _Code) -> Tensor:
        """The sum of each group of features of a code that was encoded here, [..., G, d_out]."""
        rows = self._rows("W_dec", None)
        out = sparse_decode(*by_group(*code, self.prefixes), rows)
        near = self._near(code)
        if near is None:
            return out
        steps, features = by_group(near.steps, near.features, self.prefixes)
        values, _ = by_group(near.values, near.features, self.prefixes)
        return out + decode_steps(steps, values, features, self.sae.threshold, rows)

    def _rows(self, table: str, features: Tensor | None) -> Tensor:
        rows = getattr(self.sae, table)
        if features is None:
            return rows
        # Sparse gradients, except under torch.compile. Unlike rows[features], a lookup refuses negative numbers.
        return nn.functional.embedding(features, rows, sparse=not torch.compiler.is_compiling())
