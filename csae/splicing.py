"""An SAE inside a language model: its reconstruction, or an edit of its features, in place of the residual stream.

    with csae.splice(model, layer, sae, [Edit(1207, scale=0)]) as spliced:
        model.generate(...)

In generation the model sees one token at a time; a contextual SAE follows it on a streaming state, with the same
codes as if it had seen the whole text at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csae.activations import SINK_NORM, sink_mask
from csae.contextual_sae import ContextualSAE
from csae.language_model import LanguageModel, find_blocks, replacing_hook
from csae.recurrence import State, advance, carried_by, initial_state
from csae.sae import SAE, Code, Output

PARTS = ("new", "carried", "both")


@dataclass(frozen=True)
class Edit:
    """What is done to a feature. Give `scale` or `set`; scale=0 ablates it.

    The codes stay as they are: an edit changes what is put into the model, not what the SAE sees.
    """

    feature: int
    part: str = "both"
    """"new": where the feature is in the code. "carried": its part of c, from all earlier positions. "both"."""
    scale: float | None = None
    """multiplies it"""
    set: float | None = None
    """how active it is, in units of normalised activations, at every position; carried: as every head finds it"""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part: given {self.part!r}; needed one of {', '.join(map(repr, PARTS))}")
        if (self.scale is None) == (self.set is None):
            raise ValueError(f"scale, set: given {self.scale} and {self.set}; needed one of them")
        number = self.set if self.scale is None else self.scale
        if number is None or not math.isfinite(number):
            raise ValueError(f"scale, set: given {number}; needed a finite number")

    def delta(self, active: Tensor) -> Tensor:
        """How much more active the feature is to be, where it is as active as given."""
        wanted = active * self.scale if self.scale is not None else torch.full_like(active, self.set or 0.0)
        return wanted - active


class Spliced:
    """What an SAE makes of the text that goes through the model: the hook, and its state."""

    output: Output | None = None
    """of the last pass through the model, before edits: [B, T, ...], in generation T = 1"""
    mask: Tensor | None = None
    """[B, T] bool: the positions of the last pass where the SAE's output was put in"""

    def __init__(self, sae: SAE, edits: Sequence[Edit], keep_error: bool, look_back: int | None) -> None:
        self.sae, self.edits, self.keep_error, self.look_back = sae, edits, keep_error, look_back
        features = torch.tensor([edit.feature for edit in edits], dtype=torch.int64, device=sae.W_dec.device)
        self._features = features
        self._directions = sae.W_dec.detach()[features]  # [m, d_in]
        self._carried_directions = carried_by(sae, features) if isinstance(sae, ContextualSAE) else None
        self._state: State | None = None
        self._usual_norm: Tensor | None = None  # [B], of the first pass over a text
        self._visible: Tensor | None = None

    def begin(self, attention_mask: Tensor | None, continued: bool) -> None:
        """Called before each pass through the model. continued: with the keys and values of an earlier pass."""
        self._visible = attention_mask
        if not continued:
            self._state = self._usual_norm = None

    @torch.no_grad()
    def replace(self, given: Tensor) -> Tensor:
        """The residual stream [B, T, d_in] -> what is put in its place."""
        sae, acts = self.sae, given.to(self.sae.W_dec)
        self.mask = mask = self._mask(acts)
        carried = None
        if isinstance(sae, ContextualSAE):
            if self._state is None:
                room = self.look_back or max(256, acts.shape[1])
                self._state = initial_state(sae, len(acts), room, self.look_back is not None, self._features)
            if len(acts) != self._state.memory.shape[0]:
                raise ValueError(
                    f"the batch changed from {self._state.memory.shape[0]} to {len(acts)} sequences inside a text; "
                    "needed the same ones: generate without beams"
                )
            x_hat, code, c, carried, self._state = advance(sae, acts / sae.scale, self._state, mask, None)
            self.output = Output(x_hat * sae.scale, Code(*code), c * sae.scale)
        else:
            self.output = sae(acts, mask)
        base = acts if self.keep_error else self.output.x_hat
        replaced = (base + self._edited(self.output.code, carried) * sae.scale).to(given)
        return torch.where(mask.unsqueeze(-1), replaced, given)

    def _edited(self, code: Code, carried: Tensor | None) -> Tensor:
        """What the edits add to the reconstruction, [B, T, d_in], in normalised units."""
        added = torch.zeros(*code.values.shape[:-1], self.sae.d_in).to(code.values)
        for number, edit in enumerate(self.edits):
            if edit.part != "carried":
                active = torch.where(code.indices == edit.feature, code.values, 0).sum(dim=-1)  # [B, T]
                added += edit.delta(active).unsqueeze(-1) * self._directions[number]
            if edit.part != "new" and carried is not None and self._carried_directions is not None:
                change = edit.delta(carried[..., number])  # [B, T, n_heads]
                added += change @ self._carried_directions[:, number]
        return added

    def _mask(self, acts: Tensor) -> Tensor:
        """[B, T] bool: what takes part. Not padding, nor what `sink_mask` leaves out of a window."""
        norms = acts.norm(dim=-1)
        if self._usual_norm is None:
            self._usual_norm = norms[:, 1:].median(dim=1).values if acts.shape[1] > 1 else norms[:, 0]
            mask = sink_mask(acts)
        else:
            mask = norms <= SINK_NORM * self._usual_norm.unsqueeze(1)
        if self._visible is not None:
            mask = mask & self._visible[:, -acts.shape[1] :].to(mask)
        return mask


@contextmanager
def splice(
    model: Any,
    layer: int,
    sae: SAE,
    edits: Sequence[Edit] = (),
    keep_error: bool = False,
    look_back: int | None = None,
) -> Iterator[Spliced]:
    """Put an SAE's reconstruction in the place of a language model's residual stream, while the context lasts.

    Forward passes over whole texts and `generate` work, with the model's own cache; a contextual SAE runs in its
    exact form. Position 0, attention sinks and padding stay as they are, as in training (`csae.activations.sink_mask`;
    with a cache, norms are compared with those of the first pass). No gradient goes through the SAE.

    Args:
        model: a causal language model of transformers, or a `LanguageModel`.
        layer: the residual stream after this many blocks, from 1.
        sae: of the width of that stream.
        edits: what to do to features.
        keep_error: add what the SAE misses, so that without edits the model's output stays what it was.
        look_back: how many positions a contextual SAE remembers; all if not given.

    Yields a `Spliced`, whose `output` is what the SAE made of the last pass.

    Raises ValueError where the layer, the width or an edit does not fit, and where the batch changes inside a text.
    """
    model = model.model if isinstance(model, LanguageModel) else model
    config = model.config.get_text_config()
    if not 1 <= layer <= config.num_hidden_layers:
        raise ValueError(f"layer: given {layer}; needed 1 to {config.num_hidden_layers}")
    if config.hidden_size != sae.d_in:
        raise ValueError(f"sae: {sae.d_in} wide; needed {config.hidden_size}, as wide as the model")
    if look_back is not None and look_back < 1:
        raise ValueError(f"look_back: given {look_back}; needed at least 1")
    for edit in edits:
        if not 0 <= edit.feature < sae.d_sae:
            raise ValueError(f"edits: feature {edit.feature}; needed 0 to {sae.d_sae - 1}")
        if edit.part == "carried" and not isinstance(sae, ContextualSAE):
            raise ValueError("edits: part 'carried' with a per-token SAE; it carries nothing: needed 'new' or 'both'")
    spliced = Spliced(sae, edits, keep_error, look_back)
    block = find_blocks(model, config.num_hidden_layers, type(model).__name__)[layer - 1]

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        spliced.begin(kwargs.get("attention_mask"), cache is not None and cache.get_seq_length() > 0)

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(replacing_hook(spliced.replace)),
    ]
    was_training = sae.training
    sae.eval()
    try:
        yield spliced
    finally:
        sae.train(was_training)
        for handle in handles:
            handle.remove()
