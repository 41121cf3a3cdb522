"""ShardedTrace: the forward pass of an SAE whose rows lie on several ranks, and its gradients in factors.

A token's x, look-back, loss and residual stay at its home rank; rows stay with their owners. Forward, an owner gets x
and the codes of all tokens, and gives candidates and sums. Backward, it gets the gradients of what was decoded. With
these it has the gradient of the values that name its rows, and so all factors of its tables' gradients. What the graph
holds of a code is therefore an owner's part of it, not the code at home.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from csae.dead_rows import Dead
from csae.distributed.budget import within_budget
from csae.distributed.codes import Own, Owners
from csae.distributed.collectives import gather, total
from csae.factors import Coded, Decoded, Trace
from csae.matryoshka import Prefixes, by_group
from csae.ops.checks import autocast_to
from csae.ops.sparse_decode import decode_backward
from csae.ops.straight_through import sized, steps_backward
from csae.ops.threshold_encode import near_threshold, threshold_and_near, threshold_encode_wide
from csae.ops.topk_encode import Encode, encode_wide
from csae.selection import Rule

if TYPE_CHECKING:
    from csae.distributed.shard import Shard

_Code = tuple[Tensor, Tensor]


class ShardedTrace(Trace):
    """A `Trace` over the ranks that own the features. All of them, and their replicas, run it at the same time."""

    def __init__(self, sae: Any, trained: Collection[str], shard: Shard, training: bool = True) -> None:
        super().__init__(sae, trained, training)
        self.shard = shard
        self.total = lambda x: _Total.apply(x, shard.ranks.world)
        self.owned: list[Own] = []  # of each code
        self._sent: tuple[Tensor, Tensor] | None = None  # the last x, and that of all tokens

    def n_dead(self, dead: Dead) -> int:
        return sum(self.shard.owners_of_dead(dead.features).counts)

    def encoder(self, mask: Tensor | None) -> Encode:
        sae, k_max, owners = self.sae, self.rule.k_max, self.shard.owners
        W_enc, b_enc = self.table("W_enc"), self.table("b_enc")
        # A rank's candidates for a shared budget: all that a token could have.
        above = None if self.rule.shared else self.rule.threshold
        (like,) = autocast_to(W_enc.detach()[:0])
        again = None
        near: list[_Code] = []  # of each piece of the tokens
        if owners.owned and not _is_half(like) and not self._notes_near:
            alone = Rule(k_max, min(k_max, owners.owned), above, shared=False)
            again = alone._replace(k=alone.k_max).encoder(W_enc, b_enc, None)

        def own(x: Tensor, m: int) -> _Code:
            if again is not None:
                return again(x)
            if above is None:
                return encode_wide(x, W_enc, b_enc, m)
            if not self._notes_near:
                return threshold_encode_wide(x, W_enc, b_enc, above, m)
            values, indices, *found = threshold_and_near(x, W_enc, b_enc, above, sae.bandwidth, m)
            near.append((found[0], found[1]))
            return values, indices

        def encode(x: Tensor) -> _Code:
            near.clear()
            code = self._encoded(owners, own, x, k_max, partial(self._within, mask))
            self._searched = code[1], [*near]
            return code

        return encode

    def _within(self, mask: Tensor | None, code: _Code) -> _Code:
        """What of a code [n, k_max] at home, in float32 or wider, is within the budget that all tokens share."""
        values, indices = code
        if self.rule.threshold is None:
            return code
        within = values > 0
        if self.rule.shared:
            flat = None if mask is None else mask.reshape(-1)
            within = within_budget(values, flat, self.rule.k, self.shard.ranks.world)
        within = within | values.isnan()
        return torch.where(within, values, 0), torch.where(within, indices, 0)

    def encode(self, x: Tensor, mask: Tensor | None, found: tuple[Tensor, Tensor] | None = None) -> _Code:
        values, indices = self.encoder(mask)(x) if found is None else found
        everyone = self._everyone(x)
        x, W_enc = autocast_to(x, self.table("W_enc"))
        (values,) = autocast_to(values.detach())
        own = self.shard.owners.own(*_flat(values if mask is None else _masked(values, mask), indices))
        kept = own.values
        if x.requires_grad:
            kept = _Encoded.apply(x, own, W_enc, self.shard.owners)
        self._note_own(everyone, kept, indices, own, own.rows, aux=False)
        self._note_near(x, (values, indices), mask)
        return values, indices

    def _near_threshold(self, x: Tensor, indices: Tensor, mask: Tensor | None) -> _Code:
        """The own part, values and rows [N, m], of the candidates of all tokens: they are chosen as a code is."""
        sae, owners = self.sae, self.shard.owners
        searched = iter(self._searched[1]) if self._searched and self._searched[0] is indices else None

        def near(x: Tensor, m: int) -> _Code:
            if searched is not None:
                return next(searched)
            return near_threshold(x, sae.W_enc, sae.b_enc, sae.threshold, sae.bandwidth, m)

        values, indices = owners.again(near, self._everyone(x), sae.k_max)
        values = values if mask is None else _masked(values, mask.reshape(-1))
        return owners.own(values, indices)[:2]

    def active(self, code: _Code) -> Tensor:
        near = self._near(code)
        counts = (code[0] > 0).sum(dim=-1)
        return counts if near is None else counts + _Counted.apply(near.steps, counts, self.shard.owners)

    def _are_few(self, dead: Dead, k: int) -> bool:
        return False  # the ranks' dead features together are chosen from

    def encode_dead(self, x: Tensor, dead: Dead, k: int, mask: Tensor | None) -> _Code:
        owners = self.shard.owners_of_dead(dead.features)
        rows, bias = self._rows("W_enc", dead.features), self.sae.b_enc.detach()[dead.features]
        everyone = self.coded[-1].x  # it is what the encoder saw last: x need not travel again
        values, indices = owners.again(lambda x, m: encode_wide(x, rows, bias, m), everyone, k)
        values, indices = values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
        own = owners.own(*_flat(values if mask is None else _masked(values, mask), indices))
        # Where none is dead here, no slot is active.
        features = dead.features[own.rows] if owners.owned else own.rows
        self._note_own(everyone, own.values, indices, own, features, aux=True)
        return values, indices

    def decode(self, table: str, code: _Code, most_active: int | None = None, features: Tensor | None = None) -> Tensor:
        number = self._number(code)
        owners = self.shard.owners if features is None else self.shard.owners_of_dead(features)
        values, rows = autocast_to(self._active(number, most_active), self._rows(table, features))
        steps = self._steps(code, rows.dtype) if most_active is None else ()  # the most active ones are not near
        everywhere: list[Tensor] = []
        out = _Decoded.apply(values, self.owned[number].rows, rows, owners, everywhere, *steps)
        out = out.view(*code[1].shape[:-1], rows.shape[1])
        self.decoded.append(Decoded(table, number, most_active, out, everywhere))
        return out

    def _groups(self, code: _Code) -> Tensor:
        number, owners = self._number(code), self.shard.owners
        # A row's number here is less by those before: so are the prefixes.
        prefixes = tuple(prefix - owners.first for prefix in self.prefixes)
        values, rows = by_group(self._active(number, None), self.owned[number].rows, prefixes)
        values, table = autocast_to(values, self._rows("W_dec", None))
        steps = self._steps(code, table.dtype)
        if steps:
            of_steps, near, features = steps
            steps = by_group(of_steps, features, prefixes)[0], *by_group(near, features, prefixes)
        everywhere: list[Tensor] = []
        out = _Decoded.apply(values, rows, table, owners, everywhere, *steps)
        self.decoded.append(Decoded("W_dec", number, None, out, everywhere, by_group=True))
        return out.view(*code[1].shape[:-1], *out.shape[-2:])

    def _steps(self, code: _Code, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `_Decoded` takes of the candidates of a code, in the dtype of the table, if it has any."""
        near = self._near(code)
        if near is None:
            return ()
        return sized(near.steps, near.features, self.sae.threshold).to(dtype), near.values.to(dtype), near.features

    def _own_prefixes(self) -> Prefixes:
        first, owned = self.shard.owners.first, self.shard.owners.owned
        return tuple(min(max(prefix - first, 0), owned) for prefix in self.prefixes)

    def _encoded(
        self,
        owners: Owners,
        own: Callable[[Tensor, int], _Code],
        x: Tensor,
        k: int,
        within: Callable[[_Code], _Code],
    ) -> _Code:
        """The code [..., k] of x [..., d] at home: `within` what `own` selects on each rank."""
        (sent,) = autocast_to(x.detach())
        everyone, (values, indices) = owners.encoded(own, sent.reshape(-1, x.shape[-1]), k, within)
        self._sent = x, everyone
        return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)

    def _everyone(self, x: Tensor) -> Tensor:
        """x [..., d] of the tokens at home -> that of all, [N, d], in the dtype of the product."""
        if self._sent is None or self._sent[0] is not x:
            (sent,) = autocast_to(x.detach())
            self._sent = x, self.shard.owners.everyone(sent.reshape(-1, x.shape[-1]))
        return self._sent[1]

    def _note_own(self, x: Tensor, values: Tensor, indices: Tensor, own: Own, features: Tensor, aux: bool) -> None:
        if not values.requires_grad:  # everything behind it is frozen, or held constant
            values.requires_grad_()
        active = torch.where(own.values <= 0, self.sae.W_enc.shape[0], features)
        self.owned.append(own)
        self.coded.append(Coded(x, values, indices, active, aux))

    def _active(self, code: int, most_active: int | None) -> Tensor:
        values = self.coded[code].values
        return values if most_active is None else torch.where(self.owned[code].places < most_active, values, 0)

    def _rows_of(self, decoded: Decoded, d_out: Tensor) -> Tensor:
        if decoded.everywhere:  # its backward pass sent it already
            return decoded.everywhere[0].flatten(0, -2)
        return self.shard.owners.everyone(super()._rows_of(decoded, d_out))

    def _of_all(self, of_tokens: Tensor) -> Tensor:
        return gather(of_tokens, self.shard.ranks.data).flatten(0, 1)

    def _summed(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        if not gradients:
            return gradients
        flat = total(torch.cat([of.reshape(-1) for of in gradients.values()]), self.shard.ranks.world)
        parts = flat.split([of.numel() for of in gradients.values()])
        return {name: part.view(of.shape) for (name, of), part in zip(gradients.items(), parts, strict=True)}

    def _over_rows(self, part: Tensor) -> Tensor:
        return total(part, self.shard.ranks.features)


class _Total(Function):
    """The sum over ranks. Each rank has the same loss made of it, so the gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return total(x, group).clone()

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return d_sum, None


class _Encoded(Function):
    """x [..., d_in] at home -> the values [N, m] of own rows, which are known. Backward: d x, from all owners."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Own, W_enc: Tensor, owners: Owners) -> Tensor:
        ctx.save_for_backward(own.values, own.rows, W_enc)
        ctx.owners, ctx.shape = owners, x.shape
        return own.values.clone()

    @staticmethod
    def backward(ctx: Any, d_values: Tensor) -> tuple[Tensor, None, None, None]:
        values, rows, W_enc = ctx.saved_tensors
        d_values = torch.where(values <= 0, 0, d_values)
        return ctx.owners.decoded(d_values, rows, W_enc).view(ctx.shape), None, None, None


class _Decoded(Function):
    """The values [N, m] of own rows -> the sums at home [n, d]. Backward: d values, from the d out of all tokens.

    By groups of features: values [N, G, m] -> sums [n, G, d].

    steps: [N, m] or [N, G, m], those of own rows `features` whose candidates are `near`, as `csae.ops.straight_through`
    decodes them: they add zero, and get a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        rows: Tensor,
        table: Tensor,
        owners: Owners,
        everywhere: list[Tensor],
        steps: Tensor | None = None,
        near: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(values, rows, table, near, features)
        ctx.owners, ctx.everywhere = owners, everywhere
        return owners.decoded(values, rows, table)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        values, rows, table, near, features = ctx.saved_tensors
        d_all = ctx.owners.everyone(d_out)
        ctx.everywhere.append(d_all)
        d_steps = None if near is None else steps_backward(d_all, near, features, table)
        return decode_backward(d_all, values, rows, table), None, None, None, None, d_steps, None, None


class _Counted(Function):
    """The steps [N, m] of own rows -> zeros at home, like counts [...]. Backward: from d counts of all tokens."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, counts: Tensor, owners: Owners) -> Tensor:
        ctx.owners, ctx.shape = owners, steps.shape
        return counts.new_zeros(counts.shape, dtype=steps.dtype)

    @staticmethod
    def backward(ctx: Any, d_counts: Tensor) -> tuple[Tensor, None, None]:
        return ctx.owners.everyone(d_counts.reshape(-1)).unsqueeze(1).expand(ctx.shape), None, None


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _flat(values: Tensor, indices: Tensor) -> _Code:
    return values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1])


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask.unsqueeze(-1), 0)
