"""Memory for large tensors that are made again and again.

The C library gives large blocks back to the system, and each page of the next one costs a fault: up to as much as
reading a batch of saved activations.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

KEPT = 4  # tensors that nobody uses


class Reused:
    """Makes tensors. When nobody uses one of them any more, nor a view of it, one of the same size gets its memory."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def empty(self, *shape: int) -> Tensor:
        """A tensor float32 of this shape, on the CPU, as `torch.empty`."""
        size = math.prod(shape)
        self._free = [memory for memory in self._free if memory.numel() == size][-KEPT:]
        memory = self._free.pop() if self._free else torch.empty(size)
        lent = memory.numpy()  # an array of its own: torch keeps it alive as long as the storage that is made of it
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return torch.from_numpy(lent).view(shape)

    def _take_back(self, memory: Tensor) -> None:
        self._free.append(memory)
