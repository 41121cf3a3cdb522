"""What is done to a feature of an SAE inside a language model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
