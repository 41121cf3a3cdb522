"""The contextual SAE as what it is: a recurrence over positions.

Position t looks at the keys and values of the final codes before it, encodes what they don't account for, and leaves
its own. So the state of a sequence is a table of keys and values, which grows by a row a position, or holds the last
L of them. Whole windows, chunks of any length and single positions go through the same loop, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from csae.ops import sparse_decode
from csae.ops.backend import kernels

if TYPE_CHECKING:
    from csae.contextual_sae import ContextualSAE

# Positions from which on a CUDA graph is worth its capture, which costs about as much as a few positions.
CAPTURED = 16
LEAST_ROWS = 64


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
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """`topk_encode` by the SAE's weights, for one position after the other"""

    def clone(self) -> State:
        """A state of its own, with its own memory."""
        return self._replace(memory=self.memory.clone(), takes_part=self.takes_part.clone())


def initial_state(sae: ContextualSAE, B: int, room: int, bounded: bool, followed: Sequence[int] | Tensor = ()) -> State:
    """B sequences before their first position, with room for so many positions."""
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
        encode=kernels("topk_encode", like.device).Encoder(sae.W_enc.detach(), sae.b_enc.detach(), sae.k),
    )


@torch.no_grad()
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
    """
    x, code = (given - sae.b_dec, None) if isinstance(given, Tensor) else (None, given)
    B, n = (given if isinstance(given, Tensor) else given[0]).shape[:2]
    device = state.memory.device
    if documents is None:
        documents = state.document[:, None].expand(B, n)
    starts = _starts(documents, state)
    mask = torch.ones(B, n, dtype=torch.bool, device=device) if mask is None else mask
    state = _with_room(state, n)
    if code is None:
        values = state.memory.new_empty(B, n, sae.k)
        code = (values, torch.empty(B, n, sae.k, dtype=torch.int64, device=device))
    chunk = _Chunk(
        x=x,
        queries=sae.queries(x) if x is not None and sae.query == "current" else None,
        values=code[0],
        indices=code[1],
        c=state.memory.new_empty(B, n, sae.d_in),
        starts=starts,
        carried=state.memory.new_empty(B, n, sae.n_heads, len(state.followed)),
        mask=mask,
    )
    captured = device.type == "cuda" and n >= CAPTURED
    past = replay(sae, chunk, state, _captured) if captured else _loop(sae, chunk, state)
    x_hat = sparse_decode(*code, sae.W_dec) + chunk.c + sae.b_dec
    if n:
        state = state._replace(start=starts[:, -1], document=documents[:, -1].to(torch.int64))
    return x_hat, code, chunk.c, chunk.carried, state._replace(position=state.position + n, past=past)


def carried_by(sae: ContextualSAE, features: Tensor) -> Tensor:
    """What each head adds to c where it finds a feature at an activity of one: features [m] -> [n_heads, m, d_in]."""
    values = linear(sae.W_mem[features], sae.W_V).unflatten(-1, (sae.n_heads, sae.d_value))  # [m, n_heads, d_value]
    return torch.einsum("mhv,dhv->hmd", values, sae.W_O.unflatten(-1, (sae.n_heads, sae.d_value)))


class _Chunk(NamedTuple):
    """n positions of B sequences. values, indices, c and carried are written, the first two only where x is given."""

    x: Tensor | None  # [B, n, d_in], less b_dec
    queries: Tensor | None  # [B, n, n_heads, d_head], where they don't depend on the codes
    values: Tensor  # [B, n, k]
    indices: Tensor  # [B, n, k]
    c: Tensor  # [B, n, d_in]
    carried: Tensor  # [B, n, n_heads, m]
    starts: Tensor  # [B, n] int64
    mask: Tensor  # [B, n] bool


def _loop(sae: ContextualSAE, chunk: _Chunk, state: State) -> Tensor:
    """The positions one after the other; gives the last reconstruction, as `State.past`."""
    memory, takes_part, past = state.memory, state.takes_part, state.past
    for i in range(chunk.mask.shape[1]):
        here = _Chunk(*(None if tensor is None else tensor[:, i] for tensor in chunk))  # type: ignore[arg-type]
        t = state.position + i
        left, past = _position(sae, here, memory, takes_part, past, state, t)
        memory[:, t % memory.shape[1]] = left
        takes_part[:, t % memory.shape[1]] = here.mask
    return past


def _position(
    sae: ContextualSAE,
    here: _Chunk,
    memory: Tensor,
    takes_part: Tensor,
    past: Tensor,
    state: State,
    t: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """One position, t, of B sequences: `here` without its second dimension. -> what it leaves in the memory, past.

    memory, takes_part, past: in place of those of the state, of which it needs only what stays as it is.
    """
    attend, gather = (kernels(op, memory.device) for op in ("lookback_attention", "sparse_decode"))
    followed = state.followed
    query = sae.queries(past) if here.queries is None else here.queries
    read = attend.read_memory(query, memory, takes_part, sae.slope, sae.null, here.starts, here.mask, t)
    if len(followed):
        heads = read.unflatten(-1, (sae.n_heads, -1))
        here.carried.copy_(heads[..., sae.d_value :])
        read = heads[..., : sae.d_value].flatten(-2)
    here.c.copy_(linear(read, sae.W_O))
    if here.x is not None:
        values, indices = state.encode(here.x - here.c)
        here.values.copy_(values.masked_fill_(~here.mask[:, None], 0))
        here.indices.copy_(indices)
    values, indices = here.values[:, : sae.k_mem], here.indices[:, : sae.k_mem]
    remembered = gather.gather_sum(values, indices, sae.W_mem)
    keys, heads = sae.keys_values(remembered)
    if len(followed):
        activity = torch.where(indices.unsqueeze(-1) == followed, values.unsqueeze(-1), 0).sum(dim=1)  # [B, m]
        bounded = sae.value_scale(remembered) * activity.unsqueeze(1)  # [B, n_heads, m]
        heads = torch.cat([heads, bounded], dim=-1)
    left = torch.cat([keys.flatten(-2), heads.flatten(-2)], dim=-1)
    if here.queries is None:
        past = gather.gather_sum(here.values, here.indices, sae.W_dec) + here.c
    return left, past


Capture = Callable[[Callable[[], None]], Callable[[], None]]


def replay(sae: ContextualSAE, chunk: _Chunk, state: State, capture: Capture) -> Tensor:
    """`_loop`, as one position that is captured, with its number on the device, and run n times.

    Attention reads as many rows as the positions up to the next power of two are: a capture for each such number.
    """
    memory, takes_part, n = state.memory, state.takes_part, chunk.mask.shape[1]
    i = torch.zeros(1, dtype=torch.int64, device=memory.device)
    here = _Chunk(*(None if tensor is None else tensor[:, 0].clone() for tensor in chunk))  # type: ignore[arg-type]
    past = state.past.clone()
    written = ("values", "indices", "c", "carried") if chunk.x is not None else ("c", "carried")
    given = [name for name in _Chunk._fields if name not in written and getattr(chunk, name) is not None]

    def position(rows: int) -> None:
        for name in given:
            getattr(here, name).copy_(getattr(chunk, name).index_select(1, i).squeeze(1))
        t = i + state.position
        left, new_past = _position(sae, here, memory[:, :rows], takes_part[:, :rows], past, state, t)
        past.copy_(new_past)
        memory.index_copy_(1, t % memory.shape[1], left.unsqueeze(1))
        takes_part.index_copy_(1, t % memory.shape[1], here.mask.unsqueeze(1))
        for name in written:
            getattr(chunk, name).index_copy_(1, i, getattr(here, name).unsqueeze(1))
        i.add_(1)

    room = memory.shape[1]
    work, run, rows = None, None, 0
    for t in range(state.position, state.position + n):
        if work is None or (t > rows and rows < room):
            rows = min(room, max(LEAST_ROWS, 1 << max(0, t - 1).bit_length()))
            work, run = partial(position, rows), None
            work()  # not captured: it may compile and load kernels
        else:
            run = run or capture(work)
            run()
    return past


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph: captured, which does not run it; a call runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


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
