"""What the hosts of ranks tell each other beside tensors: a few Python objects, by gloo.

What one rank alone can notice or do, such as a full disk, happens to all of them at the same place. Otherwise the
others would wait for it in the next collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from csae.distributed.agreement import gathered
from csae.distributed.ranks import Ranks

if TYPE_CHECKING:
    from csae.sae import SAE

T = TypeVar("T")


def ranks_of(sae: SAE) -> Ranks | None:
    """The ranks that a sharded SAE is spread over; None of a whole one."""
    return None if sae.shard is None else sae.shard.ranks


class Hosts:
    """Those of all ranks; that of one process, where there are none. All call each method, in the same order.

    Where something fails on some of them, the first of those raises its own error, and the others FailedElsewhere.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks
        self.alone = ranks is None
        self.is_first = ranks is None or ranks.rank == 0
        """whether this is the one that writes files"""
        self._group = None if ranks is None else ranks.hosts

    def all(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each rank, in the order of ranks; it is pickled."""
        return gathered(work, self._group)

    def gather(self, given: T) -> list[T]:
        """What each rank gives, in the order of ranks; it is pickled."""
        return self.all(lambda: given)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, which alone calls it."""
        return self.all(lambda: make() if self.is_first else None)[0]  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is inside may fail on some ranks: then it fails on all, when they leave."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.alone:
                raise
            failed = error

        def leave() -> None:
            if failed is not None:
                raise failed

        self.all(leave)
