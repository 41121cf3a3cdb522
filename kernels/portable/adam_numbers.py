"""The numbers of a step of Adam, made on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_numbers(constants: Tensor, step: Tensor, lr: Tensor | None, lr_number: float) -> tuple[Tensor, Tensor]:
    """constants [3, 6] float64, step and lr scalars -> hyper [6] float32, and seed [1] int64, for `adam_rows`.

    hyper[i] = factor_i (1 - base_i^step)^power_i, the first also times lr, which is `lr_number` where lr is None.
    """
    factors, bases, powers = constants
    hyper = (1 - torch.pow(bases, step)).pow_(powers).mul_(factors)
    hyper[:1].mul_(lr_number if lr is None else lr)
    return hyper.float(), step.to(torch.int64).reshape(1)
