"""A stream of windows in random order, as far as a buffer reaches."""

from __future__ import annotations

import numpy as np

from csae.data.packing import Text


class WindowBuffer:
    """Holds `size` windows of T tokens. Each that comes in takes the place of one drawn at random, which goes out."""

    def __init__(self, size: int, n_ctx: int, seed: int) -> None:
        self.size = max(1, size)
        self.held = 0
        self.windows = Text.empty(self.size, n_ctx)
        self.generator = np.random.default_rng(seed)

    @property
    def is_full(self) -> bool:
        return self.held == self.size

    def fill(self, windows: Text) -> int:
        """Take in the first of windows [N, T] while it is not full; gives how many."""
        n = min(len(windows.tokens), self.size - self.held)
        for held, part in zip(self.windows, windows, strict=True):
            held[self.held : self.held + n] = part[:n]
        self.held += n
        return n

    def stop_filling(self) -> None:
        """Let those that it holds be all: there are no others."""
        self.size = self.held

    def swap(self, window: Text, out: Text, row: int) -> None:
        """Put a window drawn at random in a row of `out`, and the one given in its place."""
        at = int(self.generator.integers(self.size))
        for target, held in zip(out, self.windows, strict=True):
            target[row] = held[at]
        for held, part in zip(self.windows, window, strict=True):
            held[at] = part
