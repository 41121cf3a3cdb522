"""What reconstructions do to the language model: its next-token loss with them in place of its activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from csae.contextual_sae import ContextualSAE
from csae.data.activations import Batch
from csae.data.language_model import LanguageModel
from csae.data.places import Place
from csae.errors import UserError
from csae.reconstruction import run_form
from csae.sae import SAE


class BatchLosses:
    """The losses of the language model on one batch; those of the model alone are made once for all SAEs."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._clean: Tensor | None = None
        self._zero: dict[Any, Tensor] = {}

    def clean(self, batch: Batch) -> Tensor:
        """Of the model as it is: [B, T - 1]."""
        if self._clean is None:
            self._clean = self.lm.cross_entropy(_tokens(batch))
        return self._clean

    def zero(self, batch: Batch, place: Place, key: Any) -> Tensor:
        """With zeros at a place: [B, T - 1]. key: of the place and the batch's mask."""
        if key not in self._zero:

            def zeros(acts: Tensor) -> Tensor:
                width = self.lm.hook(place.to or place.hook).width
                return acts.new_zeros(*acts.shape[:-1], width)

            self._zero[key] = self.lm.cross_entropy(_tokens(batch), place.hook, zeros, batch.mask, place.to)
        return self._zero[key]

    def reconstructed(self, batch: Batch, place: Place, sae: SAE, exact: bool) -> Tensor:
        """With the reconstruction of an SAE at a place: [B, T - 1]."""

        def reconstruct(acts: Tensor) -> Tensor:
            return run_form(sae, acts.to(sae.W_dec), batch.mask, batch.documents, exact).x_hat.to(acts)

        return self.lm.cross_entropy(_tokens(batch), place.hook, reconstruct, batch.mask, place.to)


class CrossEntropies:
    """Of one SAE: the sums over batches, and the figures that they give."""

    def __init__(self, sae: SAE, place: Place) -> None:
        self.sae, self.place = sae, place
        self.contextual = isinstance(sae, ContextualSAE)
        names = ["ce_clean", "ce_zero", "ce_sae"] + (["ce_sae_sweeps"] if self.contextual else [])
        self.sums = dict.fromkeys(names, 0.0)
        self.tokens = 0

    def add(self, batch: Batch, losses: BatchLosses, key: Any) -> None:
        """key: see `BatchLosses.zero`."""
        counted = batch.mask[:, :-1].to(losses.lm.device)  # position t is counted by its loss on token t + 1
        self.tokens += int(counted.sum())
        found = {
            "ce_clean": losses.clean(batch),
            "ce_zero": losses.zero(batch, self.place, key),
            "ce_sae": losses.reconstructed(batch, self.place, self.sae, exact=True),
        }
        if self.contextual:
            found["ce_sae_sweeps"] = losses.reconstructed(batch, self.place, self.sae, exact=False)
        for name, of in found.items():
            self.sums[name] += float(of[counted].double().sum())

    def summed(self) -> tuple[int, dict[str, float]]:
        """What other ranks need of it."""
        return self.tokens, self.sums

    @classmethod
    def of_ranks(cls, sae: SAE, place: Place, parts: Sequence[tuple[int, dict[str, float]]]) -> CrossEntropies:
        """What one process would have of the batches of all of them, but for rounding of float64."""
        whole = cls(sae, place)
        for tokens, sums in parts:
            whole.tokens += tokens
            for name, of in sums.items():
                whole.sums[name] += of
        return whole

    def figures(self, lm: LanguageModel, n_windows: int) -> dict[str, Any]:
        """See `csae.evaluate.evaluate`. Raises UserError where a figure is not finite, or there is no position."""
        if self.tokens == 0:
            raise UserError(f"the mask leaves out every position of the {n_windows} windows for the cross-entropy")
        result: dict[str, Any] = {"ce_tokens": self.tokens}
        result |= {name: total / self.tokens for name, total in self.sums.items()}
        for name in self.sums:
            if not math.isfinite(result[name]):
                raise UserError(
                    f"{name} is {result[name]}: the language model overflows in {lm.model.dtype}: use float32"
                )
        harm = result["ce_zero"] - result["ce_clean"]
        for form in ["", "_sweeps"] if self.contextual else [""]:
            result["loss_recovered" + form] = (result["ce_zero"] - result["ce_sae" + form]) / harm if harm > 0 else None
        return result


def _tokens(batch: Batch) -> Tensor:
    if batch.tokens is None:
        raise UserError("the activations come without token ids, which the cross-entropy needs: cache them anew")
    return batch.tokens
