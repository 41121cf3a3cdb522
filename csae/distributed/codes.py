"""Codes over the ranks that own the features: each token's home has its whole code, an owner the part of its rows.

    x                 -> everyone   all-gather: owners get the x of all tokens
    candidates        -> merged     all-to-all: the k best of each rank come home, where the k best of all are taken
    code              -> own        all-gather: owners get the codes of all tokens, and keep what names their rows
    sums of own rows  -> home       all-to-all: the sums come home, and are added in the order of ranks

n tokens have their home on a rank, the same number on each; N = R n are all of them, in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from csae.distributed.collectives import exchange, gather, sum_home

Code = tuple[Tensor, Tensor]  # values and indices


class Own(NamedTuple):
    """The part of the codes of all tokens that names rows of this rank, in the order of the codes, from the front."""

    values: Tensor
    """[N, m]; zero in a slot that names no row"""
    rows: Tensor
    """[N, m] int64: numbers of own rows; zero in a slot that names none"""
    places: Tensor
    """[N, m] int64: where in its code each stood; k in a slot that names none"""


class Owners(NamedTuple):
    """How many rows of a table each rank of a group owns, in order."""

    counts: tuple[int, ...]
    group: ProcessGroup
    even: bool = True
    """whether `own` is as wide on the ranks that have replicas of these rows"""

    @property
    def owned(self) -> int:
        """How many rows this rank owns."""
        return self.counts[self.group.rank()]

    @property
    def first(self) -> int:
        """The first of them."""
        return sum(self.counts[: self.group.rank()])

    def everyone(self, x: Tensor) -> Tensor:
        """x [n, d] of the tokens at home -> that of all tokens, [N, d]."""
        return gather(x, self.group).flatten(0, 1)

    def merged(self, encode: Callable[[Tensor, int], Code], x: Tensor, k: int) -> Code:
        """The code [n, k] of the tokens at home: the k best of all rows, equal ones by lower index.

        encode: x [N, d] and a number m -> values and indices [N, m] of the m best own rows, values in float32 or wider:
            rounded ones might be equal. The code's are in the dtype of x, which is that of all tokens.

        A slot of value zero may name another feature than it does on one device: those below zero come home as zero.
        """
        m, most = min(k, self.owned), min(k, max(self.counts))
        wide = torch.promote_types(x.dtype, torch.float32)
        none = x.new_empty(len(x), 0, dtype=wide), x.new_empty(len(x), 0, dtype=torch.int64)
        values, rows = encode(x, m) if m else none
        # Where there are fewer rows, the rest comes after all others: values are zero or more.
        values = torch.nn.functional.pad(values, (0, most - m), value=-1)
        features = torch.nn.functional.pad(rows + self.first, (0, most - m))
        R = len(self.counts)
        got = exchange(_packed(values, features).unflatten(0, (R, len(x) // R)), self.group)
        values, features = (of.transpose(0, 1).flatten(1) for of in _unpacked(got, values.dtype))
        values, features = _best(values, features, k)
        return values.to(x.dtype), features

    def own(self, values: Tensor, indices: Tensor) -> Own:
        """The own part of codes [n, k] that have their home here and elsewhere."""
        k = values.shape[-1]
        values, indices = _unpacked(gather(_packed(values, indices), self.group).flatten(0, 1), values.dtype)
        rows = indices - self.first
        mine = (rows >= 0) & (rows < self.owned) & ~(values <= 0)  # NaN is kept
        m = min(k, self.owned)
        if not self.even and values.device.type == "cpu" and values.numel():
            m = int(mine.sum(dim=1).max())  # a GPU would have to be waited for
        # The slots of others go to column m, which is cut off.
        to = torch.where(mine, mine.cumsum(dim=1) - 1, m)
        shape = len(values), m + 1
        places = torch.arange(k, device=values.device).expand_as(rows)
        found = (
            values.new_zeros(shape).scatter_(1, to, values),
            rows.new_zeros(shape).scatter_(1, to, rows),
            rows.new_full(shape, k).scatter_(1, to, places),
        )
        return Own(*(of[:, :m].contiguous() for of in found))

    def home(self, sums: Tensor) -> Tensor:
        """sums [N, d] over own rows, for all tokens -> the sums [n, d] over all rows, for the tokens at home."""
        R = len(self.counts)
        return sum_home(sums.unflatten(0, (R, len(sums) // R)), self.group)


def _best(values: Tensor, features: Tensor, k: int) -> Code:
    """The k best of candidates [n, R m] in the order of features, as `topk_encode` gives them, NaN included."""
    values, where = values.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k].contiguous(), features.gather(1, where[:, :k])
    broken = values[:, :1].isnan()
    return values.masked_fill(broken, torch.nan), torch.where(broken, torch.arange(k, device=where.device), indices)


def _packed(values: Tensor, indices: Tensor) -> Tensor:
    """Both [N, m] in one message, [N, bytes]; indices as 32 bits."""
    parts = (values.detach().contiguous(), indices.to(torch.int32).contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def _unpacked(message: Tensor, dtype: torch.dtype) -> Code:
    """The values [..., m] and the indices [..., m] int64 of `_packed`."""
    m = message.shape[-1] // (dtype.itemsize + 4)
    parts = message[..., : m * dtype.itemsize], message[..., m * dtype.itemsize :]
    values, indices = (part.contiguous().view(of) for part, of in zip(parts, (dtype, torch.int32), strict=True))
    return values, indices.to(torch.int64)
