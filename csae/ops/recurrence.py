"""recur: the positions of a contextual SAE, one after the other, as one operator.

A position is some small products and three or four native calls, which cost as much as an operator's own overhead. So
the operator is the whole loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .backend import fake, kernels, operator
from .checks import refuse_tangents
from .heads import BOUNDED, UNIT
from .linear import linear
from .threshold_encode import threshold_table, wide
from .topk_encode import Encode, repeated
from .topk_encode import round_table as topk_table

# The fewest positions that a CUDA graph is captured for: a capture costs about as much as a few positions.
CAPTURED = 16
LEAST_ROWS = 64


class Weights(NamedTuple):
    """The parameters of the recurrence, named as in `ContextualSAE`; all of one dtype, on one device."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_mem: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    gain: Tensor
    slope: Tensor
    null: Tensor
    W_I: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there, in their order."""
        return [tensor for tensor in self if tensor is not None]


class Recurred(NamedTuple):
    """What n positions of B sequences give."""

    x_hat: Tensor
    """[B, n, d_out]"""
    values: Tensor
    """[B, n, k]; empty where a code was given"""
    indices: Tensor
    """[B, n, k] int64; likewise"""
    c: Tensor
    """[B, n, d_out]"""
    carried: Tensor
    """[B, n, n_heads, m]: how active each head finds the m followed features"""
    past: Tensor
    """[B, d_out]: the last reconstruction less b_dec; as given where the queries don't need it"""
    suppressed: Tensor
    """[B, n, d_in]: what the encoder subtracted, with W_I; else empty, for that is c"""


class Over(NamedTuple):
    """How positions meet the tables of features."""

    encode: Encode
    """x [B, d_in] -> values and indices [B, k]"""
    gather_sum: Callable[[Tensor, Tensor, Tensor], Tensor]
    """values, indices [n, k], a table or its rows that are here -> the sums [n, d]"""
    capturable: bool = True
    """whether a CUDA graph can hold both"""


def recur(
    given: Tensor | tuple[Tensor, Tensor],
    mask: Tensor,
    starts: Tensor,
    memory: Tensor,
    takes_part: Tensor,
    past: Tensor,
    position: int,
    followed: Tensor,
    weights: Weights,
    k: int,
    k_mem: int,
    from_past: bool,
    table: Sequence[Tensor] = (),
    over: Over | None = None,
    threshold: Tensor | None = None,
) -> Recurred:
    """The next n positions of B sequences. No gradient flows.

    Args:
        given: x [B, n, d_in], centred, to be encoded, or its code, values and indices [B, n, k], to be decoded.
        mask: [B, n] bool. starts: [B, n] int64, where the document of each position began.
        memory: [B, L, n_heads * (d_head + d_value + m)], as `csae.recurrence.State` has it; written.
        takes_part: [B, L] bool; written.
        past: [B, d_out], the reconstruction before, less b_dec.
        position: the number of the first.
        followed: [m] int64, features whose share in what is carried is to be known.
        k, k_mem: slots of a code, and how many of them are remembered.
        from_past: whether queries are made of the reconstruction before, or of x.
        table: `round_table` of W_enc, if it was made already.
        over: what meets the tables, where `weights` has only some of their rows.
        threshold: [] or [d_sae], of what a code has (`threshold_encode`); None: its k largest (`topk_encode`).
    """
    x, values, indices = (given, None, None) if isinstance(given, Tensor) else (None, *given)
    refuse_tangents(x, values, past, threshold, *weights.tensors())
    state = mask, starts, memory, takes_part, past, position, followed
    if over is not None:  # it waits for other processes: no operator of a graph
        return Recurred(*_positions(x, values, indices, *state, weights, k, k_mem, from_past, over))
    return Recurred(*_recur(x, values, indices, *state, weights.tensors(), k, k_mem, from_past, list(table), threshold))


@operator("recur", ("memory", "takes_part"))
def _recur(
    x: Tensor | None,
    values: Tensor | None,
    indices: Tensor | None,
    mask: Tensor,
    starts: Tensor,
    memory: Tensor,
    takes_part: Tensor,
    past: Tensor,
    position: int,
    followed: Tensor,
    weights: list[Tensor],
    k: int,
    k_mem: int,
    from_past: bool,
    table: list[Tensor],
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    by = Weights(*weights)
    sums = kernels("sparse_decode", memory.device, memory.dtype)
    # What selects by a threshold may wait for the device, which a CUDA graph can't.
    encode = _encoder(by.W_enc, by.b_enc, k, table, threshold, encoded=position * mask.shape[0])
    over = Over(encode, sums.gather_sum, capturable=threshold is None)
    state = mask, starts, memory, takes_part, past, position, followed
    return _positions(x, values, indices, *state, by, k, k_mem, from_past, over)


def _encoder(
    W_enc: Tensor, b_enc: Tensor, k: int, table: list[Tensor], threshold: Tensor | None, encoded: int
) -> Encode:
    """x [B, d_in] -> its code [B, k], by the kernels.

    encoded: how many tokens went before, however they were cut into calls: a position has the same bits in all.
    """
    if threshold is None:
        topk = kernels("topk_encode", W_enc.device, W_enc.dtype)
        if not keeps_table(W_enc):
            return lambda x: topk.topk_encode(x, W_enc, b_enc, k)
        of = (topk.topk_encode, topk.round_table, lambda *given: topk.encode_by_table(*given))
        return repeated(W_enc, b_enc, k, table, *of, encoded)
    by, above = kernels("threshold_encode", W_enc.device, W_enc.dtype), threshold.to(wide(W_enc))

    def once(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return by.threshold_encode(x, W_enc, b_enc, above, k)

    if not keeps_table(W_enc):
        return lambda x: once(x, W_enc, b_enc, k)

    def round_table(W_enc: Tensor, b_enc: Tensor, k: int) -> list[Tensor]:
        return by.threshold_table(W_enc, b_enc, above, k)

    def by_table(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, table: list[Tensor], last: None) -> Any:
        return *by.threshold_encode_by_table(x, W_enc, b_enc, above, k, table), last

    return repeated(W_enc, b_enc, k, table, once, round_table, by_table, encoded)


def keeps_table(W_enc: Tensor) -> bool:
    """Whether a table of these weights can be kept from call to call.

    Weights made in inference mode have no version, so a table of them could be out of date. Whole windows, in one call,
    do without it too: so they have the bits of steps.
    """
    return not W_enc.is_inference()


def round_table(W_enc: Tensor, b_enc: Tensor, k: int, threshold: Tensor | None) -> list[Tensor]:
    """What `recur` takes as `table`: the weights rounded to bfloat16; empty where that is no gain."""
    if threshold is None:
        return topk_table(W_enc, b_enc, k)
    return threshold_table(W_enc, b_enc, threshold, k)


def _positions(
    x: Tensor | None,
    values: Tensor | None,
    indices: Tensor | None,
    mask: Tensor,
    starts: Tensor,
    memory: Tensor,
    takes_part: Tensor,
    past: Tensor,
    position: int,
    followed: Tensor,
    by: Weights,
    k: int,
    k_mem: int,
    from_past: bool,
    over: Over,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, n = mask.shape
    reads, heads = (kernels(op, memory.device, memory.dtype) for op in ("read_memory", "scaled_heads"))
    run = _Run(
        weights=by,
        k_mem=k_mem,
        from_past=from_past,
        followed=followed,
        encode=over.encode,
        read_memory=reads.read_memory,
        gather_sum=over.gather_sum,
        scale_heads=heads.scale_heads,
    )
    chunk = _Chunk(
        x=x,
        values=memory.new_empty(B, n, k) if values is None else values,
        indices=torch.empty(B, n, k, dtype=torch.int64, device=memory.device) if indices is None else indices,
        c=memory.new_empty(B, n, by.W_O.shape[0]),
        carried=memory.new_empty(B, n, len(by.slope), len(followed)),
        starts=starts,
        mask=mask,
        suppressed=None if by.W_I is None or x is None else memory.new_empty(B, n, by.W_I.shape[0]),
    )
    captured = (
        memory.device.type == "cuda"
        and n >= CAPTURED
        and over.capturable
        and not torch.cuda.is_current_stream_capturing()
    )
    state = memory, takes_part, past, position
    past = replay(run, chunk, *state, partial(_captured, memory.device)) if captured else _loop(run, chunk, *state)
    code = chunk.values.flatten(0, 1), chunk.indices.flatten(0, 1)
    x_hat = run.gather_sum(*code, by.W_dec).view(chunk.c.shape) + chunk.c + by.b_dec
    found = (memory.new_empty(0), chunk.indices.new_empty(0)) if x is None else (chunk.values, chunk.indices)
    suppressed = memory.new_empty(0) if chunk.suppressed is None else chunk.suppressed
    return x_hat, *found, chunk.c, chunk.carried, past.clone(memory_format=torch.contiguous_format), suppressed


@fake("recur")
def _(
    x,
    values,
    indices,
    mask,
    starts,
    memory,
    takes_part,
    past,
    position,
    followed,
    weights,
    k,
    k_mem,
    from_past,
    table,
    threshold,
):
    by = Weights(*weights)
    (B, n), H, m = mask.shape, by.slope.shape[0], followed.shape[0]
    code = (0,) if x is None else (B, n, k)
    return (
        memory.new_empty(B, n, by.W_O.shape[0]),
        memory.new_empty(code),
        memory.new_empty(code, dtype=torch.int64),
        memory.new_empty(B, n, by.W_O.shape[0]),
        memory.new_empty(B, n, H, m),
        past.new_empty(past.shape),
        memory.new_empty((0,) if x is None or by.W_I is None else (B, n, by.W_I.shape[0])),
    )


class _Run(NamedTuple):
    """What is the same at each position."""

    weights: Weights
    k_mem: int
    from_past: bool
    followed: Tensor  # [m]
    encode: Encode
    read_memory: Callable[..., Tensor]
    gather_sum: Callable[[Tensor, Tensor, Tensor], Tensor]
    scale_heads: Callable[..., tuple[Tensor, Tensor]]

    def queries(self, query: Tensor) -> Tensor:
        """query [..., d_query] -> [..., n_heads, d_head]."""
        return self.scale_heads(self._heads(query, self.weights.W_Q), self.weights.gain, *UNIT)[0]

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """memory [..., d_memory] -> keys [..., n_heads, d_head], values [..., n_heads, d_value], and their scale."""
        keys, values = self._heads(memory, self.weights.W_K), self._heads(memory, self.weights.W_V)
        return self.scale_heads(keys, None, *UNIT)[0], *self.scale_heads(values, None, *BOUNDED)

    def _heads(self, x: Tensor, W: Tensor) -> Tensor:
        return linear(x, W).unflatten(-1, (len(self.weights.slope), -1))


class _Chunk(NamedTuple):
    """n positions of B sequences. values, indices and suppressed are written where x is given, c and carried always."""

    x: Tensor | None  # [B, n, d_in], centred
    values: Tensor  # [B, n, k]
    indices: Tensor  # [B, n, k]
    c: Tensor  # [B, n, d_out]
    carried: Tensor  # [B, n, n_heads, m]
    starts: Tensor  # [B, n] int64
    mask: Tensor  # [B, n] bool
    suppressed: Tensor | None  # [B, n, d_in], where W_I makes it another than c


def _loop(run: _Run, chunk: _Chunk, memory: Tensor, takes_part: Tensor, past: Tensor, position: int) -> Tensor:
    """The positions one after the other; gives the last reconstruction, as `Recurred.past`."""
    for i in range(chunk.mask.shape[1]):
        here = _Chunk(*(None if tensor is None else tensor[:, i] for tensor in chunk))  # type: ignore[arg-type]
        t = position + i
        left, past = _position(run, here, memory, takes_part, past, t)
        memory[:, t % memory.shape[1]] = left
        takes_part[:, t % memory.shape[1]] = here.mask
    return past


def _position(
    run: _Run, here: _Chunk, memory: Tensor, takes_part: Tensor, past: Tensor, t: int | Tensor
) -> tuple[Tensor, Tensor]:
    """One position, t, of B sequences: `here` without its second dimension. -> what it leaves in the memory, past."""
    by, followed = run.weights, run.followed
    H = len(by.slope)
    # Not of all positions at once: the bits of a product may depend on its number of rows, and on their strides.
    queries = run.queries(past if run.from_past or here.x is None else here.x.contiguous())
    read = run.read_memory(queries, memory, takes_part, by.slope, by.null, here.starts, here.mask, t)
    if len(followed):
        heads = read.unflatten(-1, (H, -1))
        d_value = heads.shape[-1] - len(followed)
        here.carried.copy_(heads[..., d_value:])
        read = heads[..., :d_value].flatten(-2)
    here.c.copy_(functional.linear(read, by.W_O))
    if here.x is not None:
        suppressed = here.c
        if by.W_I is not None and here.suppressed is not None:
            suppressed = here.suppressed.copy_(functional.linear(read, by.W_I))
        values, indices = run.encode(here.x - suppressed)
        here.values.copy_(values.masked_fill_(~here.mask[:, None], 0))
        here.indices.copy_(indices)
    values, indices = here.values[:, : run.k_mem], here.indices[:, : run.k_mem]
    keys, heads, scale = run.keys_values(run.gather_sum(values, indices, by.W_mem))
    if len(followed):
        activity = torch.where(indices.unsqueeze(-1) == followed, values.unsqueeze(-1), 0).sum(dim=1)  # [B, m]
        heads = torch.cat([heads, scale * activity.unsqueeze(1)], dim=-1)
    left = torch.cat([keys.flatten(-2), heads.flatten(-2)], dim=-1)
    if run.from_past:
        past = run.gather_sum(here.values, here.indices, by.W_dec) + here.c
    return left, past


Capture = Callable[[Callable[[], None]], Callable[[], None]]


def replay(
    run: _Run, chunk: _Chunk, memory: Tensor, takes_part: Tensor, past: Tensor, first: int, capture: Capture
) -> Tensor:
    """`_loop` as one captured position, run n times, with its number on the device.

    Attention reads as many rows as the positions up to the next power of two are: a capture for each such number.
    """
    n, room = chunk.mask.shape[1], memory.shape[1]
    i = torch.zeros(1, dtype=torch.int64, device=memory.device)
    here = _Chunk(*(None if tensor is None else tensor[:, 0].clone() for tensor in chunk))  # type: ignore[arg-type]
    past = past.clone()
    written = ["c", "carried", *(["values", "indices"] if chunk.x is not None else [])]
    written += ["suppressed"] if chunk.suppressed is not None else []
    given = [name for name in _Chunk._fields if name not in written and getattr(chunk, name) is not None]

    def position(rows: int) -> None:
        for name in given:
            getattr(here, name).copy_(getattr(chunk, name).index_select(1, i).squeeze(1))
        t = i + first
        left, new_past = _position(run, here, memory[:, :rows], takes_part[:, :rows], past, t)
        past.copy_(new_past)
        memory.index_copy_(1, t % room, left.unsqueeze(1))
        takes_part.index_copy_(1, t % room, here.mask.unsqueeze(1))
        for name in written:
            getattr(chunk, name).index_copy_(1, i, getattr(here, name).unsqueeze(1))
        i.add_(1)

    work, again, rows = None, None, 0
    for t in range(first, first + n):
        if work is None or (t > rows and rows < room):
            rows = min(room, max(LEAST_ROWS, 1 << max(0, t - 1).bit_length()))
            work, again = partial(position, rows), None
            work()  # not captured: it may compile and load kernels
        else:
            again = again or capture(work)
            again()
    return past


def _captured(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """Capture `work` on a device as a CUDA graph, without running it. A call of the result runs it.

    Left to itself torch captures what is launched on one stream of the current device, which may be another: the graph
    would be empty.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        work()
    return graph.replay
