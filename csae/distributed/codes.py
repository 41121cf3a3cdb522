"""Codes over the ranks that own the features: each token's home has its whole code, an owner the part of its rows.

    x                 -> everyone   all-gather: owners get the x of all tokens
    candidates        -> encoded    all-to-all: the k best of each rank come home, where the k best of all are taken
    code              -> own        all-gather: owners get the codes of all tokens, and keep what names their rows
    sums of own rows  -> decoded    all-to-all: the sums come home, and are added in the order of ranks

n tokens have their home on a rank, the same number on each; N = R n are all of them, in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from csae.distributed.collectives import exchanging, gather, gathering, in_order
from csae.ops import sparse_decode

# Tokens of all ranks at a time: their product takes a GPU milliseconds, where a message takes a fraction of one.
PIECE = 1 << 14

Code = tuple[Tensor, Tensor]  # values and indices
Within = Callable[[Code], Code]  # what of a code at home is kept, of values before they are rounded


def all_of_it(code: Code) -> Code:
    """`Within` where a code is what its token's candidates say."""
    return code


class Own(NamedTuple):
    """The part of the codes of all tokens that names rows of this rank, in the order of the codes, from the front.

    The rest is behind the lengths of its rows: gathers and sums don't go there, whatever m is.
    """

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

    def encoded(
        self,
        encode: Callable[[Tensor, int], Code],
        x: Tensor,
        k: int,
        within: Within = all_of_it,
    ) -> tuple[Tensor, Code]:
        """The x [N, d] of all tokens, and the code [n, k] of the tokens at home, which have x [n, d].

        A code is the k best of all rows, equal ones by lower index. A slot of value zero may name another feature than
        it does on one device: those below zero come home as zero. While the x of some tokens are multiplied, those of
        the next travel, and the candidates of the last.

        encode: x [N, d] and a number m -> values and indices [N, m] of the m best own rows, values in float32 or wider:
            rounded ones might be equal. The code's are in the dtype of x.
        """
        came: list[Tensor] = []
        code = self.selected(encode, self._arriving(x, came), k, within)
        return (came[0] if len(came) == 1 else torch.cat(came, dim=1)).flatten(0, 1), code

    def again(self, encode: Callable[[Tensor, int], Code], everyone: Tensor, k: int) -> Code:
        """As `encoded`, of x [N, d] that came before."""
        by_rank = everyone.unflatten(0, (len(self.counts), len(everyone) // len(self.counts)))
        return self.selected(encode, (piece.transpose(0, 1) for piece in self._pieces(by_rank.transpose(0, 1))), k)

    def selected(
        self,
        encode: Callable[[Tensor, int], Code],
        arriving: Iterable[Tensor],
        k: int,
        within: Within = all_of_it,
    ) -> Code:
        """The code of x that arrive a piece at a time, [R, piece, d]."""
        candidates = []
        for piece in arriving:
            sent = self._candidates(encode, piece.flatten(0, 1), k)
            candidates.append(exchanging(sent.unflatten(0, piece.shape[:2]), self.group))
            dtype = piece.dtype
        wide = torch.promote_types(dtype, torch.float32)
        codes = [_best(_unpacked(sent.wait(), wide), k) for sent in candidates]
        values, indices = within(tuple(torch.cat(parts) for parts in zip(*codes, strict=True)))  # type: ignore[arg-type]
        return values.to(dtype), indices

    def _arriving(self, x: Tensor, came: list[Tensor]) -> Iterator[Tensor]:
        """x [n, d] at home -> pieces of that of all tokens, [R, piece, d], the next one on its way; kept in `came`."""
        pieces = self._pieces(x)
        coming = gathering(pieces[0], self.group)
        for following in (*pieces[1:], None):
            now = coming
            if following is not None:
                coming = gathering(following, self.group)
            came.append(now.wait())
            yield came[-1]

    def _candidates(self, encode: Callable[[Tensor, int], Code], x: Tensor, k: int) -> Tensor:
        """x [N, d] -> the best of own rows for each, as a message [N, bytes]."""
        m, most = min(k, self.owned), min(k, max(self.counts))
        none = x.new_empty(len(x), 0, dtype=torch.promote_types(x.dtype, torch.float32))
        values, rows = encode(x, m) if m else (none, none.to(torch.int64))
        # Where there are fewer rows, the rest comes after all others: values are zero or more.
        values = torch.nn.functional.pad(values, (0, most - m), value=-1)
        return _packed(values, torch.nn.functional.pad(rows + self.first, (0, most - m)))

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [n, ...] -> the same a piece at a time."""
        return x.split(max(1, PIECE // len(self.counts)))

    def own(self, values: Tensor, indices: Tensor) -> Own:
        """The own part of codes [n, k] that have their home here and elsewhere."""
        k = values.shape[-1]
        values, indices = _unpacked(gather(_packed(values, indices), self.group).flatten(0, 1), values.dtype)
        rows = indices - self.first
        mine = (rows >= 0) & (rows < self.owned) & ~(values <= 0)  # NaN is kept
        m = min(k, self.owned)
        if not self.even and values.device.type == "cpu" and values.numel():
            m = int(mine.sum(dim=1).max())  # a GPU would have to be waited for, to save memory alone
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

    def decoded(self, values: Tensor, rows: Tensor, table: Tensor) -> Tensor:
        """The sums [n, d] of all rows for the tokens at home, from the own part [N, m] of all codes.

        Of codes by group, [N, G, m], the sums of each, [n, G, d].

        table: the own rows, [rows, d]. While some sums travel, the next are made.
        """
        R = len(self.counts)
        parts = (self._pieces(of.unflatten(0, (R, len(of) // R)).transpose(0, 1)) for of in (values, rows))
        coming = []
        for own, of_rows in zip(*parts, strict=True):  # [piece, R, m]
            own, of_rows = (of.transpose(0, 1) for of in (own, of_rows))
            sums = sparse_decode(own.flatten(0, 1), of_rows.flatten(0, 1), table)
            coming.append(exchanging(sums.unflatten(0, own.shape[:2]), self.group))
        return torch.cat([in_order(sums.wait()) for sums in coming])


def _best(candidates: Code, k: int) -> Code:
    """The k best [n, k] of the candidates of each rank, [R, n, m], as `topk_encode` gives them, NaN included."""
    values, features = (of.transpose(0, 1).flatten(1) for of in candidates)  # in the order of features
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
    # Copied: a part of a single row is contiguous as it is, but may begin where its dtype can't.
    copies = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    values, indices = (copy.view(of) for copy, of in zip(copies, (dtype, torch.int32), strict=True))
    return values, indices.to(torch.int64)
