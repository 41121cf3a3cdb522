"""Which positions of a text take part: not padding, attention sinks or special tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SINK_NORM = 10.0  # in medians of the window's norms; sinks are 30 and more, the rest stays below 3


class Begun(NamedTuple):
    """What `follow_mask` keeps of a text, from one part of it to the next; rows are texts."""

    begun: Tensor  # [B] bool: position 0 has come
    usual_norm: Tensor  # [B] float32: the median that norms are compared with; NaN before there is one


def sink_mask(
    acts: Tensor, text: Tensor | None = None, keep_first: bool = False, bos: bool = False, special: Tensor | None = None
) -> Tensor:
    """Which positions take part: acts [B, T, d_in] -> [B, T] bool.

    This is the one rule for padding and attention sinks. A row does not depend on the others of the batch.

    - Padding takes no part: where `text` [B, T], bool or integers, is false, or where all activations are zero.
    - Position 0 takes no part: the first position of the row that is text.
    - Outliers take no part: positions whose norm is more than ten times the median norm of the row's other text.
    - Special tokens take no part: where `special` [B, T] is true. They count in no median, but one can be position 0.
    - A position with NaN or Inf takes part, so that the error is noticed.

    `keep_first`: position 0 and outliers take part, for activations without sinks. With `bos` as well, only outliers
    do, as position 0 is a beginning of sequence.

    Raises ValueError or TypeError where shapes or dtypes are others.
    """
    return follow_mask(acts, None, text, keep_first, bos, special)[0]


@torch.no_grad()
def follow_mask(
    acts: Tensor,
    before: Begun | None = None,
    text: Tensor | None = None,
    keep_first: bool = False,
    bos: bool = False,
    special: Tensor | None = None,
) -> tuple[Tensor, Begun]:
    """`sink_mask` of texts that come in parts: the next T positions, and what their next parts need.

    before: what the call for the part before gave; None for the first part. Norms are compared with the median of the
    first part that has text beside position 0.
    """
    if acts.dim() != 3:
        raise ValueError(f"acts: given shape {list(acts.shape)}; needed [B, T, d_in]")
    if acts.is_complex():
        raise TypeError(f"acts: given {acts.dtype}; needed real numbers")
    B, T, d_in = acts.shape
    is_text = torch.zeros(B, T, dtype=torch.bool, device=acts.device)
    if d_in:
        is_text = acts.abs().amax(dim=-1) != 0  # a sum of squares may round to zero
    for name, marks in (("text", text), ("special", special)):
        if marks is not None and marks.shape != (B, T):
            raise ValueError(f"{name}: given shape {list(marks.shape)}; needed {[B, T]}, as acts")
        if marks is not None and (marks.is_floating_point() or marks.is_complex()):
            raise TypeError(f"{name}: given {marks.dtype}; needed bool or integers")
    if text is not None:
        is_text &= (text != 0).to(acts.device)
    if before is None:
        before = Begun(is_text.new_zeros(B), torch.full([B], math.nan, device=acts.device))
    first = is_text & (is_text.cumsum(dim=1) == 1) & ~before.begun.unsqueeze(1)
    begun = before.begun | is_text.any(dim=1)
    if T == 0:
        return is_text, before
    norms = acts.float().norm(dim=-1)
    finite = norms.isfinite()
    taking_part = is_text if special is None else is_text & (special == 0).to(acts.device)
    counted = norms.where(taking_part & ~first & finite, math.nan)
    usual = before.usual_norm.where(before.usual_norm.isfinite(), counted.nanmedian(dim=1).values)
    if keep_first:
        return taking_part & ~first if bos else taking_part, Begun(begun, usual)
    sink = finite & (norms > SINK_NORM * usual.unsqueeze(1))
    return taking_part & ~first & ~sink, Begun(begun, usual)
