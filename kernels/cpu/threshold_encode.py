"""threshold_encode and batch_topk_encode on the CPU.

In float32, as `topk_encode`, with what is above the threshold in place of what is largest. Large products go the way of
`topk_coarse`: upper bounds by a product in bfloat16, and what they leave in float32. Here the threshold is known, so
no sample has to find it, and an entry needs no comparison with others: a row is settled unless it has more candidates
than there is room for.

Bounds are of pre-activations, and compared with the one threshold; where features have thresholds of their own, of
pre-activations less these, and compared with zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..portable import threshold_encode as portable
from ..portable.threshold_encode import Code, in_dtype
from ..portable.topk_encode import Inner, encode, output, slices
from . import topk_coarse
from . import topk_encode as topk
from .above_rows import Between, above_add, above_finish, above_settle, cut
from .arguments import with_rows
from .round_rows import PairedRows
from .topk_coarse import MORE_CANDIDATES, TOO_LONG
from .topk_rows import topk_start

# Tables with fewer features for each of k_max are too small for the coarse search.
LEAST_FEATURES, FEATURES_PER_SLOT = 1024, 8
# What a threshold less a bias may lose when it is rounded to float32, twice over, relative to both.
ROUNDED_TWICE = 2.0**-20
# Columns that may be added to a list at once.
BLOCK_WIDTH = 64
# One row in so many finds a threshold, where there is no guess; so much of it is taken, for it is of few rows.
SAMPLED_ROW, LEAST_SAMPLED_ROWS, SHARE = 16, 32, 0.85


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, dtype: torch.dtype | None = None
) -> Code:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae], threshold [] or [d_sae] float32 -> values [n, k_max] in `dtype`
    or x's, indices [n, k_max] int64.

    Of one dtype, float32, bfloat16 or float16. Selection is on float32 pre-activations.
    """
    return in_dtype(*_encode(x, W_enc, b_enc, threshold, None, k_max, []), dtype or x.dtype)


def near_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int) -> Code:
    """As `threshold_encode`, of the positive pre-activations less than bandwidth / 2 from their threshold; float32."""
    return _encode(x, W_enc, b_enc, threshold - bandwidth / 2, threshold + bandwidth / 2, k_max, [])


def threshold_and_near(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`threshold_encode` in float32 and `near_threshold`, of one search: both are above threshold - bandwidth / 2.

    With room for two codes hardly any row is cut off; one that may be is searched twice.
    """
    lower, upper = threshold - bandwidth / 2, threshold + bandwidth / 2
    values, indices = _encode(x, W_enc, b_enc, lower, None, min(len(W_enc), 2 * k_max), [])
    own, high = (of.expand(len(W_enc))[indices] for of in (threshold, upper))
    found = (
        *_kept(values, indices, (values > own) | values.isnan(), k_max),
        *_kept(values, indices, (values < high) | values.isnan(), k_max),
    )
    cut_off = (values[:, -1] != 0).nonzero().squeeze(1)
    if len(cut_off) and values.shape[1] < len(W_enc):
        left = x[cut_off], W_enc, b_enc
        code = threshold_encode(*left, threshold, k_max, torch.float32)
        near = near_threshold(*left, threshold, bandwidth, k_max)
        for of, by in zip(found, (*code, *near), strict=True):
            of[cut_off] = by
    return found


def _kept(values: Tensor, indices: Tensor, keep: Tensor, k_max: int) -> Code:
    """The first k_max entries of each row [n, m] that are to be kept, in their order; behind them both are 0."""
    place = keep.cumsum(dim=1)
    place = torch.where(keep & (values != 0) & (place <= k_max), place, 0)  # place 0 is for the others, and cut off
    shape = len(values), k_max + 1
    return (
        values.new_zeros(shape).scatter_(1, place, values).narrow_copy(1, 1, k_max),
        indices.new_zeros(shape).scatter_(1, place, indices).narrow_copy(1, 1, k_max),
    )


def threshold_table(W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> list[Tensor]:
    """What can be made of the weights once: their `PairedRows`, for `threshold_encode_by_table`; or nothing."""
    if not worthwhile(W_enc, k_max):
        return []
    return list(topk_coarse.rounded(with_rows(W_enc), _of_bounds(b_enc.float(), _floor(threshold))))


def threshold_encode_by_table(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, table: list[Tensor]
) -> Code:
    """`threshold_encode`, for any number of rows by the `threshold_table` of the weights and the threshold."""
    return in_dtype(*_encode(x, W_enc, b_enc, threshold, None, k_max, table), x.dtype)


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    k_max: int,
    mask: Tensor | None,
    guess: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `portable.batch_topk_encode`; a guess that fails, or is missing, is made from some of the rows."""

    def guesses() -> Iterator[Tensor]:
        if guess is not None and guess > 0:
            yield portable.LOWERED * guess
        some = x if mask is None else x[mask]
        some = some[:: max(1, min(SAMPLED_ROW, len(some) // LEAST_SAMPLED_ROWS))]
        if 2 * len(some) < len(x):
            found = topk.topk_encode(some, W_enc, b_enc, k_max, torch.float32)
            yield torch.tensor(SHARE * cut(*found, len(some) * k))
        yield torch.zeros(())

    def search(threshold: Tensor) -> Code:
        if threshold > 0:
            return _encode(x, W_enc, b_enc, threshold, None, k_max, [])
        return topk.topk_encode(x, W_enc, b_enc, k_max, torch.float32)

    values, indices, threshold = portable.within_budget(search, guesses(), k, mask, _cut)
    return *in_dtype(values, indices, dtype or x.dtype), threshold


def worthwhile(W_enc: Tensor, k_max: int) -> bool:
    """Whether the coarse search is a gain for LEAST_ROWS or more, W_enc being [d_sae, d_in]."""
    large = len(W_enc) >= max(LEAST_FEATURES, FEATURES_PER_SLOT * k_max)
    return large and topk_coarse.possible(W_enc)


def _encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor, ceiling: Tensor | None, k_max: int, table: list[Tensor]
) -> Code:
    """What is above floor and zero, and below ceiling: [] or [d_sae], both. Values are float32."""
    inner = above(floor, ceiling)
    if not table and not (len(x) >= topk_coarse.LEAST_ROWS and worthwhile(W_enc, k_max)):
        return encode(x, W_enc, b_enc, k_max, inner)
    values, indices = output(x, k_max)
    W_enc, bias = with_rows(W_enc), b_enc.float()
    for here in slices(x.shape[0], topk.rows_at_once(x, sum(_lists(len(W_enc), k_max)))):
        acts, found = x[here].float().contiguous(), (values[here], indices[here])
        settled = _settle(acts, W_enc, bias, _floor(floor), ceiling, *found, PairedRows(*table) if table else None)
        if not settled.all():
            left = (~settled).nonzero().squeeze(1)
            found[0][left], found[1][left] = encode(acts[left], W_enc, bias, k_max, inner)
    return values, indices


def _settle(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    floor: Tensor,
    ceiling: Tensor | None,
    values: Tensor,
    indices: Tensor,
    table: PairedRows | None,
) -> Tensor:
    """`_encode` by upper bounds, into values and indices [rows, k_max]. -> settled [rows] bool; others are not filled.

    table: W_enc rounded, with the biases of `_of_bounds`; without it W_enc is rounded a tile at a time.
    """
    d_sae = len(W_enc)
    acts, lengths = topk_coarse.rounded_acts(x)
    most, more = _lists(d_sae, values.shape[1])
    best = topk_start(len(x), d_sae, most, most + more)
    start = floor.item() if floor.dim() == 0 else 0.0
    best.threshold.fill_(start)
    longest = topk_coarse.add_bounds(best, acts, W_enc, _of_bounds(bias, floor), table)
    band = _between(floor, ceiling, d_sae)
    settled = above_settle(best, band, start, floor.dim() == 0, x, W_enc, bias, values, indices)
    return settled & (lengths * longest < TOO_LONG)


def _lists(d_sae: int, k_max: int) -> tuple[int, int]:
    """Candidates of a row that are enough to settle nearly all rows, and room for more beside them.

    Lists are seldom as long as k_max, and hardly ever pruned, so there is little more room.
    """
    return min(d_sae, 3 * k_max + MORE_CANDIDATES), 2 * BLOCK_WIDTH


def _of_bounds(bias: Tensor, floor: Tensor) -> Tensor:
    """The biases [d_sae] that bounds are made with: less floor where that is of each feature, and then rounded up."""
    if floor.dim() == 0:
        return bias
    never = (bias == -torch.inf) | (floor == torch.inf)
    return torch.where(never, -torch.inf, bias - floor + ROUNDED_TWICE * (bias.abs() + floor))


def _floor(threshold: Tensor) -> Tensor:
    """Above it is above the threshold and zero; NaN, which nothing is above, becomes infinite."""
    return threshold.clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _between(floor: Tensor, ceiling: Tensor | None, d_sae: int) -> Between:
    both = (None if of is None else of.expand(d_sae).contiguous() for of in (_floor(floor), ceiling))
    return Between(*both)  # type: ignore[arg-type]


def above(threshold: Tensor, ceiling: Tensor | None = None) -> Inner:
    """The inner loop that selects what is above zero and a threshold [] or [d_sae], and below a ceiling."""
    return topk.INNER._replace(select=partial(_select, threshold, ceiling))


def _select(
    floor: Tensor,
    ceiling: Tensor | None,
    tiles: Iterable[tuple[slice, Tensor]],
    bias: Tensor,
    k: int,
    values: Tensor,
    indices: Tensor,
) -> None:
    """As `topk_encode.INNER` does, of what lies between; elsewhere values and indices are 0."""
    band, best = _between(floor, ceiling, len(bias)), topk_start(len(values), len(bias), k)
    for columns, pre_acts in tiles:
        above_add(best, band.of(columns), pre_acts, bias[columns], columns.start)
    above_finish(best, values, indices)


def _cut(values: Tensor, indices: Tensor, budget: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `portable.cut`, in place."""
    return values, indices, torch.tensor(cut(values, indices, int(budget)))


threshold_encode_and_keep = partial(portable.threshold_encode_and_keep, above=above)
threshold_encode_again = partial(portable.threshold_encode_again, above=above)
batch_encode_and_keep = partial(portable.batch_encode_and_keep, above=above, cut=_cut)
batch_encode_again = partial(portable.batch_encode_again, above=above, cut=_cut)
