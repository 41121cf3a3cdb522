"""The gradients of an SAE in factors, with no tensor of a table's size.

A table of features, [d_sae, d], meets a batch through sparse codes only. So its gradient is a sum, over the pairs
(feature, token) that were active, of a weight times a row:

    topk_encode     W_enc[f] += d value * x[token],  b_enc[f] += d value
    sparse_decode   W[f] += value * d out[token]

A `Pass` (`csae.forward_pass`) runs the ops, and autograd gives dense gradients. A `Trace` runs them with the tables
held constant, and keeps what goes in and comes out. One call of autograd then gives the weights and the rows, and
`csae.adam.Adam` takes them as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from csae.dead_rows import Dead, DeadRows, dead_acts
from csae.forward_pass import Pass
from csae.matryoshka import Prefixes, pairs_by_group
from csae.ops.activity import active_features
from csae.ops.adam_rows import Pairs, feature_sums, sort_codes
from csae.ops.checks import autocast_dtype, autocast_to
from csae.ops.linear import linear
from csae.rounded import copy_of

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
