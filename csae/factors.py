"""The forward pass of an SAE, and its gradients: dense ones, or in factors, with no tensor of a table's size.

A table of features, [d_sae, d], meets a batch through sparse codes only. So its gradient is a sum, over the pairs
(feature, token) that were active, of a weight times a row:

    topk_encode     W_enc[f] += d value * x[token],  b_enc[f] += d value
    sparse_decode   W[f] += value * d out[token]

A `Pass` runs the ops, and autograd gives dense gradients. A `Trace` runs them with the tables held constant, and keeps
what goes in and comes out. One call of autograd then gives the weights and the rows, and `csae.adam.Adam` takes them as
they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from csae.dead_rows import Dead, DeadRows, are_few, dead_acts
from csae.losses import Total, here
from csae.matryoshka import Prefixes, by_group, pairs_by_group
from csae.ops import near_threshold, sparse_decode, topk_encode
from csae.ops.activity import active_features
from csae.ops.adam_rows import Pairs, feature_sums, sort_codes
from csae.ops.checks import autocast_dtype, autocast_to
from csae.ops.linear import linear
from csae.ops.straight_through import decode_steps, threshold_steps
from csae.ops.threshold_encode import threshold_and_near
from csae.ops.topk_encode import Encode, with_encode_gradient
from csae.rounded import copy_of
from csae.selection import Rule

_Code = tuple[Tensor, Tensor]  # values and indices, [..., k]


class Factors(NamedTuple):
    """The gradient of a table: gradient[f] = sum over the pairs p of feature f of weights[p] * rows[tokens[p]]."""

    pairs: Pairs
    """the feature and the token of each pair, sorted by feature"""
    weights: Tensor
    """[P] float32 (or float64), in the order before sorting"""
    rows: Tensor
    """[N, d]"""

    def dense(self) -> Tensor:
        """[d_sae, d]: the gradient itself."""
        return feature_sums(self.pairs, [self.weights], [self.rows])[0]


class Gradients(dict[str, "Tensor | Factors"]):
    """The gradient of each parameter, by its name; that of a table is in factors."""

    of: nn.Module | None = None
    """the SAE whose gradients they are, where that is known"""


class Coded(NamedTuple):
    """n tokens that were encoded."""

    x: Tensor  # [n, d_in]
    values: Tensor  # [..., k], with the graph behind them
    indices: Tensor  # [..., k]
    features: Tensor  # [n, k]: the row of each table; as many as there are rows where a slot is not active
    aux: bool


class Decoded(NamedTuple):
    """A code that was decoded."""

    table: str
    code: int  # its number
    most_active: int | None  # only so many of its features were
    out: Tensor
    everywhere: list[Tensor]  # the gradient of `out` for all tokens, where it was sent
    by_group: bool = False  # whether `out` has a row for each group of features


class _Term(NamedTuple):
    """A part of a table's gradient: the pairs of one code."""

    code: int  # its number
    weights: Tensor  # [n, k]
    rows: Tensor  # [n, d], or [n * G, d] with a row for each group of features
    by_group: bool = False


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


class Trace(Pass):
    """A pass with the tables held constant, that gives their gradients in factors.

    trained: the names of the parameters whose gradients are wanted.
    """

    def __init__(self, sae: Any, trained: Collection[str], training: bool = True) -> None:
        # Without a loss that will be asked for, no groups are needed.
        super().__init__(sae, training, sae.prefixes if trained else ())
        self.trained = trained
        # An autoencoder's encoder sees x - b_dec.
        self.encodes_b_dec = "b_dec" in trained and sae.centre is sae.b_dec
        self.coded: list[Coded] = []
        self.decoded: list[Decoded] = []
        self.dead: list[DeadRows] = []
        self._tables: dict[tuple[str, bool], Tensor] = {}  # by name, and whether autocast was on

    def table(self, name: str) -> Tensor:
        # Cast once: by an op, a whole table would be cast in each sweep, and again for the backward pass.
        key = name, torch.is_autocast_enabled(self.sae.W_enc.device.type)
        if key not in self._tables:
            copy = copy_of(name, getattr(self.sae, name))
            self._tables[key] = autocast_to(super().table(name))[0] if copy is None else copy
        return self._tables[key]

    def centred(self, x: Tensor, cast: bool = False) -> Tensor:
        # No gradient: `_of_b_dec` gives b_dec what it gets through the encoder.
        dtype = autocast_dtype(x) if cast else x.dtype
        if dtype == x.dtype or torch.compiler.is_compiling():
            return super().centred(x).detach()
        return torch.sub(x.detach(), self.sae.centre.detach(), out=torch.empty_like(x, dtype=dtype))

    def left(self, x: Tensor, suppressed: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        if dtype == x.dtype or torch.compiler.is_compiling():
            return super().left(x, suppressed)
        return _Left.apply(x, suppressed, dtype)  # type: ignore[no-any-return]

    def shift(self) -> Tensor | None:
        # Numerically zero; carries b_dec's gradient without computing x's.
        b_dec = self.sae.b_dec
        return b_dec.detach() - b_dec if self.encodes_b_dec else None

    def encode(self, x: Tensor, mask: Tensor | None, found: tuple[Tensor, Tensor] | None = None) -> _Code:
        (x,) = autocast_to(x)
        W_enc, b_enc = self._encoder_tables()
        return self._note(x, self._encode(x, W_enc, b_enc, mask, found), mask, features=None)

    def encode_dead(self, x: Tensor, dead: Dead, k: int, mask: Tensor | None) -> _Code:
        (x,) = autocast_to(x)
        return self._note(x, super().encode_dead(x, dead, k, mask), mask, dead.named(self.sae.W_enc.shape[0]))

    def rebuild(self, x: Tensor, dead: Dead, k: int, mask: Tensor | None) -> Tensor:
        if not self._are_few(dead, k):
            return super().rebuild(x, dead, k, mask)
        (x,) = autocast_to(x)
        W_enc, W_dec = autocast_to(self._rows("W_enc", dead.features), self._rows("W_dec", dead.features))
        acts = dead_acts(x, W_enc, dead.biases(self.table("b_enc")), k).requires_grad_()
        named = dead.named(self.sae.W_enc.shape[0])
        self.dead.append(DeadRows(named, x.reshape(-1, x.shape[-1]), acts, linear(acts, W_dec.T)))
        return self.dead[-1].out

    def decode(self, table: str, code: _Code, most_active: int | None = None, features: Tensor | None = None) -> Tensor:
        out = super().decode(table, code, most_active, features)
        self.decoded.append(Decoded(table, self._number(code), most_active, out, []))
        return out

    def _groups(self, code: _Code) -> Tensor:
        out = super()._groups(code)
        self.decoded.append(Decoded("W_dec", self._number(code), None, out, [], by_group=True))
        return out

    def _number(self, code: _Code) -> int:
        return next(number for number, coded in enumerate(self.coded) if coded.indices is code[1])

    def _rows(self, table: str, features: Tensor | None) -> Tensor:
        rows = self.table(table)
        return rows if features is None else nn.functional.embedding(features, rows)

    def gradients(self, loss: Tensor) -> Gradients:
        """The gradient of every parameter that had a part in the loss, and is trained."""
        sae, trained = self.sae, set(self.trained)
        tables = {"W_enc", "b_enc", *(decoded.table for decoded in self.decoded)}
        tables |= {"W_dec"} if self.dead else set()
        tables |= {"threshold"} if self.near else set()
        dense = {name: parameter for name, parameter in sae.named_parameters() if name in trained - tables}
        coded = self.coded if trained & {"W_enc", "b_enc"} or self.encodes_b_dec else []
        decoded = [of for of in self.decoded if of.table in trained]
        of_dead = [of.acts for of in self.dead if coded], [of.out for of in self.dead if "W_dec" in trained]
        asked = [of.values for of in coded], [of.out for of in decoded], [of.steps for of in self.near], *of_dead
        found = iter(torch.autograd.grad(loss, [*chain(*asked), *dense.values()], allow_unused=True))
        d_values, d_outs, d_steps, d_acts, d_rebuilt = ([next(found) for _ in of] for of in asked)
        d_dense = dict(zip(dense, found, strict=True))
        with torch.no_grad():
            terms: dict[str, list[_Term]] = {"W_enc": []} if coded else {}
            for number, (of, d) in enumerate(zip(coded, d_values, strict=True)):
                assert d is not None
                weights = d.reshape(of.features.shape)  # where a value is zero, its pair is left out
                terms["W_enc"].append(_Term(number, self._of_all(weights), self._of_all(of.x)))
            for one, d in zip(decoded, d_outs, strict=True):
                assert d is not None
                weights = self._of_all(self._active(one.code, one.most_active))
                rows = self._of_all(self._rows_of(one, d))
                terms.setdefault(one.table, []).append(_Term(one.code, weights, rows, one.by_group))
            of_biases = self._add_dead(terms, d_acts, d_rebuilt)
            factors = self._factors(terms)
            gradients: dict[str, Tensor | Factors] = dict(factors)
            gradients |= self._summed({name: d for name, d in d_dense.items() if d is not None})
            gradients |= self._of_threshold(d_steps)
            if coded:
                encoder = factors["W_enc"]
                ones = encoder.weights.new_ones(encoder.rows.shape[0], 1)
                if of_biases:  # the last rows
                    of_dead_rows = torch.cat(of_biases)
                    ones[-len(of_dead_rows) :, 0] = of_dead_rows
                gradients["b_enc"] = encoder._replace(rows=ones)
                if self.encodes_b_dec:
                    gradients["b_dec"] = self._of_b_dec(terms["W_enc"], encoder, ones, gradients["b_dec"])
        wanted = Gradients({name: gradient for name, gradient in gradients.items() if name in trained})
        wanted.of = sae
        return wanted

    def _add_dead(self, terms: dict[str, list[_Term]], d_acts: list[Any], d_rebuilt: list[Any]) -> list[Tensor]:
        """Add the dense gradients of dead features to the terms, a pair of weight one each; give those of b_enc."""
        of_biases = []
        for number, of in enumerate(self.dead):
            by = of.gradients(d_acts[number] if d_acts else None, d_rebuilt[number] if d_rebuilt else None)
            shape = len(of.features), self.coded[0].features.shape[1]  # as wide as a code: all are sorted at once
            features = of.features.new_full(shape, self.sae.W_enc.shape[0])
            weights = of.acts.new_zeros(shape, dtype=torch.float32)
            features[:, 0].copy_(of.features)
            weights[:, 0].fill_(1)
            self.coded.append(Coded(of.x, weights, features, features, aux=True))
            for name, rows in (("W_enc", by.W_enc), ("W_dec", by.W_dec)):
                if rows is not None:
                    terms.setdefault(name, []).append(_Term(len(self.coded) - 1, weights, rows))
            if by.b_enc is not None:
                of_biases.append(by.b_enc)
        return of_biases

    def _active(self, code: int, most_active: int | None) -> Tensor:
        """[n, k]: the values of a code, zero but for so many of its most active features."""
        values = self.coded[code].values.reshape(self.coded[code].features.shape)
        if most_active is None:
            return values
        return nn.functional.pad(values[:, :most_active], (0, values.shape[1] - most_active))

    def _rows_of(self, decoded: Decoded, d_out: Tensor) -> Tensor:
        """[n, d]: the gradient d_out [..., d] of what was decoded, of all tokens that rows here had a part in."""
        return d_out.reshape(-1, d_out.shape[-1])

    def _of_all(self, of_tokens: Tensor) -> Tensor:
        """[n, ...] of the tokens that were decoded by the rows here -> of all tokens whose gradient they get."""
        return of_tokens

    def _summed(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of whole parameters, of the batch of all processes."""
        return gradients

    def _note(self, x: Tensor, code: _Code, mask: Tensor | None, features: Tensor | None) -> _Code:
        values, indices = code
        if not values.requires_grad:  # everything behind it is frozen, or held constant
            values.requires_grad_()
        named = indices if features is None else features[indices]
        active = active_features(values, named, mask, self.sae.W_enc.shape[0])
        flat = x.detach().reshape(-1, x.shape[-1])
        self.coded.append(Coded(flat, values, indices, active.reshape(-1, values.shape[-1]), features is not None))
        return values, indices

    def _factors(self, terms: dict[str, list[_Term]]) -> dict[str, Factors]:
        """The terms of each table, put together. Tables that met the same codes share their pairs."""
        if not terms:
            return {}
        groups = list(dict.fromkeys(tuple(part.code for part in parts) for parts in terms.values()))
        used = sorted({code for codes in groups for code in codes})
        features = [self.coded[code].features for code in used]
        places = [[used.index(code) for code in codes] for codes in groups]
        pairs = dict(zip(groups, self._sorted(features, places), strict=True))
        factors = {}
        weights = _weights([[part.weights for part in parts] for parts in terms.values()])
        for (name, parts), own_weights in zip(terms.items(), weights, strict=True):
            own = pairs[tuple(part.code for part in parts)]
            if any(part.by_group for part in parts):
                own = pairs_by_group(own, [(len(part.weights), part.by_group) for part in parts], self._own_prefixes())
            factors[name] = Factors(own, own_weights, _joined([part.rows for part in parts]))
        return factors

    def _own_prefixes(self) -> Prefixes:
        """`prefixes`, by the numbers of the rows that are here."""
        return self.prefixes

    def _of_threshold(self, d_steps: Sequence[Tensor | None]) -> dict[str, Factors]:
        """The gradient of the thresholds, from those of each `Near.steps` that had a part in the loss."""
        had = [(near, d) for near, d in zip(self.near, d_steps, strict=True) if d is not None]
        if not had:
            return {}
        features = [near.of_rows(self.sae.W_enc.shape[0]) for near, _ in had]
        (pairs,) = self._sorted(features, [range(len(features))])
        weights = [self._of_all(d.reshape(of.shape)) for of, (_, d) in zip(features, had, strict=True)]
        ones = weights[0].new_ones(sum(map(len, weights)), 1)
        flat = _wide(_joined([of.flatten() for of in weights]))
        return {"threshold": Factors(pairs, flat / -self.sae.bandwidth, ones)}

    def _sorted(self, features: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[Pairs]:
        """The sorted pairs of each group of codes, by the codes' numbers.

        features: of each code, [n, k], d_sae where there is none. A group's tokens are counted through its codes.
        """
        everywhere = [self._of_all(of_code) for of_code in features]
        return sort_codes(everywhere, [list(codes) for codes in groups], self.sae.W_enc.shape[0])

    def _of_b_dec(self, terms: list[_Term], encoder: Factors, ones: Tensor, so_far: Tensor | Factors) -> Tensor:
        """The gradient of b_dec, with what it gets through the encoder, which saw x - b_dec.

        That is minus the sum of d x over tokens. It equals minus the sum over features of (the sum of d value) times
        the feature's row of W_enc: one product with a vector, where d x would take a gather for every token.
        """
        assert isinstance(so_far, Tensor)
        weights = encoder.weights
        if any(self.coded[part.code].aux for part in terms):
            own = [part.weights * (0 if self.coded[part.code].aux else 1) for part in terms]
            weights = _wide(_joined([part.reshape(-1) for part in own]))
        totals = feature_sums(encoder.pairs, [weights], [ones])[0].squeeze(1)
        return so_far - self._over_rows(totals.to(self.sae.W_enc.dtype) @ self.sae.W_enc)

    def _over_rows(self, part: Tensor) -> Tensor:
        """The sum over all rows of a table, from the sum over the rows that are here."""
        return part


class _Left(Function):
    """x - suppressed, in this dtype, in one pass; x is constant. Its gradient stays in that dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, suppressed: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = suppressed.dtype
        return torch.sub(x, suppressed, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, d_left: Tensor) -> tuple[None, Tensor, None]:
        return None, -d_left.to(ctx.dtype), None


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts, one after another, without a gradient: a single part may be a code's own values."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).detach()


def _weights(tables: list[list[Tensor]]) -> list[Tensor]:
    """The weights of each table, [P], from those of its terms, [n, k]: in float32 (or float64), all in one launch."""
    found, wide, narrow = [], [], []
    for parts in tables:
        dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        if len(parts) == 1 and parts[0].dtype == dtype:
            found.append(parts[0].detach().reshape(-1))
            continue
        found.append(parts[0].new_empty(sum(part.numel() for part in parts), dtype=dtype))
        places = found[-1].split([part.numel() for part in parts])
        wide += [place.view(part.shape) for place, part in zip(places, parts, strict=True)]
        narrow += [part.detach() for part in parts]
    if wide:
        torch._foreach_copy_(wide, narrow)
    return found


def _wide(weights: Tensor) -> Tensor:
    return weights if weights.dtype == torch.float64 else weights.float()
