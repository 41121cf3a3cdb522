"""The batches of training, in an order that is the same however often it is stopped and goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from csae.config import TrainConfig
from csae.data.activations import ActivationSource, Batch, Place, window_order
from csae.data.share import Share, filled
from csae.errors import UserError

SOMEWHERE = Place("activations")
"""the place of a source that has one and does not name it"""
AHEAD = 4  # batches: a source on the disk is told so long before what will be read


class Step(NamedTuple):
    """What a step of training gets, of one forward pass."""

    batches: dict[Place, Batch]
    """the same windows at each place; none where the source waits for data: then it is no step, and the next may be"""
    state: dict[str, Tensor] | None
    """of the source after this batch, for the checkpoint; None where the step's number says it all. What is no tensor
    goes in as JSON in uint8 bytes"""
    where: str
    """which windows these are, for messages"""
    padding: int = 0
    """how many windows at the end of each batch only fill it up (`csae.data.share`): out of the mask, and trained on by
    nobody"""


class Batches(Protocol):
    """Batches of training in an exact order."""

    @property
    def n_ctx(self) -> int:
        """Positions a window."""
        ...

    @property
    def n_windows(self) -> int | None:
        """Windows to train on, each once an epoch; None where they don't end, or where it isn't known."""
        ...

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the SAEs read."""
        ...

    def start(self, step: int, state: dict[str, Tensor] | None) -> Iterator[Step]:
        """The steps that follow after `step` of them. state: that of the last of those; None where step is 0.

        The same request gives the same bits. Raises UserError where activations are NaN or Inf, or the source fails.
        """
        ...

    def describe(self, place: Place) -> dict[str, Any]:
        """What is read at a place, as JSON: what a run there keeps in run.json, and compares when it goes on."""
        ...


class IndexedBatches:
    """Windows of a source with random access: each epoch takes all of them in an order of its own, by the seed.

    source: of one place or of several (`csae.data.activations`). windows: those to train on. config: batch_windows and
    seed. share: the rank and the number of ranks (`csae.data.share`); only this rank's windows are read. An incomplete
    last batch of an epoch is left out. Raises UserError where there are fewer windows than a batch.
    """

    def __init__(
        self,
        source: ActivationSource,
        windows: Sequence[int],
        config: TrainConfig,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if len(windows) < config.batch_windows:
            raise UserError(
                f"batch_windows: given {config.batch_windows}, but there are {len(windows)} windows to train on; "
                f"needed as many: give more text, or a smaller batch"
            )
        self.source, self.windows, self.config, self.share = source, windows, config, Share(*share)
        self.n_ctx, self.n_windows = source.n_ctx, len(windows)
        self.places: tuple[Place, ...] = getattr(source, "places", (SOMEWHERE,))

    def start(self, step: int, state: dict[str, Tensor] | None = None) -> Iterator[Step]:
        of_epoch = len(self.windows) // self.config.batch_windows
        prefetch = getattr(self.source, "prefetch", lambda windows: None)
        for epoch in itertools.count(step // of_epoch):
            order = window_order(len(self.windows), self.config.seed, epoch)
            for place in range(step - epoch * of_epoch, of_epoch):
                prefetch(self._own(_chosen(self.windows, order, place + AHEAD, self.config)))
                chosen = _chosen(self.windows, order, place, self.config)
                own = self._own(chosen)
                where = f"windows {', '.join(map(str, own[:8]))}{', ...' if len(own) > 8 else ''}"
                n, padding = self.share.windows(len(chosen)), self.share.padding(len(chosen))
                batches = {at: filled(batch, n - padding, n) for at, batch in self._read(own).items()}
                yield Step(batches, None, where, padding)
            step = (epoch + 1) * of_epoch

    def describe(self, place: Place) -> dict[str, Any]:
        return self.source.describe() if len(self.places) == 1 else self.source.at(place).describe()  # type: ignore[attr-defined]

    def _own(self, windows: Sequence[int]) -> Sequence[int]:
        """Those of a batch's windows that this rank reads."""
        return [windows[at] for at in self.share.to_read(len(windows))] if windows else windows

    def _read(self, windows: Sequence[int]) -> dict[Place, Batch]:
        if len(self.places) == 1:
            return {self.places[0]: self.source.read(windows)}
        return self.source.read_all(windows)  # type: ignore[attr-defined]


def batch_of(windows: Sequence[int], step: int, config: TrainConfig) -> list[int]:
    """The windows of a step. Each epoch takes all of them in its own order, and drops an incomplete last batch."""
    epoch, place = divmod(step, len(windows) // config.batch_windows)
    return _chosen(windows, window_order(len(windows), config.seed, epoch), place, config)


def _chosen(windows: Sequence[int], order: list[int], place: int, config: TrainConfig) -> list[int]:
    """Batch number `place` of an epoch with this order."""
    start = place * config.batch_windows
    return [windows[at] for at in order[start : start + config.batch_windows]]
