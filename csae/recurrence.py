"""The contextual SAE as what it is: a recurrence over positions.

Position t looks at the keys and values of the final codes before it, encodes what they don't account for, and leaves
its own. So the state of a sequence is a table of keys and values, which grows by a row a position, or holds the last
L of them. Whole windows, chunks of any length and single positions go through the same loop, with the same result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from csae.ops import sparse_decode
from csae.ops.backend import kernels

if TYPE_CHECKING:
    from csae.contextual_sae import ContextualSAE


class State(NamedTuple):
    """What B sequences remember of the positions before.

    Stepping writes the next row of `memory` in place, so a state and the one stepped from it share it:
    `clone()` the state to go on from it in two ways.
    """

    memory: Tensor
    """[B, L, n_heads * (d_head + d_value)]: the keys and values of position j, in row j % L"""
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

    def clone(self) -> State:
        """A state of its own, with its own memory."""
        return self._replace(memory=self.memory.clone(), takes_part=self.takes_part.clone())


def initial_state(sae: ContextualSAE, B: int, room: int, bounded: bool) -> State:
    """B sequences before their first position, with room for so many positions."""
    like = sae.W_mem
    document = torch.zeros(B, dtype=torch.int64, device=like.device)
    return State(
        memory=like.new_zeros(B, room, sae.n_heads * (sae.d_head + sae.d_value)),
        takes_part=torch.zeros(B, room, dtype=torch.bool, device=like.device),
        position=0,
        start=document,
        document=document,
        past=like.new_zeros(B, sae.d_in),
        bounded=bounded,
    )


@torch.no_grad()
def advance(
    sae: ContextualSAE,
    given: Tensor | tuple[Tensor, Tensor],
    state: State,
    mask: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, State]:
    """The next n positions of B sequences.

    given: x [B, n, d_in] in normalised units, to be encoded; or its code, values and indices [B, n, k], to be
    decoded (query="past"). mask, documents: [B, n].

    Returns x_hat [B, n, d_in], the code, c [B, n, d_in], and the state after them.
    """
    x, code = (given - sae.b_dec, None) if isinstance(given, Tensor) else (None, given)
    B, n = (given if isinstance(given, Tensor) else given[0]).shape[:2]
    device = state.memory.device
    if documents is None:
        documents = state.document[:, None].expand(B, n)
    starts = _starts(documents, state)
    mask = torch.ones(B, n, dtype=torch.bool, device=device) if mask is None else mask
    state = _with_room(state, n)
    memory, takes_part, room = state.memory, state.takes_part, state.memory.shape[1]
    encode, attend, gather = (kernels(op, device) for op in ("topk_encode", "lookback_attention", "sparse_decode"))
    if code is None:
        code = (memory.new_empty(B, n, sae.k), torch.empty(B, n, sae.k, dtype=torch.int64, device=device))
    values, indices = code
    queries = sae.queries(x) if x is not None and sae.query == "current" else None
    c = memory.new_empty(B, n, sae.d_in)
    past = state.past
    for i in range(n):
        t = state.position + i
        query = sae.queries(past) if queries is None else queries[:, i]
        read = attend.read_memory(
            *(query, memory, takes_part, sae.slope, sae.null),
            *(starts[:, i], mask[:, i], t),
        )
        c[:, i] = linear(read, sae.W_O)
        if x is not None:
            found, indices[:, i] = encode.topk_encode(x[:, i] - c[:, i], sae.W_enc, sae.b_enc, sae.k)
            values[:, i] = found.masked_fill_(~mask[:, i, None], 0)
        of_memory = values[:, i, : sae.k_mem], indices[:, i, : sae.k_mem]
        left = sae.keys_values(gather.gather_sum(*of_memory, sae.W_mem))
        memory[:, t % room] = torch.cat([heads.flatten(-2) for heads in left], dim=-1)
        takes_part[:, t % room] = mask[:, i]
        if queries is None:
            past = gather.gather_sum(values[:, i], indices[:, i], sae.W_dec) + c[:, i]
    x_hat = sparse_decode(values, indices, sae.W_dec) + c + sae.b_dec
    if n:
        state = state._replace(start=starts[:, -1], document=documents[:, -1].to(torch.int64))
    return x_hat, (values, indices), c, state._replace(position=state.position + n, past=past)


def _starts(documents: Tensor, state: State) -> Tensor:
    """documents [B, n] -> [B, n] int64: where the run of equal ids that each position is in begins."""
    before = torch.cat([state.document[:, None].to(documents.dtype), documents[:, :-1]], dim=1)[:, : documents.shape[1]]
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
