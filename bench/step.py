"""What training steps share: float32 weights that begin as the data's, and which way the first step moves them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .data import Built

LR = 1e-3


def direction(move: Tensor) -> Tensor:
    """Which way each weight moved: 1 or -1, or between where it moved by less than a tenth of the learning rate.

    The first step of Adam is the sign of the gradient, whatever the scale of the loss, but where the gradient is about
    as small as eps. So the steps of losses that are multiples of each other, as those of the peers are, have one
    direction.
    """
    return (move * (10 / LR)).clamp(-1, 1)


class Step:
    """A step's parameters, and the direction of the first step, which is what is compared.

    start: the weights by name, as the data has them. transposed: those that an implementation keeps the other way.
    """

    def __init__(self, start: dict[str, Tensor], transposed: tuple[str, ...] = ()) -> None:
        self.start, self.transposed = start, transposed
        self.parameters: list[Tensor] = []

    def own(self) -> list[Tensor]:
        """New parameters."""
        self.parameters = [tensor.float().clone().requires_grad_() for tensor in self.start.values()]
        return self.parameters

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Take a module's parameters, by our names, and give them the data's weights."""
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
