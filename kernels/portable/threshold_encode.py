"""threshold_encode and batch_topk_encode, by the tiles of `topk_encode`.

What is not above its threshold becomes zero in a tile, and the k_max largest of a row are taken. The budget of a batch
is cut from such codes: at a threshold that is low enough they hold all that can be selected, which their number proves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import topk_encode as topk
from .topk_encode import Inner

# A threshold from the step before is lowered to this share: batches differ, and one that is too high costs a search.
LOWERED = 0.95

Code = tuple[Tensor, Tensor]
Above = Callable[[Tensor], Inner]
Cut = Callable[[Tensor, Tensor, "int | Tensor"], tuple[Tensor, Tensor, Tensor]]


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, dtype: torch.dtype | None = None
) -> Code:
    """x [n, d_in], W_enc [d_sae, d_in], b_enc [d_sae], threshold [] or [d_sae] -> values [n, k_max] in `dtype` or x's,
    indices [n, k_max] int64.

    Selection is on float32 pre-activations (float64 for float64 input), whatever the input's dtype; threshold has
    theirs. Where a value is zero, or rounds to it, the index is 0.
    """
    values, indices = topk.encode(x, W_enc, b_enc, k_max, _above(threshold))
    return in_dtype(values, indices, dtype or x.dtype)


def near_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, k_max: int) -> Code:
    """As `threshold_encode`, of the positive pre-activations less than bandwidth / 2 from their threshold.

    Values are in the dtype of selection.
    """
    return topk.encode(x, W_enc, b_enc, k_max, _above(threshold - bandwidth / 2, threshold + bandwidth / 2))


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
    """The n k largest positive pre-activations of the n rows in mask [rows] bool, no more than k_max in a row.

    guess: [], a threshold that is expected; it changes the time only. -> values, indices as `threshold_encode` gives
    them, and the smallest value selected, [] in the dtype of selection; 0 where fewer are positive.
    """

    def search(threshold: Tensor) -> Code:
        return topk.encode(x, W_enc, b_enc, k_max, _above(threshold))

    values, indices, threshold = within_budget(search, guesses(guess, x), k, mask)
    return *in_dtype(values, indices, dtype or x.dtype), threshold


def threshold_encode_and_keep(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, above: Above | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`threshold_encode`, and its pre-activations [n, d_sae] for `threshold_encode_again`, in float32 or float64."""
    values, indices, kept = topk.encode_and_keep(x, W_enc, b_enc, k_max, (above or _above)(threshold))
    return values, indices.masked_fill_(values == 0, 0), kept


def threshold_encode_again(
    kept: Tensor, a: Tensor, W_a: Tensor, threshold: Tensor, k_max: int, above: Above | None = None
) -> Code:
    """`threshold_encode` of kept - a W_a^T, which kept becomes, as in `topk_encode.encode_again`."""
    values, indices = topk.encode_again(kept, a, W_a, k_max, (above or _above)(threshold))
    return values, indices.masked_fill_(values == 0, 0)


def batch_encode_and_keep(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    k_max: int,
    mask: Tensor | None,
    guess: Tensor | None,
    above: Above | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`batch_topk_encode`, and its pre-activations [n, d_sae] in the dtype of selection, for `batch_encode_again`."""
    kept: Tensor | None = None

    def search(threshold: Tensor) -> Code:
        nonlocal kept
        inner = (above or _above)(threshold)
        if kept is not None:
            return topk.select_kept(kept, k_max, inner)
        values, indices, kept = topk.encode_and_keep(x, W_enc, b_enc, k_max, inner, topk.wide(x))
        return values, indices

    values, indices, threshold = within_budget(search, guesses(guess, x), k, mask, cut)
    assert kept is not None
    return *in_dtype(values, indices, x.dtype), threshold, kept


def batch_encode_again(
    kept: Tensor,
    a: Tensor,
    W_a: Tensor,
    k: int,
    k_max: int,
    mask: Tensor | None,
    guess: Tensor | None,
    above: Above | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_topk_encode` of kept - a W_a^T, which kept becomes."""
    multiplied = False

    def search(threshold: Tensor) -> Code:
        nonlocal multiplied
        inner = (above or _above)(threshold)
        if multiplied:
            return topk.select_kept(kept, k_max, inner)
        multiplied = True
        return topk.encode_again(kept, a, W_a, k_max, inner, topk.wide(a))

    values, indices, threshold = within_budget(search, guesses(guess, a), k, mask, cut)
    return *in_dtype(values, indices, a.dtype), threshold


def threshold_table(W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int) -> list[Tensor]:
    """Nothing: only the native kernels gain by weights that were rounded before."""
    return []


# --- shared with the other kernels -------------------------------------------------------------------------


def guesses(guess: Tensor | None, like: Tensor) -> Iterator[Tensor]:
    """Thresholds [] to search at, one after the other, until one is low enough; the last is zero."""
    zero = like.new_zeros((), dtype=topk.wide(like))
    if guess is not None and guess > 0:
        yield LOWERED * guess.to(zero.dtype)
    yield zero


def within_budget(
    search: Callable[[Tensor], Code],
    thresholds: Iterable[Tensor],
    k: int,
    mask: Tensor | None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_topk_encode`, by codes in the dtype of selection that `search` gives for a threshold []."""
    for threshold in thresholds:
        values, indices = search(threshold)
        if threshold <= 0 or enough(values, k, mask):
            break
    return in_budget(values, indices, k, mask, cut)


def enough(values: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """[] bool: whether codes [n, k_max] of what is above a threshold hold the budget, and so all that it can be of.

    What is above and not in them is what k_max excludes from any selection.
    """
    counts = values > 0
    return counts.sum() >= len(values) * k if mask is None else (counts & mask[:, None]).sum() >= mask.sum() * k


def in_budget(
    values: Tensor, indices: Tensor, k: int, mask: Tensor | None, cut: Cut | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of codes [n, k_max] what the n k largest of the rows in the mask leave; and the smallest of them, []."""
    budget: int | Tensor = len(values) * k
    if mask is not None:
        budget, values = mask.sum() * k, values.masked_fill(~mask[:, None], 0)
    return (cut or _cut)(values, indices, budget)


def _cut(values: Tensor, indices: Tensor, budget: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of codes [n, k_max] the `budget` largest positive values, the rest zero; and the smallest of them, [].

    Equal values by lower row, then in their order. NaN stays, and takes none of the budget. Nothing waits for a GPU.
    """
    flat = values.flatten().nan_to_num(nan=0.0, posinf=torch.inf)
    budget = torch.as_tensor(budget, device=values.device)
    if flat.numel() == 0:
        return values, indices, values.new_zeros(())
    descending = flat.sort(descending=True).values
    last = descending.gather(0, (budget - 1).clamp(0, len(flat) - 1).reshape(1)).squeeze(0)
    threshold = torch.where((budget > 0) & (budget <= len(flat)), last, 0)
    above, ties = flat > threshold, (flat == threshold) & (threshold > 0)
    selected = (above | (ties & (ties.cumsum(0) <= budget - above.sum()))) & (budget > 0)
    selected = selected.view_as(values) | values.isnan()
    return values.masked_fill(~selected, 0), indices.masked_fill(~selected, 0), threshold


def in_dtype(values: Tensor, indices: Tensor, dtype: torch.dtype) -> Code:
    """values in `dtype`; the index is 0 where a value rounds to zero."""
    if values.dtype == dtype:
        return values, indices
    values = values.to(dtype)
    return values, indices.masked_fill(values == 0, 0)


# -----------------------------------------------------------------------------------------------------------


def _above(threshold: Tensor, ceiling: Tensor | None = None) -> Inner:
    """The inner loop that selects pre-activations above zero and a threshold [] or [d_sae], and below a ceiling."""
    return topk.INNER._replace(select=partial(_select, threshold.clamp(min=0), ceiling))


def _select(
    floor: Tensor,
    ceiling: Tensor | None,
    tiles: Iterable[tuple[slice, Tensor]],
    bias: Tensor,
    k: int,
    values: Tensor,
    indices: Tensor,
) -> None:
    """As `topk_encode.select`, of what lies between; elsewhere values and indices are 0."""

    def between() -> Iterator[tuple[slice, Tensor]]:
        for columns, pre_acts in tiles:
            pre_acts = pre_acts + bias[columns]
            inside = pre_acts > floor.expand(bias.shape)[columns]
            if ceiling is not None:
                inside &= pre_acts < ceiling.expand(bias.shape)[columns]
            yield columns, torch.where(inside | pre_acts.isnan(), pre_acts, 0)

    topk.select(between(), torch.zeros_like(bias), k, values, indices)
    indices.masked_fill_(values == 0, 0)
