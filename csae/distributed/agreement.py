"""What ranks do at once and either all finish or all give up: files that are written and read by all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from csae.errors import FailedElsewhere, first_line

T = TypeVar("T")


def together(work: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """What `work` gives on each rank of a group, in the order of ranks. None is the group of this process alone.

    All ranks wait for each other here. If `work` raises on some of them, the first of those raises its own error, and
    every other rank raises FailedElsewhere. group: of gloo; what `work` gives travels pickled.
    """
    if group is None:
        return [work()]
    result, failed = None, None
    try:
        result = work()
    except Exception as error:
        failed = error
    told: list = [None] * group.size()
    dist.all_gather_object(told, (result, None if failed is None else first_line(failed)), group=group)
    for rank, (_, reason) in enumerate(told):
        if reason is not None:
            if failed is not None and rank == group.rank():
                raise failed
            raise FailedElsewhere(dist.get_global_rank(group, rank), reason) from failed
    return [of for of, _ in told]
