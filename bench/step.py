"""Shared by training steps: float32 copies of the data's weights, and the direction of the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from csae.config import LOOK_BACK_LR

from .data import Built

LR = 1e-3
SLOWER = LR * LOOK_BACK_LR  # the look-back's


def direction(move: Tensor) -> Tensor:
    """Which way each weight moved: 1 or -1; in between where it moved by less than a tenth of the learning rate.

    The first step of Adam is the sign of the gradient, unless the gradient is as small as eps. So the scale of the loss
    doesn't matter. The peers' losses differ from ours by a factor, and their first steps have the same direction.
    """
    return (move * (10 / LR)).clamp(-1, 1)


class Step:
    """A step's parameters, and the direction of its first step, by which steps are compared.

    start: the data's weights by name. transposed: names of the weights that an implementation keeps transposed.
    """

    def __init__(self, start: dict[str, Tensor], transposed: tuple[str, ...] = ()) -> None:
        self.start, self.transposed = start, transposed
        self.parameters: list[Tensor] = []

    def own(self) -> list[Tensor]:
        """New parameters with the data's weights."""
        self.parameters = [tensor.float().clone().requires_grad_() for tensor in self.start.values()]
        return self.parameters

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Use a module's parameters, given by our names, and fill them with the data's weights."""
        self.parameters = [parameters[name] for name in self.start]
        with torch.no_grad():
            for name, parameter in zip(self.start, self.parameters, strict=True):
                parameter.copy_(self.start[name].T if name in self.transposed else self.start[name])

    def built(self, run: Callable[[], object]) -> Built:
        def outputs() -> dict[str, Tensor]:
            run()
            found = {}
            for (name, before), after in zip(self.start.items(), self.parameters, strict=True):
                found[name] = direction((after.T if name in self.transposed else after).detach() - before)
            return found

        return Built(run, outputs, self.parameters)
