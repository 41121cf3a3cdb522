"""The share of each batch that one of several ranks reads: as many windows on each, the last ones filled up."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from csae.data.activations import Batch


class Share(NamedTuple):
    """Rank `rank` of `size` reads ceil(n / size) windows of n, in their order: rank 0 the first ones, and so on."""

    rank: int = 0
    size: int = 1

    def of(self, n: int) -> range:
        """Which of n windows are this rank's. None where the ranks before have them all."""
        each = self.windows(n)
        return range(min(self.rank * each, n), min((self.rank + 1) * each, n))

    def windows(self, n: int) -> int:
        """How many windows each rank has of n, those that fill it up included."""
        return -(-n // self.size)

    def to_read(self, n: int) -> range:
        """Those that are read: this rank's, or where it has none one of another's, for the shapes and dtypes."""
        return self.of(n) or range(1)

    def padding(self, n: int) -> int:
        """How many of this rank's windows only fill it up."""
        return self.windows(n) - len(self.of(n))


def filled(batch: Batch, own: int, windows: int) -> Batch:
    """The first `own` windows of a batch, and windows of zeros after them; those are out of the mask."""
    if own == windows == len(batch.acts):
        return batch

    def of(tensor: Tensor) -> Tensor:
        full = tensor.new_zeros(windows, *tensor.shape[1:])
        full[:own] = tensor[:own]
        return full

    return Batch(*(None if tensor is None else of(tensor) for tensor in batch))  # type: ignore[arg-type]
