"""Windows of activations, from a language model as it runs or from shards on disk.

A source is deterministic: the same request gives the same bits, so a resumed training goes on where it was. Training
shuffles windows and keeps each whole: the mask leaves out attention sinks, and document ids mark the boundaries that
nothing looks back across.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from operator import index
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from csae.data.language_model import LanguageModel
from csae.data.masks import Begun, follow_mask, sink_mask
from csae.data.normalisation import Estimate, Normalisation, estimate_normalisation, estimate_normalisations
from csae.data.order import check_share, held_out, window_order
from csae.data.places import Place, described_place, in_words
from csae.data.text import TokenWindows
from csae.errors import UserError, shown

# What is in files of its own can be imported from here as well.
__all__ = [
    "ActivationSource",
    "ActivationSources",
    "Batch",
    "Begun",
    "Estimate",
    "ModelActivations",
    "Normalisation",
    "OfPlaces",
    "Place",
    "check_share",
    "d_out_of",
    "estimate_normalisation",
    "estimate_normalisations",
    "follow_mask",
    "held_out",
    "sink_mask",
    "window_order",
]
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
        _check_windows(token_windows)
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
        chosen = self._chosen(window_indices)
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
        return self.token_windows.tokens[self._chosen(window_indices)]

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

    def _chosen(self, window_indices: Sequence[int]) -> Tensor:
        """Raises TypeError where they are no whole numbers, IndexError where there are no such windows."""
        chosen = [index(window) for window in window_indices]
        for window in chosen:
            if not 0 <= window < self.n_windows:
                raise IndexError(f"window: given {window}; needed 0 to {self.n_windows - 1}")
        return torch.tensor(chosen, dtype=torch.int64)

    def _width(self, hook: str) -> int:
        return self._points[hook].width

    def _check(self, place: Place) -> None:
        if place not in self.places:
            raise UserError(f"place: given {place}; needed one of {', '.join(map(str, self.places))}")


def _check_windows(windows: TokenWindows) -> None:
    """Raises ValueError or TypeError where the parts of windows don't fit each other."""
    if windows.tokens.dim() != 2:
        raise ValueError(f"token_windows: tokens are {list(windows.tokens.shape)}; needed [N, T]")
    for name in ("tokens", "documents", "special"):
        part = getattr(windows, name)
        if part is None:
            continue
        if part.shape != windows.tokens.shape:
            raise ValueError(
                f"token_windows: {name} are {list(part.shape)}; needed {list(windows.tokens.shape)}, as tokens"
            )
        if part.is_floating_point() or part.is_complex():
            raise TypeError(f"token_windows: {name} are {part.dtype}; needed integers")


def __getattr__(name: str) -> Any:
    """What was here in earlier versions."""
    if name == "ShardActivations":
        from csae.data.shard_activations import ShardActivations

        return ShardActivations
    if name == "write_cache":
        from csae.data.cache import write_cache

        return write_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
