"""The windows of a text: its tokens and activations, in as few windows of equal length as will do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csae.data.activations import ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.pieces import text_pieces
from csae.data.places import Place
from csae.data.text import TokenWindows
from csae.errors import UserError

MAX_TOKENS = 4000


class Window(NamedTuple):
    """T consecutive tokens. Nothing is carried in from before or out to after."""

    tokens: Tensor  # [T] int64
    acts: Tensor  # [T, d_in]
    mask: Tensor  # [T] bool, True where a position takes part
    pieces: list[str] | None = None  # [T] of the text; those of the tokens by themselves if not given
    target: Tensor | None = None  # [T, d_out], what a transcoder is to predict

    @property
    def wanted(self) -> Tensor:
        """What an SAE, or a transcoder, is to reconstruct."""
        return self.acts if self.target is None else self.target


def read_windows(
    lm: LanguageModel,
    place: int | str | Place,
    text: str,
    n_ctx: int,
    max_tokens: int = MAX_TOKENS,
    begin: Sequence[int] = (),
    keep_first: bool = False,
) -> tuple[list[Window], bool]:
    """The first max_tokens tokens of a text with their activations, in as few windows of up to n_ctx as will do.

    place: a hook point, a layer counted in blocks, or the two hook points of a transcoder. begin: tokens that each
    window begins with beside those of the text (`csae.data.text.beginning`). keep_first: position 0 and outliers take
    part (`csae.data.activations.sink_mask`). Also whether that is all of the text.
    """
    for name, given, least in (("n_ctx", n_ctx, len(begin) + 2), ("max_tokens", max_tokens, 2)):
        if given < least:
            raise UserError(f"{name}: given {given}; needed {least} or more")
    ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole, ids = len(ids) <= max_tokens, ids[:max_tokens]
    if len(ids) < 2:
        raise UserError(f"the text is {len(ids)} tokens long; needed 2 or more: the first one is left out")
    pieces = text_pieces(lm.tokenizer, text, ids)
    windows = []
    at = 0
    for part in torch.tensor(ids).tensor_split(math.ceil(len(ids) / (n_ctx - len(begin)))):
        tokens = torch.cat([torch.tensor(begin, dtype=part.dtype), part])
        special = (torch.arange(len(tokens)) < len(begin))[None]
        one = TokenWindows(tokens[None].int(), torch.zeros_like(tokens[None]).int(), special, tuple(begin))
        batch = ModelActivations(lm, place, one, keep_first=keep_first).read([0])
        of_window = [""] * len(begin) + pieces[at : at + len(part)]
        target = None if batch.target is None else batch.target[0]
        windows.append(Window(tokens, batch.acts[0], batch.mask[0], of_window, target))
        at += len(part)
    return windows, whole
