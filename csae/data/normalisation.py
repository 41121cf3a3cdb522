"""The mean and the scale of activations, which an SAE is initialised with (`csae.sae.SAE.initialise`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from csae.data.order import window_order
from csae.data.places import Place
from csae.errors import UserError

if TYPE_CHECKING:
    from csae.data.activations import ActivationSource, ActivationSources, Batch

WINDOWS_AT_ONCE = 16


class Normalisation(NamedTuple):
    """(x - mean) / scale has mean squared norm d_in: about one a dimension."""

    mean: Tensor  # [d_in] float32
    scale: float
    target_mean: Tensor | None = None  # [d_out] float32: the same of a transcoder's target
    target_scale: float | None = None


class _Moments:
    """Running sums of positions, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squares, self.count = 0.0, 0

    def add(self, acts: Tensor) -> None:
        """acts: [tokens, d]"""
        acts = acts.double()
        total = acts.sum(dim=0).cpu()
        self.total = total if self.total is None else self.total + total
        self.squares += float(acts.square().sum())
        self.count += len(acts)

    def normalisation(self, windows: str, what: str) -> tuple[Tensor, float]:
        if self.count == 0 or self.total is None:
            raise UserError(f"the mask leaves out every position of {windows}: nothing to train on")
        mean = self.total / self.count
        variance = self.squares / self.count - float(mean.square().sum())  # the mean squared distance from the mean
        # Below this the difference is rounding only.
        if not variance > 1e-12 * self.squares / self.count:
            raise UserError(f"the {what} of {windows} are all the same: nothing to train on")
        return mean.float(), math.sqrt(variance / len(mean))


class Estimate:
    """The normalisation of the first n_windows windows whose mask leaves any position; float64 sums."""

    def __init__(self, n_windows: int = 64) -> None:
        self.n_windows, self.read, self.with_text = n_windows, 0, 0
        self._acts, self._target = _Moments(), _Moments()

    def add(self, batch: Batch) -> None:
        """More windows; those that are not needed any more are left out."""
        counts = self.with_text + batch.mask.any(dim=1).cumsum(dim=0)
        rows = int((counts <= self.n_windows).sum()) if self.with_text < self.n_windows else 0
        if rows == 0:
            return
        self.read, self.with_text = self.read + rows, int(counts[rows - 1])
        mask = batch.mask[:rows]
        self._acts.add(batch.acts[:rows][mask])
        if batch.target is not None:
            self._target.add(batch.target[:rows][mask])

    def result(self) -> Normalisation:
        """Raises UserError where all positions were masked out or all activations, or targets, are the same."""
        windows = f"the {self.read} windows read"
        mean, scale = self._acts.normalisation(windows, "activations")
        target = self._target.normalisation(windows, "targets") if self._target.count else (None, None)
        return Normalisation(mean, scale, *target)


def estimate_normalisation(
    source: ActivationSource, windows: Sequence[int] | None = None, n_windows: int = 64, seed: int = 0
) -> Normalisation:
    """Mean and scale of the positions under the mask, over n_windows windows drawn from `windows` (by default all).

    Windows whose mask leaves out everything don't count. Raises UserError as `Estimate.result`.
    """
    estimate, windows = Estimate(n_windows), range(source.n_windows) if windows is None else windows
    for part in _drawn(windows, [estimate], seed):
        estimate.add(source.read(part))
    return estimate.result()


def estimate_normalisations(
    source: ActivationSources, windows: Sequence[int] | None = None, n_windows: int = 64, seed: int = 0
) -> dict[Place, Normalisation]:
    """`estimate_normalisation` of each place, each window read once for all of them."""
    estimates = {place: Estimate(n_windows) for place in source.places}
    windows = range(source.n_windows) if windows is None else windows
    for part in _drawn(windows, list(estimates.values()), seed):
        for place, batch in source.read_all(part).items():
            estimates[place].add(batch)
    return {place: estimate.result() for place, estimate in estimates.items()}


def _drawn(windows: Sequence[int], estimates: Sequence[Estimate], seed: int) -> Iterator[list[int]]:
    """Windows in a random order, a few at a time, until all estimates have enough."""
    order = [windows[i] for i in window_order(len(windows), seed, 0)]
    while order and (missing := max(estimate.n_windows - estimate.with_text for estimate in estimates)) > 0:
        at_once = min(WINDOWS_AT_ONCE, missing)
        yield order[:at_once]
        order = order[at_once:]
