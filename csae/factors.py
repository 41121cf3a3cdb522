"""Gradients in factors: the backward pass of an SAE's tables, with no tensor of their size.

A table of features, [d_sae, d], meets a batch through sparse codes only, so its gradient is a sum, over the pairs
(feature, token) that were active, of a weight times a row:

    topk_encode     W_enc[f] += d value * x[token],  b_enc[f] += d value
    sparse_decode   W[f] += value * d out[token]

`Trace` runs the ops with the tables held constant, and keeps what goes in and comes out. One call of autograd then
gives the weights and the rows, and `csae.adam.Adam` takes them as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from csae.ops import sparse_decode, topk_encode
from csae.ops.adam_rows import Pairs, feature_sums, sort_pairs
from csae.ops.checks import autocast_to
from csae.ops.topk_encode import with_encode_gradient


class Factors(NamedTuple):
    """The gradient of a table: gradient[f] = sum over the pairs p of feature f of weights[p] * rows[tokens[p]]."""

    pairs: Pairs
    """of which feature and token each pair is, sorted by feature"""
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
    """the SAE that they are of, where that is known"""


class _Coded(NamedTuple):
    """n tokens that were encoded."""

    x: Tensor  # [n, d_in]
    values: Tensor  # [..., k], with the graph behind them
    indices: Tensor  # [..., k]
    features: Tensor  # [n, k]: d_sae where not active
    aux: bool


class _Decoded(NamedTuple):
    """A code that was decoded."""

    table: str
    code: int  # its number
    most_active: int | None  # only so many of its features were
    out: Tensor


class _Term(NamedTuple):
    """A part of a table's gradient: the pairs of one code."""

    code: int  # its number
    weights: Tensor  # [n, k]
    rows: Tensor  # [n, d]


class Trace:
    """A forward pass of an SAE with `d_sae` features, its tables held constant.

    trained: the names of the parameters whose gradients are wanted; all if not given.

    Where a method takes a mask [...] bool, the pairs of tokens that don't count are left out.
    """

    def __init__(self, d_sae: int, trained: Collection[str] | None = None) -> None:
        self.d_sae, self.trained = d_sae, trained
        self.coded: list[_Coded] = []
        self.decoded: list[_Decoded] = []

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`topk_encode` of x [..., d_in], which depends on no parameter but those of the look-back.

        It is x - b_dec that is encoded: the gradient of b_dec by this way is `gradients`' business.
        """
        (x,) = autocast_to(x)
        code = topk_encode(x, W_enc.detach(), _constant_beside(x, b_enc), k)
        return self._note(x, *code, mask, features=None)

    def encoded(
        self, x: Tensor, values: Tensor, indices: Tensor, W_enc: Tensor, b_enc: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same for a code of x that was found already."""
        (x,) = autocast_to(x)
        values = with_encode_gradient(x, W_enc.detach(), _constant_beside(x, b_enc), values, indices)
        return self._note(x, values, indices, mask, features=None)

    def encode_aux(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, mask: Tensor | None, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`topk_encode` by `features` [n_dead] only, of x that depends on no parameter. Indices are into features."""
        (x,) = autocast_to(x)
        # Unlike W_enc[features], it refuses numbers below zero, which the factors would not know.
        rows = nn.functional.embedding(features, W_enc.detach())
        return self._note(x, *topk_encode(x, rows, b_enc[features], k), mask, features)

    def decode(
        self,
        name: str,
        values: Tensor,
        indices: Tensor,
        table: Tensor,
        features: Tensor | None = None,
        most_active: int | None = None,
    ) -> Tensor:
        """`sparse_decode` of a code that was encoded here, by the table of that name, or by its rows `features`.

        most_active: only so many features of each token, the most active ones.
        """
        number = next(number for number, coded in enumerate(self.coded) if coded.indices is indices)
        rows = (table if features is None else table[features]).detach()
        out = sparse_decode(values[..., :most_active], indices[..., :most_active], rows)
        self.decoded.append(_Decoded(name, number, most_active, out))
        return out

    def gradients(self, loss: Tensor, sae: nn.Module) -> Gradients:
        """The gradient of every parameter that had a part in the loss, and is trained."""
        trained = {name for name, _ in sae.named_parameters()} if self.trained is None else set(self.trained)
        tables = {"W_enc", "b_enc", *(decoded.table for decoded in self.decoded)}
        dense = {name: parameter for name, parameter in sae.named_parameters() if name in trained - tables}
        coded = self.coded if trained & {"W_enc", "b_enc", "b_dec"} else []
        decoded = [of for of in self.decoded if of.table in trained]
        values, outs = [of.values for of in coded], [of.out for of in decoded]
        found = torch.autograd.grad(loss, [*values, *outs, *dense.values()], allow_unused=True)
        d_values, d_outs = found[: len(values)], found[len(values) : len(values) + len(outs)]
        d_dense = dict(zip(dense, found[len(values) + len(outs) :], strict=True))
        with torch.no_grad():
            terms: dict[str, list[_Term]] = {"W_enc": []} if coded else {}
            for number, (of, d) in enumerate(zip(coded, d_values, strict=True)):
                assert d is not None
                weights = torch.where(of.values <= 0, 0, d).reshape(of.features.shape)
                terms["W_enc"].append(_Term(number, weights, of.x))
            for (name, number, most_active, _), d in zip(decoded, d_outs, strict=True):
                assert d is not None
                weights = self.coded[number].values.reshape(self.coded[number].features.shape)
                if most_active is not None:
                    weights = nn.functional.pad(weights[:, :most_active], (0, weights.shape[1] - most_active))
                terms.setdefault(name, []).append(_Term(number, weights, d.reshape(-1, d.shape[-1])))
            factors = self._factors(terms)
            gradients: dict[str, Tensor | Factors] = dict(factors)
            gradients |= {name: d for name, d in d_dense.items() if d is not None}
            if coded:
                encoder = factors["W_enc"]
                ones = encoder.weights.new_ones(encoder.rows.shape[0], 1)
                gradients["b_enc"] = encoder._replace(rows=ones)
                if "b_dec" in trained:
                    W_enc = sae.get_parameter("W_enc")
                    gradients["b_dec"] = self._of_b_dec(terms["W_enc"], encoder, ones, gradients["b_dec"], W_enc)
        wanted = Gradients({name: gradient for name, gradient in gradients.items() if name in trained})
        wanted.of = sae
        return wanted

    def _note(
        self, x: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not values.requires_grad:  # all that it is made of is frozen, or held constant
            values.requires_grad_()
        with torch.no_grad():
            # A NaN is active: it is to be seen.
            off = values <= 0 if mask is None else (values <= 0) | ~mask.unsqueeze(-1)
            active = torch.where(off, self.d_sae, indices if features is None else features[indices])
        flat = x.detach().reshape(-1, x.shape[-1])
        self.coded.append(_Coded(flat, values, indices, active.reshape(-1, values.shape[-1]), features is not None))
        return values, indices

    def _factors(self, terms: dict[str, list[_Term]]) -> dict[str, Factors]:
        """Each table's terms, one after the other; tables of the same codes share one sort."""
        pairs: dict[tuple[int, ...], Pairs] = {}
        factors = {}
        for name, parts in terms.items():
            codes = tuple(part.code for part in parts)
            if codes not in pairs:
                pairs[codes] = self._sorted(codes)
            weights = torch.cat([_wide(part.weights.reshape(-1)) for part in parts])
            rows = parts[0].rows if len(parts) == 1 else torch.cat([part.rows for part in parts])
            factors[name] = Factors(pairs[codes], weights, rows)
        return factors

    def _sorted(self, codes: tuple[int, ...]) -> Pairs:
        features = [self.coded[code].features for code in codes]
        tokens, first = [], 0
        for of_code in features:
            n, k = of_code.shape
            here = torch.arange(first, first + n, device=of_code.device)
            tokens.append(here.unsqueeze(1).expand(n, k).reshape(-1))
            first += n
        return sort_pairs(torch.cat([f.reshape(-1) for f in features]), torch.cat(tokens), self.d_sae)

    def _of_b_dec(
        self, terms: list[_Term], encoder: Factors, ones: Tensor, so_far: Tensor | Factors, W_enc: Tensor
    ) -> Tensor:
        """The gradient of b_dec, and what it gets as a part of what was encoded.

        That is minus the sum of d x over tokens, or the sum of each feature's d value, times its row of W_enc: a
        product with one vector, where d x itself would be a gather for every token.
        """
        assert isinstance(so_far, Tensor)
        own = [part.weights * (0 if self.coded[part.code].aux else 1) for part in terms]
        weights = torch.cat([_wide(part.reshape(-1)) for part in own])
        totals = feature_sums(encoder.pairs, [weights], [ones])[0].squeeze(1)
        return so_far - totals.to(W_enc.dtype) @ W_enc


def _constant_beside(x: Tensor, b_enc: Tensor) -> Tensor:
    """b_enc as a constant, unless it alone makes the code depend on something: else autograd gives it no gradient."""
    return b_enc.detach() if x.requires_grad else b_enc


def _wide(weights: Tensor) -> Tensor:
    return weights if weights.dtype == torch.float64 else weights.float()
