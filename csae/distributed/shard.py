"""Shard: which rows of an SAE's tables are here, and what is done over the ranks that have the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from csae.distributed.codes import Owners
from csae.distributed.collectives import gather, total
from csae.distributed.ranks import Ranks, split
from csae.distributed.trace import ShardedTrace
from csae.ops.recurrence import Over
from csae.tables import owning

if TYPE_CHECKING:
    from csae.sae import SAE  # it imports this package

AnySAE = TypeVar("AnySAE", bound="SAE")


class Shard:
    """The rows `rows` of an SAE of d_sae features; `ranks` says who has the others."""

    def __init__(self, d_sae: int, ranks: Ranks) -> None:
        self.rows, self.ranks = ranks.rows(d_sae), ranks
        self.owners = self._owners(map(len, split(d_sae, ranks.n_features)))
        self._dead: tuple[Tensor, Owners] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # connections can't be copied

    def trace(self, sae: Any, trained: Collection[str], training: bool = True) -> ShardedTrace:
        """A pass over the ranks. `trained` names the parameters that get a gradient, if any do."""
        return ShardedTrace(sae, trained, self, training)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, the same on each. No gradient flows."""
        return total(x, self.ranks.world)

    def least(self, x: Tensor) -> Tensor:
        """The least x, a scalar, of all ranks."""
        return gather(x, self.ranks.world).amin(dim=0)

    def of_all_features(self, own: Tensor) -> Tensor:
        """own [rows], a number for each row that is here -> [d_sae], those of all ranks."""
        most = max(self.owners.counts)
        padded = own.new_zeros(most)
        padded[: len(own)] = own
        parts = gather(padded, self.ranks.features)
        return torch.cat([part[:count] for part, count in zip(parts, self.owners.counts, strict=True)])

    def recurring(self, sae: Any) -> Over:
        """How the positions of the exact form meet the tables."""

        def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
            own = self.owners.own(values, indices)
            return self.owners.decoded(own.values, own.rows, table)

        return Over(self.trace(sae, (), training=False).encoder(None), gather_sum, capturable=False)

    def owners_of_dead(self, dead: Tensor) -> Owners:
        """How many features are dead on each rank; dead [n_dead] are this one's.

        All ranks ask. It waits for the device, once for each tensor: the trainer gives the same one for many steps.
        """
        if self._dead is None or self._dead[0] is not dead:
            own = torch.tensor(dead.numel(), device=dead.device)
            self._dead = dead, self._owners(gather(own, self.ranks.features).tolist())
        return self._dead[1]

    def _owners(self, counts: Iterable[int]) -> Owners:
        return Owners(tuple(counts), self.ranks.features, even=self.ranks.n_data > 1)

    def fired(self, indices: Tensor, active: Tensor, tokens: int | Tensor) -> tuple[Tensor, int | Tensor]:
        """Which own features fired, [rows] int32, and the number of tokens, in the codes of all ranks.

        indices, active: [..., k], of the codes here. tokens: how many these count for, the same kind on each rank.
        """
        sent = torch.where(active, indices, -1).to(torch.int32)
        rows = gather(sent, self.ranks.world).flatten() - self.rows.start
        mine = (rows >= 0) & (rows < len(self.rows))
        fired = torch.zeros(len(self.rows) + 1, dtype=torch.int32, device=indices.device)
        fired.scatter_reduce_(0, torch.where(mine, rows, len(self.rows)).long(), mine.to(torch.int32), "amax")
        everywhere = total(tokens, self.ranks.world) if isinstance(tokens, Tensor) else tokens * self.ranks.size
        return fired[:-1], everywhere


def sharded(make: Callable[[], AnySAE], ranks: Ranks) -> AnySAE:
    """The SAE that `make` makes, with this rank's rows of its tables only. No rank ever has a whole table.

    From the same seed of torch's generator on the CPU, the rows are those of the SAE on one device, bit by bit, and
    all else is the same on all ranks. `initialise` is to be given the same numbers on all of them too.
    """
    with owning(ranks.rows):
        sae = make()
    sae.shard = Shard(sae.d_sae, ranks)
    return sae
