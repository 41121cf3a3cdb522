"""A text that went through the model, what the SAE remembers of it, and parts of it (for beams, rejected tokens)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csae.recurrence import State
from csae.splicing.following import Text


@dataclass
class Remembered(Text):
    """A text that went through the model, and what the SAE remembers of it."""

    state: State | None = None
    overwritten: tuple[int, Tensor, Tensor] | None = None
    """of a bounded memory: what the last pass overwrote, see `to_overwrite`"""


def part_of(text: Remembered, rows: Tensor | None, kept: int) -> Remembered:
    """A new text of some rows (all if None) and the first `kept` positions."""
    plain = text.part(rows, kept)
    part = Remembered()
    part.length, part.tables = plain.length, plain.tables
    if text.state is not None:
        state = text.state.clone() if rows is None else _rows(text.state, rows.to(text.state.memory.device))
        if kept < state.position:
            overwritten = text.overwritten
            if state.bounded and state.position > state.memory.shape[1]:
                if overwritten is None or kept < overwritten[0]:
                    raise ValueError(
                        f"look_back: the text was cut from {state.position} to {kept} positions, and what went before "
                        "is no longer remembered; needed no look_back, to remember all"
                    )
                if rows is not None:
                    rows = rows.to(state.memory.device)
                    overwritten = overwritten[0], overwritten[1][rows], overwritten[2][rows]
                restore(state, overwritten, kept)
            past = part.table("past")[:, -1] if "past" in part.tables else state.past
            state = state._replace(position=kept, past=past)
        part.state = state
    return part


def _rows(state: State, rows: Tensor) -> State:
    """The state of these rows, a copy."""
    return state._replace(
        **{name: getattr(state, name)[rows] for name in ("memory", "takes_part", "start", "document", "past")}
    )


def to_overwrite(state: State, n: int) -> tuple[int, Tensor, Tensor] | None:
    """What the next n positions overwrite in a bounded memory: the first position, old memory and takes_part."""
    room = state.memory.shape[1]
    if not state.bounded or state.position + n <= room or n > room:
        return None
    slots = torch.arange(state.position, state.position + n, device=state.memory.device) % room
    return state.position, state.memory[:, slots], state.takes_part[:, slots]


def restore(state: State, overwritten: tuple[int, Tensor, Tensor], first: int) -> None:
    """Put back, in place, what positions from `first` on overwrote."""
    position, memory, takes_part = overwritten
    slots = torch.arange(first, position + memory.shape[1], device=memory.device) % state.memory.shape[1]
    state.memory[:, slots] = memory[:, first - position :]
    state.takes_part[:, slots] = takes_part[:, first - position :]
