"""What ranks do at once and either all finish or all give up: files that are written and read by all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from csae.errors import FailedElsewhere, first_line

T = TypeVar("T")


def together(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """What `work` gives here, when it is done on each rank of a group of gloo. None is this process alone.

    If it raises on some of them, the first of those raises its own error, and every other rank FailedElsewhere.
    """
    results: list[T] = []
    gathered(lambda: results.append(work()), group)
    return results[0]


def by_first(work: Callable[[], object], group: ProcessGroup | None) -> None:
    """The first rank does `work`, or the only process; the others wait until it is done, and give up if it raises."""
    together(lambda: work() if group is None or group.rank() == 0 else None, group)


def gathered(work: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """What `work` gives on each rank, in their order: it travels pickled. Otherwise as `together`."""
    if group is None:
        return [work()]
    result, failed = None, None
    try:
        result = work()
    except Exception as error:
        failed = error
    # One that failed only because another did is not who says it.
    own = None if failed is None or isinstance(failed, FailedElsewhere) else first_line(failed)
    told: list = [None] * group.size()
    dist.all_gather_object(told, (result, own), group=group)
    for rank, (_, reason) in enumerate(told):
        if reason is not None:
            if failed is not None and rank == group.rank():
                raise failed
            raise FailedElsewhere(dist.get_global_rank(group, rank), reason) from failed
    return [of for of, _ in told]
