"""What ranks do together: all of them finish, or all give up, and one says why."""

from __future__ import annotations

from typing import Any

from processes import run

from csae.distributed.agreement import gathered, together
from csae.errors import FailedElsewhere, UserError


def _agree(ranks: Any) -> list[str]:
    group, rank = ranks.files, ranks.rank
    said = []

    def fail(those: set[int]) -> int:
        if rank in those:
            raise UserError(f"the disk of {rank} is full")
        return rank * 10

    for failing in (set(), {1}, {0, 2}, {2}):
        try:
            said.append(str(gathered(lambda failing=failing: fail(failing), group)))
        except (UserError, FailedElsewhere) as error:
            said.append(f"{type(error).__name__}: {error}")
    assert together(lambda: rank, group) == rank
    return said


def test_all_finish_or_all_give_up():
    gave = "[0, 10, 20]"
    own = "UserError: the disk of {} is full"
    other = "FailedElsewhere: rank {0}: the disk of {0} is full"
    assert run(3, _agree) == [
        [gave, other.format(1), own.format(0), other.format(2)],
        [gave, own.format(1), other.format(0), other.format(2)],
        [gave, other.format(1), other.format(0), own.format(2)],
    ]


def test_one_process_needs_no_group():
    assert (together(lambda: 3, None), gathered(lambda: 3, None)) == (3, [3])
