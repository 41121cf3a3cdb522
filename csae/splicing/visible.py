"""Which positions of a pass are text: what the attention mask and the position numbers of a language model say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LEAST_SCORE = -1e4  # an additive mask is below this where a position is masked


def visible(arguments: Mapping[str, Any], B: int, T: int, before: int) -> tuple[Tensor | None, Tensor | None]:
    """Which of the T positions of a pass, after `before` others, the arguments of a model's forward say are text.

    Returns [B, T] bool, and [B, before] bool of the positions before; None where nothing is said of them.
    Raises ValueError or TypeError where a mask can't be read, or where a row holds several texts.
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        other = [name for name in arguments if name.endswith("mask") and _could_be(arguments[name], B, T + before)]
        if other and "attention_mask" not in arguments:
            raise TypeError(f"{other[0]}: a mask that a splice can't read; give attention_mask, or no mask")
        text, earlier = None, None
    elif isinstance(mask, Mapping):  # a mask for each kind of layer: a position that any of them sees is text
        read = [_read(part, B, T, before)[0] for part in mask.values() if part is not None]
        text, earlier = (torch.stack(read).any(dim=0) if read else None), None
    else:
        text, earlier = _read(mask, B, T, before)
    _check_one_text(arguments, text, B, T)
    return text, earlier


def first_position(arguments: Mapping[str, Any]) -> int:
    """The number that a pass's arguments give to its first position: 0 where none does."""
    for name in ("cache_position", "position_ids"):
        positions = arguments.get(name)
        if isinstance(positions, Tensor) and positions.numel() and positions.dim() in (1, 2):
            return int(positions.min())
    return 0


def _could_be(value: Any, B: int, total: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape == (B, total)


def _read(mask: Any, B: int, T: int, before: int) -> tuple[Tensor, Tensor | None]:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: given a {type(mask).__name__}; needed a tensor [B, positions], or 4D")
    if mask.dim() in (3, 4):
        return _of_pairs(mask if mask.dim() == 4 else mask.unsqueeze(1), B, T, before), None
    if mask.dim() != 2 or mask.shape[0] not in (1, B):
        raise ValueError(f"attention_mask: given shape {list(mask.shape)}; needed [B, positions], B = {B}")
    seen = (mask != 0).expand(B, -1)
    if seen.shape[1] == T:
        return seen, None
    if seen.shape[1] < before + T:
        raise ValueError(
            f"attention_mask: {seen.shape[1]} positions wide; needed {T}, or {before + T} with those that went before"
        )
    return seen[:, before : before + T], seen[:, :before]


def _of_pairs(mask: Tensor, B: int, T: int, before: int) -> Tensor:
    """mask [B or 1, heads or 1, T, positions]: bool, or added to the scores -> [B, T], what is text.

    A text position sees itself. A padding row sees nothing, or everything, as some attention kernels need.
    """
    if mask.shape[2] != T or mask.shape[0] not in (1, B):
        raise ValueError(f"attention_mask: given shape {list(mask.shape)}; needed [{B}, 1, {T}, positions]")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask: given 4D {mask.dtype}; needed bool, or a float that is added to the scores")
    sees = (mask if mask.dtype == torch.bool else mask > LEAST_SCORE).any(dim=1)  # [B or 1, T, positions]
    width = sees.shape[-1]
    # A sliding cache shows the last positions only; a static one has room behind them.
    start = 0 if width == T else before if width >= before + T else width - T
    if start < 0:
        raise ValueError(f"attention_mask: {width} positions wide; needed {T} at least")
    see_all = sees.all(dim=2)
    of_padding = see_all & ~see_all.all(dim=1, keepdim=True)  # all see all: no causal order to read
    of_padding[:, -1] &= width > start + T  # the last position sees every text position
    here = sees[:, :, start : start + T]
    text = here.diagonal(dim1=1, dim2=2) & ~of_padding
    before_it = here.diagonal(offset=-1, dim1=1, dim2=2) | ~text[:, 1:] | ~text[:, :-1]  # [B or 1, T - 1]
    if not bool(before_it.all()):
        row, position = (~before_it).nonzero()[0].tolist()
        raise ValueError(
            f"attention_mask: position {position + 1} of row {row} does not see the one before it, as where several "
            "texts share a row; needed one text a row"
        )
    return text.expand(B, -1)


def _check_one_text(arguments: Mapping[str, Any], text: Tensor | None, B: int, T: int) -> None:
    """Raises ValueError where positions are numbered anew inside a row, or lengths of several texts are given."""
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == T > 1:
        anew = (positions.diff(dim=1) <= 0).expand(B, -1)
        if text is not None:
            text = text.to(anew.device)
            anew = anew & text[:, 1:] & text[:, :-1]
        if bool(anew.any()):
            raise ValueError("position_ids: numbered anew inside a row, as for several texts; needed one text a row")
    for name, value in arguments.items():
        if name.startswith("cu_seq") and isinstance(value, Tensor) and value.numel() > B + 1:
            raise ValueError(f"{name}: {value.numel() - 1} texts in {B} rows; needed one text a row")
