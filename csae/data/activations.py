"""Windows of activations, from a language model as it runs or from shards on disk, and what is measured on them.

A source is deterministic: the same request gives the same bits, so a resumed training goes on where it was. Training
shuffles windows and keeps each whole: the mask leaves out attention sinks, and document ids mark the boundaries that
nothing looks back across.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from csae.data.language_model import LanguageModel
from csae.data.places import Place as Place
from csae.data.places import described_place, in_words
from csae.data.text import TokenWindows
from csae.errors import UserError, shown

SINK_NORM = 10.0  # in medians of the window's norms; sinks are 30 and more, the rest stays below 3
WINDOWS_AT_ONCE = 16
HASHED_AT_ONCE = 1024


class Batch(NamedTuple):
    """B windows of T positions, all on one device."""

    acts: Tensor  # [B, T, d_in] float32
    mask: Tensor  # [B, T] bool, True where a position takes part
    documents: Tensor  # [B, T] int64: a document is a run of equal ids
    tokens: Tensor | None  # [B, T] int64, where the source knows them
    target: Tensor | None = None  # [B, T, d_out] float32, what a transcoder predicts


class ActivationSource(Protocol):
    """Random access to windows of activations of one place. One with targets has their width as `d_out` as well."""

    n_windows: int
    n_ctx: int

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        ...

    def read(self, window_indices: Sequence[int]) -> Batch:
        """The windows asked for, one or more, in that order. The same request gives the same bits on the same machine.

        Raises UserError where activations are NaN or Inf.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the source is, as JSON: enough to see whether two are the same."""
        ...


def d_out_of(source: ActivationSource) -> int:
    """The width of the targets of a source; without any, that of its activations."""
    return getattr(source, "d_out", source.d_in)


class ActivationSources(Protocol):
    """Random access to windows of activations of one or several places."""

    n_windows: int
    n_ctx: int
    places: tuple[Place, ...]

    def at(self, place: Place) -> ActivationSource:
        """One of the places."""
        ...

    def read_all(self, window_indices: Sequence[int]) -> dict[Place, Batch]:
        """As `ActivationSource.read`, for all places."""
        ...


class OfPlaces(ABC):
    """What sources of one or several places have in common: the one place is read, or one of several is taken."""

    places: tuple[Place, ...]

    @property
    def d_in(self) -> int:
        """The width of the activations. Raises UserError where there are several places."""
        return self._width(self._place().hook)

    @property
    def d_out(self) -> int:
        """The width of a transcoder's target; else d_in. Raises UserError where there are several places."""
        place = self._place()
        return self._width(place.to or place.hook)

    def at(self, place: Place) -> Self:
        """One of the places. Raises UserError where there is no such one."""
        self._check(place)
        one = copy(self)
        one.places = (place,)
        return one

    def read(self, window_indices: Sequence[int]) -> Batch:
        """Windows of the only place, see `ActivationSource`. Raises UserError where there are several places."""
        return self.read_all(window_indices)[self._place()]

    @abstractmethod
    def read_all(self, window_indices: Sequence[int]) -> dict[Place, Batch]:
        """The same windows at each place."""

    @abstractmethod
    def _width(self, hook: str) -> int:
        """Of the activations at a hook point."""

    @abstractmethod
    def _check(self, place: Place) -> None:
        """Raises UserError where a place can't be read."""

    def _place(self) -> Place:
        if len(self.places) != 1:
            there = ", ".join(shown(place) for place in self.places)
            raise UserError(
                f"there are {len(self.places)} places; needed one: name it, or take source.at(place) of {there}"
            )
        return self.places[0]


class ModelActivations(OfPlaces):
    """What is at one or several places of a language model, computed when it is read, from one pass for all of them.

    batch_size: how many windows go through the model at once. What is read lies on the model's device. keep_first:
    position 0 and outliers take part (`sink_mask`). Each place has a mask of its own, as if it were read alone; that of
    a transcoder leaves out what it would leave out of the input, and of the target.
    """

    def __init__(
        self,
        lm: LanguageModel,
        places: int | str | Place | Sequence[int | str | Place],
        token_windows: TokenWindows,
        batch_size: int = 8,
        keep_first: bool = False,
    ) -> None:
        """places: a layer, a name of hook points (`csae.data.hook_points`), a `Place`, or several of these.

        Raises UserError where the model has no such place, a shorter context, or other tokens.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: given {batch_size}; needed 1 or more")
        given = [places] if isinstance(places, (int, str, Place)) else places
        found = [
            lm.hook_points.places(*place) if isinstance(place, Place) else lm.hook_points.places(place)
            for place in given
        ]
        self.places = tuple(dict.fromkeys(place for several in found for place in several))
        if not self.places:
            raise ValueError("places: given none; needed one at least")
        lm.check_tokens(token_windows.tokens)
        self.lm = lm
        self.token_windows = token_windows
        self.batch_size = batch_size
        self.keep_first = keep_first
        self.n_windows, self.n_ctx = token_windows.tokens.shape
        names = dict.fromkeys(name for place in self.places for name in place if name is not None)
        self._points = {name: lm.hook(name) for name in names}
        self._sha256: list[str] = []

    def read_all(self, window_indices: Sequence[int]) -> dict[Place, Batch]:
        """Windows of all places, see `ActivationSource`, from one pass of the model."""
        chosen = torch.as_tensor(window_indices, dtype=torch.int64)
        windows, special = self.token_windows, self.token_windows.special
        special = None if special is None else special[chosen]
        return self._batches(windows.tokens[chosen], windows.documents[chosen], special, chosen)

    def batches(self, tokens: Tensor, documents: Tensor, special: Tensor | None = None) -> dict[Place, Batch]:
        """The same of windows that are given, tokens, documents and special [B, T], as `TokenWindows` has them.

        They are of the same bits as if they were read by their indices. Raises UserError where activations are NaN or
        Inf.
        """
        return self._batches(tokens, documents, special, torch.arange(len(tokens)))

    def _batches(
        self, tokens: Tensor, documents: Tensor, special: Tensor | None, numbers: Tensor
    ) -> dict[Place, Batch]:
        """numbers [B]: of the windows, for messages."""
        tokens = tokens.to(self.lm.device, torch.int64)
        documents = documents.to(self.lm.device, torch.int64)
        names = dict.fromkeys(name for place in self.places for name in place if name is not None)
        points = [self._points[name] for name in names]
        acts = {point.name: tokens.new_empty(*tokens.shape, point.width, dtype=torch.float32) for point in points}
        for start in range(0, len(tokens), self.batch_size):
            part = slice(start, start + self.batch_size)
            for point, read in zip(points, self.lm.read(tokens[part], points), strict=True):
                acts[point.name][part] = read
        masks = {}
        for name in names:
            finite = acts[name].flatten(1).abs().amax(dim=1).isfinite()
            if not finite.all():
                dtype = self.lm.model.dtype
                advice = "its weights may be broken" if dtype == torch.float32 else "load it in float32"
                raise UserError(
                    f"{in_words(name)} of {self.lm.name} gives NaN or Inf in window {int(numbers[~finite.cpu()][0])}, "
                    f"in {dtype}: {advice}"
                )
            masks[name] = sink_mask(acts[name], None, self.keep_first, special=special)
        batches = {}
        for place in self.places:
            if place.to is None:
                batches[place] = Batch(acts[place.hook], masks[place.hook], documents, tokens)
            else:
                mask = masks[place.hook] & masks[place.to]
                batches[place] = Batch(acts[place.hook], mask, documents, tokens, acts[place.to])
        return batches

    def tokens(self, window_indices: Sequence[int]) -> Tensor:
        """The token ids [B, T] of windows, int32, on the CPU; the model doesn't run."""
        return self.token_windows.tokens[torch.as_tensor(window_indices, dtype=torch.int64)]

    def describe(self) -> dict[str, Any]:
        """See `ActivationSource`; of several places, "places" stands for "layer" or "hook"."""
        if not self._sha256:
            windows, digest = self.token_windows, hashlib.sha256()
            for part in (windows.tokens, windows.documents, windows.special):
                if part is not None:
                    for rows in part.split(HASHED_AT_ONCE):  # the windows may be larger than memory
                        digest.update(rows.int().numpy().tobytes())
            self._sha256.append(digest.hexdigest())
        one = len(self.places) == 1
        widths = {"d_in": self.d_in} | ({"d_out": self.d_out} if self._place().to else {}) if one else {}
        about = {
            "model": self.lm.name,
            **(
                described_place(self._place()) if one else {"places": [described_place(place) for place in self.places]}
            ),
            "n_ctx": self.n_ctx,
            "n_windows": self.n_windows,
            **widths,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "windows_sha256": self._sha256[0],
        }
        # Runs older than these options have neither key.
        if self.token_windows.begin:
            about["bos"] = True
        if self.keep_first:
            about["keep_first"] = True
        return about

    def _width(self, hook: str) -> int:
        return self._points[hook].width

    def _check(self, place: Place) -> None:
        if place not in self.places:
            raise UserError(f"place: given {place}; needed one of {', '.join(map(str, self.places))}")


class Begun(NamedTuple):
    """What `follow_mask` keeps of a text, from one part of it to the next; rows are texts."""

    begun: Tensor  # [B] bool: position 0 has come
    usual_norm: Tensor  # [B] float32: the median that norms are compared with; NaN before there is one


def sink_mask(
    acts: Tensor, text: Tensor | None = None, keep_first: bool = False, bos: bool = False, special: Tensor | None = None
) -> Tensor:
    """Which positions take part: acts [B, T, d_in] -> [B, T] bool.

    This is the one rule for padding and attention sinks. A row does not depend on the others of the batch.

    - Padding takes no part: where `text` [B, T], bool or integers, is false, or where all activations are zero.
    - Position 0 takes no part: the first position of the row that is text.
    - Outliers take no part: positions whose norm is more than ten times the median norm of the row's other text.
    - Special tokens take no part: where `special` [B, T] is true. They count in no median, but one can be position 0.
    - A position with NaN or Inf takes part, so that the error is noticed.

    `keep_first`: position 0 and outliers take part, for activations without sinks. With `bos` as well, only outliers
    do, as position 0 is a beginning of sequence.

    Raises ValueError or TypeError where shapes or dtypes are others.
    """
    return follow_mask(acts, None, text, keep_first, bos, special)[0]


@torch.no_grad()
def follow_mask(
    acts: Tensor,
    before: Begun | None = None,
    text: Tensor | None = None,
    keep_first: bool = False,
    bos: bool = False,
    special: Tensor | None = None,
) -> tuple[Tensor, Begun]:
    """`sink_mask` of texts that come in parts: the next T positions, and what their next parts need.

    before: what the call for the part before gave; None for the first part. Norms are compared with the median of the
    first part that has text beside position 0.
    """
    if acts.dim() != 3:
        raise ValueError(f"acts: given shape {list(acts.shape)}; needed [B, T, d_in]")
    B, T, d_in = acts.shape
    is_text = torch.zeros(B, T, dtype=torch.bool, device=acts.device)
    if d_in:
        is_text = acts.abs().amax(dim=-1) != 0  # a sum of squares may round to zero
    for name, marks in (("text", text), ("special", special)):
        if marks is not None and marks.shape != (B, T):
            raise ValueError(f"{name}: given shape {list(marks.shape)}; needed {[B, T]}, as acts")
        if marks is not None and (marks.is_floating_point() or marks.is_complex()):
            raise TypeError(f"{name}: given {marks.dtype}; needed bool or integers")
    if text is not None:
        is_text &= (text != 0).to(acts.device)
    if before is None:
        before = Begun(is_text.new_zeros(B), torch.full([B], math.nan, device=acts.device))
    first = is_text & (is_text.cumsum(dim=1) == 1) & ~before.begun.unsqueeze(1)
    begun = before.begun | is_text.any(dim=1)
    if T == 0:
        return is_text, before
    norms = acts.float().norm(dim=-1)
    finite = norms.isfinite()
    taking_part = is_text if special is None else is_text & (special == 0).to(acts.device)
    counted = norms.where(taking_part & ~first & finite, math.nan)
    usual = before.usual_norm.where(before.usual_norm.isfinite(), counted.nanmedian(dim=1).values)
    if keep_first:
        return taking_part & ~first if bos else taking_part, Begun(begun, usual)
    sink = finite & (norms > SINK_NORM * usual.unsqueeze(1))
    return taking_part & ~first & ~sink, Begun(begun, usual)


def window_order(n_windows: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch goes through the windows: a permutation of 0 to n_windows - 1."""
    return np.random.default_rng([seed, epoch]).permutation(n_windows).tolist()


def held_out(n_windows: int, amount: int | float) -> tuple[range, range]:
    """The windows to train on and those held out: the last ones, a number (int) or a share (float) of them.

    A share is one window at least. The documents were shuffled before they were packed, so the last windows are
    like the others; a document on the border may be in both. Raises UserError where the share is none, or where either
    part would be empty.
    """
    if isinstance(amount, float):
        check_share(amount)
    count = max(1, round(amount * n_windows)) if isinstance(amount, float) else amount
    if not 1 <= count < n_windows:
        raise UserError(
            f"held out: {amount} of {n_windows} windows leaves {max(n_windows - count, 0)} to train on and {count} to "
            "evaluate on; needed at least one each: give more text, or another amount"
        )
    return range(n_windows - count), range(n_windows - count, n_windows)


def check_share(amount: float) -> None:
    """Raises UserError where an amount to hold out is no share of the windows."""
    if not 0 < amount < 1:
        raise UserError(f"--held-out: given {amount}; needed a share of the windows, above 0 and below 1")


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


def __getattr__(name: str) -> Any:
    """What was here in earlier versions."""
    if name == "ShardActivations":
        from csae.data.shard_activations import ShardActivations

        return ShardActivations
    if name == "write_cache":
        from csae.data.cache import write_cache

        return write_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
