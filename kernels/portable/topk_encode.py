"""Encode and select: a tile of pre-activations at a time is multiplied into one reused buffer and searched there.

A tile is many rows by some of the features: the product is efficient, and its result is still in cache when it is
searched. The native library keeps a short list of candidates for each row from tile to tile, so that a tile costs one
comparison an entry. Plain PyTorch takes the k best of each tile, and then the k best of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .. import cpu
from . import on_native, topk_coarse, with_rows

# Pre-activations of one tile, and the candidates of its rows.
TILE_BYTES = 12 << 20
CANDIDATES_BYTES = 8 << 20
TILE_ROWS = 2048
# Half precision is widened so much of W_enc at a time: W_enc is never copied whole.
WIDE_BYTES = 4 << 20

# Without the native library: its tiles are larger, for each costs a top-k of its own.
PLAIN_TILE_BYTES = 16 << 20
PLAIN_TILE_ROWS = 1024
# A tile of fewer columns than this many times k is hardly narrowed down by taking its k best.
COLUMNS_PER_K = 16


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae] -> values [n, k] in x's dtype, indices [n, k] int64.

    Selection is on float32 pre-activations (float64 for float64 input), whatever the input's dtype.
    """
    values, indices = _output(x, k)
    bias = b_enc.to(values.dtype)
    if x.dtype == W_enc.dtype and x.shape[0] >= topk_coarse.LEAST_ROWS and topk_coarse.worthwhile(W_enc, k):
        _encode_coarsely(x, with_rows(W_enc), bias, k, values, indices)
    else:
        _encode(x, W_enc, bias, k, values, indices)
    return values.to(x.dtype), indices


class Encoder:
    """topk_encode of x [n, d_in] by the same weights again and again: what can be made of them once is made once.

    It is fastest where each row is much like the same row of the call before.
    It sees what is written into them as torch counts that: not what goes through `.data`.

    table: what `round_table` made of these weights, if it was made already.
    """

    def __init__(self, W_enc: Tensor, b_enc: Tensor, k: int, table: Sequence[Tensor] = ()) -> None:
        self._weights, self._k = (W_enc, b_enc), k
        # Of what was made in inference mode torch doesn't count the writes.
        self._coarsely = topk_coarse.worthwhile(W_enc, k) and not (W_enc.is_inference() or b_enc.is_inference())
        self._rows = with_rows(W_enc) if table else W_enc
        self._table = cpu.PairedRows(*table[:2]) if table else None
        self._versions = self._now() if table else (-1, -1)
        self._encoded = topk_coarse.LEAST_ROWS if table else 0  # rows, by the weights of these versions
        self._last: list[topk_coarse.Reached | None] = []  # in each chunk of the rows of the last call

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc = self._weights
        if not self._coarsely or x.dtype != W_enc.dtype:
            return topk_encode(x, W_enc, b_enc, self._k)
        if self._versions != self._now():
            self._table, self._versions, self._encoded, self._last = None, self._now(), 0, []
        self._encoded += x.shape[0]
        if self._encoded < topk_coarse.LEAST_ROWS:
            return topk_encode(x, W_enc, b_enc, self._k)
        bias = b_enc.float()
        if self._table is None:
            self._rows = with_rows(W_enc)
            self._table = topk_coarse.rounded(self._rows, bias)
        values, indices = _output(x, self._k)
        self._last = _encode_coarsely(x, self._rows, bias, self._k, values, indices, self._table, self._last)
        return values.to(x.dtype), indices

    def _now(self) -> tuple[int, int]:
        W_enc, b_enc = self._weights
        return (-1, -1) if W_enc.is_inference() or b_enc.is_inference() else (W_enc._version, b_enc._version)


def round_table(W_enc: Tensor, b_enc: Tensor, k: int) -> list[Tensor]:
    """What can be made of the weights once: the pairs and lengths (`cpu.PairedRows`) of all rows, and of a sample.

    For `encode_by_table` and `Encoder`. Empty where it is no gain.
    """
    if not topk_coarse.worthwhile(W_enc, k):
        return []
    rows, bias = with_rows(W_enc), b_enc.float()
    return [*topk_coarse.rounded(rows, bias), *topk_coarse.sample_of(rows, bias, k)]


def encode_by_table(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, table: list[Tensor], last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """topk_encode by weights whose `round_table` is not empty, and what the next call of rows like these may be given.

    last: that, of the call before. What is found does not depend on it, only how soon.

    -> values [n, k], indices [n, k], and [2, n] float32.
    """
    rounded, sample = cpu.PairedRows(*table[:2]), cpu.PairedRows(*table[2:])
    values, indices = _output(x, k)
    before: list[topk_coarse.Reached | None] = []
    if last is not None and last.shape[1] == x.shape[0]:
        for here in _coarse_chunks(x, W_enc, k):
            sampled = here.stop - here.start >= topk_coarse.LEAST_SAMPLED
            before.append(topk_coarse.Reached(last[0, here], last[1, here], sample) if sampled else None)
    found = _encode_coarsely(x, with_rows(W_enc), b_enc.float(), k, values, indices, rounded, before, sample)
    reached = x.new_zeros(2, x.shape[0], dtype=torch.float32)
    for here, of in zip(_coarse_chunks(x, W_enc, k), found, strict=True):
        if of is not None:
            reached[0, here], reached[1, here] = of.bounds, of.lengths
    return values.to(x.dtype), indices, reached


def _encode(x: Tensor, W_enc: Tensor, bias: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """topk_encode into values and indices, in the dtype of values."""
    rows, columns = _tile(x, W_enc.shape[0], k)
    workspace = _large((rows * columns,), values)
    for here in _slices(x.shape[0], rows):
        tiles = _products(x[here].to(values.dtype), W_enc, columns, workspace)
        _select(tiles, bias, k, values[here], indices[here])


def _encode_coarsely(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    k: int,
    values: Tensor,
    indices: Tensor,
    table: cpu.PairedRows | None = None,
    last: Sequence[topk_coarse.Reached | None] = (),
    sample: cpu.PairedRows | None = None,
) -> list[topk_coarse.Reached | None]:
    """The same by `topk_coarse`, and as ever for the rows that it leaves unsettled.

    last: what this gave in the call before.
    """
    chunks = _coarse_chunks(x, W_enc, k)
    # Other rows than these, if they are not as many.
    if [None if of is None else len(of.bounds) for of in last] != [here.stop - here.start for here in chunks]:
        last = [None] * len(chunks)
    reached = []
    for here, before in zip(chunks, last, strict=True):
        acts, found = x[here].float().contiguous(), (values[here], indices[here])
        settled, now = topk_coarse.topk_encode(acts, W_enc, bias, k, *found, table, before, sample)
        reached.append(now)
        if not settled.all():
            left = (~settled).nonzero().squeeze(1)
            exactly = _output(acts[left], k)
            _encode(acts[left], W_enc, bias, k, *exactly)
            found[0][left], found[1][left] = exactly
    return reached


def _coarse_chunks(x: Tensor, W_enc: Tensor, k: int) -> list[slice]:
    rows, _ = _tile(x, W_enc.shape[0], topk_coarse.candidates(k))
    return list(_slices(x.shape[0], rows))


def encode_and_keep(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_encode, and all of its pre-activations for `encode_again`: [n, d_sae] in the dtype of selection."""
    values, indices = _output(x, k)
    rows, columns = _tile(x, W_enc.shape[0], k)
    bias = b_enc.to(values.dtype)
    kept = _large((x.shape[0], W_enc.shape[0]), values)
    for here in _slices(x.shape[0], rows):
        tiles = _updates(kept[here], bias, x[here].to(values.dtype), W_enc, columns)
        _select(tiles, torch.zeros_like(bias), k, values[here], indices[here])
    return values.to(x.dtype), indices, kept


def encode_again(kept: Tensor, a: Tensor, W_a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of kept - a W_a^T in each row, relu'd, as topk_encode has them; kept becomes kept - a W_a^T.

    kept [n, d_sae] from `encode_and_keep`, a [n, r], W_a [d_sae, r] -> values [n, k] in a's dtype, indices [n, k].
    """
    values, indices = _output(a, k)
    rows, columns = _tile(a, W_a.shape[0], k)
    no_bias = kept.new_zeros(kept.shape[1])
    for here in _slices(a.shape[0], rows):
        tiles = _updates(kept[here], None, -a[here].to(values.dtype), W_a, columns)
        _select(tiles, no_bias, k, values[here], indices[here])
    return values.to(a.dtype), indices


def _output(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values and indices [n, k]; values in the dtype of selection."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=torch.int64)


def _large(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A new tensor, in huge pages where the native library can ask for them."""
    return cpu.fresh(shape, like.dtype) if on_native(like) else like.new_empty(shape)


def _tile(x: Tensor, d_sae: int, k: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    n, d_in = x.shape
    if n == 0:
        return 0, d_sae
    itemsize = 8 if x.dtype == torch.float64 else 4
    if not (x.device.type == "cpu" and itemsize == 4 and cpu.available()):
        return _plain_tile(n, d_sae, k, itemsize)
    rows = min(TILE_ROWS, CANDIDATES_BYTES // (8 * cpu.topk_capacity(d_sae, k)))
    if x.dtype != torch.float32:
        rows = min(rows, WIDE_BYTES // (itemsize * max(1, d_in)))
    # Chunks of nearly equal size.
    rows = -(-n // -(-n // max(1, rows)))
    columns = max(1, TILE_BYTES // itemsize // rows)
    # The native library reads 64 columns at a time.
    return rows, min(d_sae, columns if columns < 64 else columns // 64 * 64)


def _plain_tile(n: int, d_sae: int, k: int, itemsize: int) -> tuple[int, int]:
    pre_acts = PLAIN_TILE_BYTES // itemsize
    rows = min(n, PLAIN_TILE_ROWS)
    columns = max(1, pre_acts // rows)
    if columns >= d_sae or columns < COLUMNS_PER_K * k:
        return max(1, min(n, pre_acts // d_sae)), d_sae
    return rows, columns


def _slices(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, max(1, step)):
        yield slice(start, min(start + step, n))


def _products(acts: Tensor, W: Tensor, columns: int, workspace: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """acts W^T [rows, d_sae] in tiles, each of which is gone when the next one comes."""
    for block in _slices(W.shape[0], columns):
        width = block.stop - block.start
        out = workspace[: acts.shape[0] * width].view(acts.shape[0], width)
        _multiply(acts, W[block], out, beta=0)
        yield block, out


def _updates(
    kept: Tensor, start: Tensor | None, acts: Tensor, W: Tensor, columns: int
) -> Iterator[tuple[slice, Tensor]]:
    """kept [rows, d_sae] += acts W^T in tiles; kept begins as start [d_sae] where that is given."""
    for block in _slices(W.shape[0], columns):
        out = kept[:, block]
        if start is not None:
            out.copy_(start[block])
        _multiply(acts, W[block], out, beta=1)
        yield block, out


def _multiply(acts: Tensor, W: Tensor, out: Tensor, beta: int) -> None:
    """out = beta out + acts W^T, in the dtype of acts and out."""
    if W.dtype == out.dtype:
        out.addmm_(acts, W.T, beta=beta)
        return
    for block in _slices(W.shape[0], WIDE_BYTES // (out.itemsize * max(1, W.shape[1]))):
        out[:, block].addmm_(acts, W[block].to(out.dtype).T, beta=beta)


def _select(tiles: Iterable[tuple[slice, Tensor]], bias: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """The k largest of each row of the tiles + bias [d_sae], relu'd, into values and indices [rows, k].

    tiles: columns and pre-activations [rows, columns], in the order of columns; equal ones by lower index.
    """
    d_sae = bias.shape[0]
    if on_native(values):
        best = cpu.topk_start(values.shape[0], d_sae, k)
        for columns, pre_acts in tiles:
            cpu.topk_add(best, pre_acts, bias[columns], columns.start)
        cpu.topk_finish(best, values, indices)
        return
    found = []
    for columns, pre_acts in tiles:
        pre_acts += bias[columns]
        if pre_acts.shape[1] == d_sae:
            _select_plainly(pre_acts, k, values, indices)
            return
        found.append(_best_of_tile(pre_acts, min(k, pre_acts.shape[1]), columns.start))
    _merge(found, k, values, indices)


def _best_of_tile(pre_acts: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row as they are, not relu'd, and their features; NaN where the row has a NaN."""
    values = pre_acts.new_empty(pre_acts.shape[0], k)
    indices = torch.empty_like(values, dtype=torch.int64)
    _select_plainly(pre_acts, k, values, indices)
    return torch.where(values.isnan(), values, pre_acts.gather(1, indices)), indices + first


def _merge(found: list[tuple[Tensor, Tensor]], k: int, values: Tensor, indices: Tensor) -> None:
    """The k best of what the tiles of a row left; tiles are in the order of features, so ties fall as they should."""
    candidates, features = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    _select_plainly(candidates, k, values, indices)
    chosen = features.gather(1, indices)
    # A broken row's indices are 0..k-1 already.
    torch.where(values.isnan(), indices, chosen, out=indices)


def _select_plainly(pre_acts: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """The k largest of each row, relu'd, into values and indices [rows, k]; equal ones by lower index."""
    found, where = pre_acts.topk(k, dim=1)
    # torch.topk takes any of several equal entries: rows with a tie at the threshold are selected again.
    tied = (pre_acts >= found[:, -1:]).sum(dim=1) > k
    if tied.any():
        found[tied], where[tied] = _stable_topk(pre_acts[tied], k)
    where, by_index = where.sort(dim=1)
    found, by_value = found.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    indices.copy_(where.gather(1, by_value))
    values.copy_(found.relu())
    broken = pre_acts.isnan().any(dim=1, keepdim=True)
    values.masked_fill_(broken, torch.nan)
    torch.where(broken, torch.arange(k, device=indices.device), indices, out=indices)


def _stable_topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found, where = pre_acts.sort(dim=1, descending=True, stable=True)
    return found[:, :k], where[:, :k]
