"""The exact form of a contextual SAE: a recurrence over positions.

Position t looks at the keys and values of the final codes before it, encodes what they don't account for, and writes
its own. So the state of a sequence is a table of keys and values. It grows by a row a position, or holds the last L.
Whole windows, chunks of any length and single positions run the same loop (`csae.ops.recurrence.recur`), with the same
result, in the precision of the weights, autocast or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csae.look_back import LookBack
from csae.ops.linear import linear
from csae.ops.recurrence import Over, Weights, keeps_table, recur, round_table
from csae.ops.topk_encode import LEAST_ROWS


class Owner(NamedTuple):
    """The weights that made a state."""

    weights: tuple[Tensor, ...]
    """held, so that no other tensors get their addresses"""
    marks: tuple[tuple[object, ...], ...]
    """of each: its address, dtype and device, and its `_version`"""
    how: tuple[int, int, bool]
    """k, k_mem and from_past"""


class State(NamedTuple):
    """What B sequences remember of the positions before.

    A step writes the next row of `memory` in place, so a state and the one after it share their memory. To continue a
    state in two ways, `clone()` it.
    """

    memory: Tensor
    """[B, L, n_heads * (d_head + d_value + m)]: the keys and values of position j, in row j % L. Beside a head's values
    stands how active each of the m followed features was there, bounded as the values are"""
    takes_part: Tensor
    """[B, L] bool: whether that position may be looked at"""
    position: int
    """how many positions went before"""
    start: Tensor
    """[B] int64: the position where the present document began"""
    document: Tensor
    """[B] int64: the id of the present document"""
    past: Tensor
    """[B, d_out]: the reconstruction of the last position less b_dec and the skip connection, in normalised units"""
    bounded: bool
    """whether L is as far as it looks back; otherwise the memory grows"""
    followed: Tensor
    """[m] int64: features whose share in c is asked for"""
    owner: Owner | None
    """the weights of the SAE that made it, the only one that may continue it; None inside `whole`"""
    table: list[Tensor] | None
    """`round_table` of the encoder, from the number of tokens on at which it pays, of all sequences together"""

    def clone(self) -> State:
        """A state of its own, with its own memory."""
        return self._replace(memory=self.memory.clone(), takes_part=self.takes_part.clone())


class Recurrence(NamedTuple):
    """What the recurrence needs of a contextual SAE."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None
    centre: Tensor
    """[d_in]: what is subtracted from x first"""
    scales: tuple[Tensor, Tensor]
    """of the activations and of the reconstruction"""
    look_back: LookBack
    k: int
    """slots of a code"""
    k_mem: int
    from_past: bool
    """whether queries are made of the reconstruction of the position before, or of x"""
    over: Over | None = None
    """what meets the tables, where only some of their rows are here"""
    threshold: Tensor | None = None
    """[] or [d_sae]: a code has what is above it, up to k; None: the k largest"""

    @property
    def weights(self) -> Weights:
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, *self.look_back)

    def initial_state(self, B: int, room: int, bounded: bool, followed: Sequence[int] | Tensor = ()) -> State:
        """B sequences before their first position, with room for so many positions."""
        return self._blank(B, room, bounded, followed)._replace(owner=self._owner())

    def advance(
        self, given: Tensor | tuple[Tensor, Tensor], state: State, mask: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, State]:
        """The next n positions of B sequences.

        given: x [B, n, d_in] in normalised units, to be encoded; or its code, values and indices [B, n, k], to be
        decoded (query="past"), without a skip connection, which reads x. mask, documents: [B, n].

        Returns x_hat [B, n, d_out], the code, c [B, n, d_out], carried, and the state after them.
        carried [B, n, n_heads, m]: how active each head reads the m features that the state follows;
        `LookBack.carried_by` makes it their part of c.

        Raises ValueError where the state is of another SAE, of another number of sequences, or older than the weights.
        """
        state = _continued(self, state, (given if isinstance(given, Tensor) else given[0]).shape[0])
        return self._advance(given, state, mask, documents)[:5]

    def whole(
        self, given: Tensor | tuple[Tensor, Tensor], mask: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """x_hat, the code, c and what the encoder subtracted, [B, T, d_in], of whole windows; else as `advance`."""
        B, T = (given if isinstance(given, Tensor) else given[0]).shape[:2]
        x_hat, code, c, _, _, suppressed = self._advance(given, self._blank(B, T, bounded=False), mask, documents)
        return x_hat, code, c, suppressed

    def _blank(self, B: int, room: int, bounded: bool, followed: Sequence[int] | Tensor = ()) -> State:
        like = self.look_back
        width = like.W_K.shape[0] + like.W_V.shape[0] + like.slope.shape[0] * len(followed)
        document = torch.zeros(B, dtype=torch.int64, device=like.W_mem.device)
        return State(
            memory=like.W_mem.new_zeros(B, room, width),
            takes_part=torch.zeros(B, room, dtype=torch.bool, device=like.W_mem.device),
            position=0,
            start=document,
            document=document,
            past=like.W_mem.new_zeros(B, like.W_O.shape[0]),
            bounded=bounded,
            followed=torch.as_tensor(followed, dtype=torch.int64, device=like.W_mem.device),
            owner=None,
            table=None,
        )

    def _advance(
        self, given: Tensor | tuple[Tensor, Tensor], state: State, mask: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, State, Tensor]:
        with torch.no_grad(), torch.autocast(state.memory.device.type, enabled=False):
            dtype = self.W_enc.dtype
            B, n = (given if isinstance(given, Tensor) else given[0]).shape[:2]
            documents = state.document[:, None].expand(B, n) if documents is None else documents.to(torch.int64)
            starts = _starts(documents, state)
            mask = torch.ones(B, n, dtype=torch.bool, device=state.memory.device) if mask is None else mask
            state = _with_room(state, n)
            x = given.to(dtype) - self.centre if isinstance(given, Tensor) else (given[0].to(dtype), given[1])
            run = recur(
                *(x, mask, starts, state.memory, state.takes_part, state.past, state.position, state.followed),
                *(self.weights, self.k, self.k_mem, self.from_past, state.table or (), self.over, self.threshold),
            )
            code = (run.values, run.indices) if isinstance(x, Tensor) else x
            if n:
                state = state._replace(start=starts[:, -1], document=documents[:, -1])
            state = state._replace(position=state.position + n, past=run.past)
            x_hat = run.x_hat
            if self.W_skip is not None and isinstance(x, Tensor):
                x_hat = x_hat + linear(x, self.W_skip)
            return x_hat, code, run.c, run.carried, state, run.c if self.look_back.W_I is None else run.suppressed

    def _owner(self) -> Owner:
        weights = self._all_weights()
        marks = tuple(map(_mark, weights))
        return Owner(tuple(tensor.detach() for tensor in weights), marks, (self.k, self.k_mem, self.from_past))

    def _all_weights(self) -> list[Tensor]:
        may_be_none = (self.W_skip, self.threshold)
        rest = (tensor for tensor in may_be_none if tensor is not None)
        return [*self.weights.tensors(), *rest, self.centre, *self.scales]


@torch.compiler.disable  # a graph knows nothing of addresses and versions
def _continued(of: Recurrence, state: State, B: int) -> State:
    """The state, for B more positions of this SAE as it is now: with the encoder's table, once that pays."""
    if not isinstance(state, State):
        raise TypeError(f"state: given a {type(state).__name__}; needed what initial_state() or the last step gave")
    owner = state.owner
    marks = tuple(map(_mark, of._all_weights()))
    if owner is None or [mark[:-1] for mark in owner.marks] != [mark[:-1] for mark in marks]:
        raise ValueError(
            "state: given one of other weights; needed one that this SAE made where it lies now: initial_state()"
        )
    if owner.how != (of.k, of.k_mem, of.from_past):
        raise ValueError("state: given one from before k, k_mem or query changed; needed a new one: initial_state()")
    if owner.marks != marks:
        raise ValueError("state: given one from before the weights changed; needed a new one: initial_state()")
    sizes = {tensor.shape[0] for tensor in (state.memory, state.takes_part, state.start, state.document, state.past)}
    if sizes != {B}:
        given = ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"acts: given {B} sequences; needed {given}, as the state is of")
    if state.table is None and (state.position + 1) * B >= LEAST_ROWS and keeps_table(of.W_enc):
        table = round_table(of.W_enc, of.b_enc, of.k, of.threshold)
        state = state._replace(table=table)
    return state


def _mark(tensor: Tensor) -> tuple[object, ...]:
    version = 0 if tensor.is_inference() else tensor._version  # a tensor made in inference mode has none
    return tensor.data_ptr(), tensor.dtype, tensor.device, version


def _starts(documents: Tensor, state: State) -> Tensor:
    """documents [B, n] int64 -> [B, n] int64: the position where the document of each position begins."""
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
