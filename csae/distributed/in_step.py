"""The batches of all ranks, step by step: none begins a step that another one can't."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from csae.data.activations import Place
from csae.data.background import Ready
from csae.data.batches import Step
from csae.distributed.hosts import Hosts
from csae.errors import UserError


class _Has(NamedTuple):
    """What a rank tells the others of its next step."""

    batches: bool
    asked_to_stop: bool
    positions: dict[Place, int]
    hashes: dict[Place, tuple[bytes, bool]]


def in_step(steps: Iterator[Ready], hosts: Hosts, stop: threading.Event) -> Iterator[tuple[Ready, bool]]:
    """Each step of this rank when all ranks have theirs, and whether any was asked to stop by then.

    positions and hashes are those of all ranks. As often as some rank waits for data, there is a step without batches,
    and those that have theirs keep them. Where the data of some rank end, they do on all. Where they fail, the first of
    those ranks raises its own UserError, and the others FailedElsewhere.
    """
    own: Ready | None = None
    while True:
        failed: Exception | None = None
        if own is None or not own.step.batches:
            try:
                own = next(steps, None)
            except (UserError, BrokenPipeError) as error:
                failed = error
        found = hosts.all(partial(_tell, own, failed, stop.is_set()))
        of_ranks = [has for has in found if has is not None]
        if own is None or len(of_ranks) < len(found):
            return
        asked = any(has.asked_to_stop for has in of_ranks)
        if not all(has.batches for has in of_ranks):
            yield own._replace(step=Step({}, None, own.step.where)), asked
            continue
        positions = {place: sum(has.positions[place] for has in of_ranks) for place in own.positions}
        hashes = {
            place: (b"".join(has.hashes[place][0] for has in of_ranks), by_tokens)
            for place, (_, by_tokens) in own.hashes.items()
        }
        yield own._replace(positions=positions, hashes=hashes), asked
        own = None


def _tell(own: Ready | None, failed: Exception | None, asked_to_stop: bool) -> _Has | None:
    if failed is not None:
        raise failed
    return None if own is None else _Has(bool(own.step.batches), asked_to_stop, own.positions, own.hashes)
