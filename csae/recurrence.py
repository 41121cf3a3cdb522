"""The contextual SAE as what it is: a recurrence over positions.

Position t looks at the keys and values of the final codes before it, encodes what they don't account for, and leaves
its own. So the state of a sequence is a table of keys and values, which grows by a row a position, or holds the last
L of them. Whole windows, chunks of any length and single positions go through the same loop
(`csae.ops.recurrence.recur`), with the same result: in the precision of the weights, autocast or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from csae.ops.linear import linear
from csae.ops.recurrence import Weights, recur
from csae.ops.topk_encode import LEAST_ROWS, round_table

if TYPE_CHECKING:
    from csae.contextual_sae import ContextualSAE


class Owner(NamedTuple):
    """The weights that a state was made by."""

    weights: tuple[Tensor, ...]
    """held, so that no others come to lie where they do"""
    marks: tuple[tuple[object, ...], ...]
    """of each: where it lies, its dtype, and how often it had been written to, as torch counts that"""


class State(NamedTuple):
    """What B sequences remember of the positions before.

    Stepping writes the next row of `memory` in place, so a state and the one stepped from it share it:
    `clone()` the state to go on from it in two ways.
    """

    memory: Tensor
    """[B, L, n_heads * (d_head + d_value + m)]: the keys and values of position j, in row j % L; beside a head's values
    how active each of the m followed features was there, bounded as the values are"""
    takes_part: Tensor
    """[B, L] bool: whether that position may be looked at"""
    position: int
    """how many positions went before"""
    start: Tensor
    """[B] int64: the position where the present document began"""
    document: Tensor
    """[B] int64: the id of the present document"""
    past: Tensor
    """[B, d_in]: the reconstruction of the last position less b_dec, in normalised units"""
    bounded: bool
    """whether L is as far as it looks back; otherwise the memory grows"""
    followed: Tensor
    """[m] int64: features whose share in what is carried is to be known"""
    owner: Owner | None
    """the weights of the SAE that made it, which is the only one that goes on; None inside of `whole`"""
    encoded: int
    """how many tokens went before, of all sequences"""
    table: list[Tensor] | None
    """`round_table` of the encoder, once so many were encoded that it is worth it"""

    def clone(self) -> State:
        """A state of its own, with its own memory."""
        return self._replace(memory=self.memory.clone(), takes_part=self.takes_part.clone())


def initial_state(sae: ContextualSAE, B: int, room: int, bounded: bool, followed: Sequence[int] | Tensor = ()) -> State:
    """B sequences before their first position, with room for so many positions."""
    return _blank(sae, B, room, bounded, followed)._replace(owner=_owner(sae))


def _blank(sae: ContextualSAE, B: int, room: int, bounded: bool, followed: Sequence[int] | Tensor = ()) -> State:
    like = sae.W_mem
    document = torch.zeros(B, dtype=torch.int64, device=like.device)
    return State(
        memory=like.new_zeros(B, room, sae.n_heads * (sae.d_head + sae.d_value + len(followed))),
        takes_part=torch.zeros(B, room, dtype=torch.bool, device=like.device),
        position=0,
        start=document,
        document=document,
        past=like.new_zeros(B, sae.d_in),
        bounded=bounded,
        followed=torch.as_tensor(followed, dtype=torch.int64, device=like.device),
        owner=None,
        encoded=0,
        table=None,
    )


def advance(
    sae: ContextualSAE,
    given: Tensor | tuple[Tensor, Tensor],
    state: State,
    mask: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, State]:
    """The next n positions of B sequences.

    given: x [B, n, d_in] in normalised units, to be encoded; or its code, values and indices [B, n, k], to be
    decoded (query="past"). mask, documents: [B, n].

    Returns x_hat [B, n, d_in], the code, c [B, n, d_in], carried, and the state after them. carried [B, n, n_heads, m]:
    how active each head finds the m features that the state follows; `carried_by` makes it their part of c.

    Raises ValueError where the state is of another SAE, of another number of sequences, or older than the weights.
    """
    state = _continued(sae, state, (given if isinstance(given, Tensor) else given[0]).shape[0])
    return _advance(sae, given, state, mask, documents)


def whole(
    sae: ContextualSAE, given: Tensor | tuple[Tensor, Tensor], mask: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """x_hat, the code and c of whole windows; arguments and units as those of `advance`."""
    B, T = (given if isinstance(given, Tensor) else given[0]).shape[:2]
    return _advance(sae, given, _blank(sae, B, T, bounded=False), mask, documents)[:3]


@torch.no_grad()
def _advance(
    sae: ContextualSAE,
    given: Tensor | tuple[Tensor, Tensor],
    state: State,
    mask: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, State]:
    with torch.autocast(state.memory.device.type, enabled=False):
        weights, dtype = Weights(*(getattr(sae, name) for name in Weights._fields)), sae.W_enc.dtype
        B, n = (given if isinstance(given, Tensor) else given[0]).shape[:2]
        documents = state.document[:, None].expand(B, n) if documents is None else documents.to(torch.int64)
        starts = _starts(documents, state)
        mask = torch.ones(B, n, dtype=torch.bool, device=state.memory.device) if mask is None else mask
        state = _with_room(state, n)
        x = given.to(dtype) if isinstance(given, Tensor) else (given[0].to(dtype), given[1])
        run = recur(
            *(x, mask, starts, state.memory, state.takes_part, state.past, state.position, state.followed, weights),
            *(sae.k, sae.k_mem, sae.query == "past", state.table or ()),
        )
        code = (run.values, run.indices) if isinstance(x, Tensor) else x
        if n:
            state = state._replace(start=starts[:, -1], document=documents[:, -1])
        state = state._replace(position=state.position + n, past=run.past, encoded=state.encoded + B * n)
        return run.x_hat, code, run.c, run.carried, state


def carried_by(sae: ContextualSAE, features: Tensor) -> Tensor:
    """What each head adds to c where it finds a feature at an activity of one: features [m] -> [n_heads, m, d_in]."""
    with torch.autocast(features.device.type, enabled=False):
        values = linear(sae.W_mem[features], sae.W_V).unflatten(-1, (sae.n_heads, sae.d_value))  # [m, n_heads, d_value]
        return torch.einsum("mhv,dhv->hmd", values, sae.W_O.unflatten(-1, (sae.n_heads, sae.d_value)))


@torch.compiler.disable  # where tensors lie, and how often they were written to, is not for a graph
def _continued(sae: ContextualSAE, state: State, B: int) -> State:
    """The state, for B more positions of this SAE as it is now: with the encoder's table, once that is worth it."""
    if not isinstance(state, State):
        raise TypeError(f"state: given a {type(state).__name__}; needed what initial_state() or the last step gave")
    owner = state.owner
    marks = tuple(map(_mark, _weights(sae)))
    if owner is None or [mark[:-1] for mark in owner.marks] != [mark[:-1] for mark in marks]:
        raise ValueError(
            "state: given one of other weights; needed one that this SAE made where it lies now: initial_state()"
        )
    if owner.marks != marks:
        raise ValueError("state: given one from before the weights changed; needed a new one: initial_state()")
    sizes = {tensor.shape[0] for tensor in (state.memory, state.takes_part, state.start, state.document, state.past)}
    if sizes != {B}:
        given = ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"acts: given {B} sequences; needed {given}, as the state is of")
    # Of what was made in inference mode torch doesn't count the writes.
    if state.table is None and state.encoded >= LEAST_ROWS and not sae.W_enc.is_inference():
        state = state._replace(table=round_table(sae.W_enc, sae.b_enc, sae.k))
    return state


def _owner(sae: ContextualSAE) -> Owner:
    weights = _weights(sae)
    return Owner(tuple(tensor.detach() for tensor in weights), tuple(map(_mark, weights)))


def _weights(sae: ContextualSAE) -> list[Tensor]:
    return [*(getattr(sae, name) for name in Weights._fields), sae.scale]


def _mark(tensor: Tensor) -> tuple[object, ...]:
    # Of what was made in inference mode torch doesn't count the writes.
    return tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version


def _starts(documents: Tensor, state: State) -> Tensor:
    """documents [B, n] int64 -> [B, n] int64: where the run of equal ids that each position is in begins."""
    before = torch.cat([state.document[:, None], documents[:, :-1]], dim=1)[:, : documents.shape[1]]
    position = state.position + torch.arange(documents.shape[1], device=documents.device)
    if state.position == 0:
        before = torch.where(position == 0, documents, before)
    return torch.where(documents == before, state.start[:, None], position).cummax(dim=1).values


def _with_room(state: State, n: int) -> State:
    """A state whose memory has room for n more positions, or is bounded."""
    room = state.memory.shape[1]
    if state.bounded or state.position + n <= room:
        return state
    more = max(room, state.position + n - room)
    memory = torch.cat(
        [state.memory, state.memory.new_zeros(state.memory.shape[0], more, state.memory.shape[2])], dim=1
    )
    takes_part = torch.cat([state.takes_part, state.takes_part.new_zeros(state.takes_part.shape[0], more)], dim=1)
    return state._replace(memory=memory, takes_part=takes_part)
