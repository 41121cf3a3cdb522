"""Activations that were saved in a folder of shards (`csae.data.shards`), read to the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csae.data.activations import ActivationSource, Batch, Place, sink_mask
from csae.data.hook_points import described_place, name_of_layer
from csae.data.shards import ShardReader, read_places
from csae.errors import UserError, shown
from csae.trained_on import RESIDUAL

ANYWHERE = "activations"
"""the hook point of shards that don't say of which they are"""


class ShardActivations:
    """Activations in a folder of shards, of one hook point or of several.

    A file without `documents` has one document a window. A file without `mask` gets that of sink_mask, with keep_first
    as given, or as activations.json says. Of a stored mask, positions whose activations are all zero are left out.

    places: the hook points that the folder holds; any pair of them is also that of a transcoder. d_in, d_out and `read`
    are there where it holds one.
    """

    def __init__(self, folder: str | Path, keep_first: bool = False) -> None:
        """Raises UserError where the folder or a file in it is not as the format wants it."""
        self.folder = Path(folder)
        inside = read_places(folder)
        if not inside:
            one = _OnePlace(self.folder, keep_first)
            self._sources = {Place(one.hook): one}
        else:
            self._sources = {Place(hook): _OnePlace(self.folder / name, keep_first) for hook, name in inside.items()}
        self.places = tuple(self._sources)
        first = next(iter(self._sources.values()))
        self.n_windows, self.n_ctx, self.keep_first = first.n_windows, first.n_ctx, first.keep_first
        for one in self._sources.values():
            same = one.about.get("windows_sha256") == first.about.get("windows_sha256")
            if (one.n_windows, one.n_ctx) != (first.n_windows, first.n_ctx) or not same:
                raise UserError(
                    f"activations {str(folder)!r}: {one.folder.name} and {first.folder.name} hold other windows; the "
                    "command that wrote them goes on where it was cut short, or copy the folder again"
                )

    @property
    def d_in(self) -> int:
        return self._only().d_in

    @property
    def d_out(self) -> int:
        return self._only().d_in

    def at(self, place: Place) -> ActivationSource:
        """What a hook point of the folder holds, or a pair of them for a transcoder. Raises UserError for others."""
        for hook in (place.hook, *([] if place.to is None else [place.to])):
            if Place(hook) not in self._sources:
                there = ", ".join(shown(each.hook) for each in self.places)
                raise UserError(
                    f"activations {str(self.folder)!r} hold {there}; not {shown(hook)}: give another folder"
                )
        if place.to is None:
            return self._sources[place]
        return _Pair(self._sources[Place(place.hook)], self._sources[Place(place.to)], place)

    def read(self, window_indices: Sequence[int]) -> Batch:
        return self._only().read(window_indices)

    def read_all(self, window_indices: Sequence[int]) -> dict[Place, Batch]:
        """The same windows at each place."""
        return {place: source.read(window_indices) for place, source in self._sources.items()}

    def prefetch(self, window_indices: Sequence[int]) -> None:
        """Has the system read windows that are needed soon, and doesn't wait for them."""
        for source in self._sources.values():
            source.prefetch(window_indices)

    def tokens(self, window_indices: Sequence[int]) -> Tensor | None:
        """The token ids [B, T] of windows; None where not all files hold them."""
        return next(iter(self._sources.values())).tokens(window_indices)

    def describe(self) -> dict[str, Any]:
        if len(self._sources) == 1:
            return self._only().describe()
        about = next(iter(self._sources.values())).describe()
        for name in ("layer", "hook", "d_in"):
            about.pop(name, None)
        return about | {"places": [described_place(place) for place in self.places], "folder": str(self.folder)}

    def _only(self) -> _OnePlace:
        if len(self._sources) > 1:
            there = ", ".join(shown(place.hook) for place in self.places)
            raise UserError(f"activations {str(self.folder)!r} hold {there}; needed one: name it, or give its folder")
        return next(iter(self._sources.values()))


class _OnePlace:
    """A folder of shards: an ActivationSource."""

    def __init__(self, folder: Path, keep_first: bool) -> None:
        self._reader = ShardReader(folder)
        self.about = self._reader.about
        kept = self.about.get("keep_first") is True
        if keep_first and self._reader.has_mask and not kept:
            raise UserError(
                f"--keep-first: {str(folder)!r} was written with masks that leave position 0 and outliers out; needed "
                "activations without masks, or cached with --keep-first"
            )
        self.keep_first = keep_first or kept
        self.folder = folder
        self.n_windows, self.n_ctx, self.d_in = self._reader.n_windows, self._reader.n_ctx, self._reader.d_in
        self.d_out = self.d_in

    @property
    def hook(self) -> str:
        hook, layer = self.about.get("hook"), self.about.get("layer")
        if isinstance(hook, str) and hook != RESIDUAL:
            return hook
        return name_of_layer(layer) if isinstance(layer, int) and layer >= 1 else ANYWHERE

    def read(self, window_indices: Sequence[int]) -> Batch:
        indices = [int(window) for window in window_indices]
        windows = [self._reader.read(window) for window in indices]  # nothing is read from the disk yet
        acts = torch.empty(len(windows), self.n_ctx, self.d_in)
        self._reader.prefetch(indices)
        for row in sorted(range(len(indices)), key=indices.__getitem__):
            acts[row] = windows[row].activations
        largest = acts.abs().amax(dim=-1)  # NaN where there is one
        finite = largest.isfinite().all(dim=1)
        if not finite.all():
            where = self._reader.where(indices[int(finite.long().argmin())])
            raise UserError(
                f"{where}: NaN or Inf in the activations; write it again (float16 ends at 65504, bfloat16 far above)"
            )
        mask = largest != 0
        without = [row for row, window in enumerate(windows) if window.mask is None]
        if without:
            mask[without] = sink_mask(acts[without], keep_first=self.keep_first)
        documents = torch.zeros(mask.shape, dtype=torch.int64)
        tokens = torch.empty(mask.shape, dtype=torch.int64) if self._reader.has_tokens else None
        for row, window in enumerate(windows):
            if window.mask is not None:
                mask[row] &= window.mask.bool()
            if window.documents is not None:
                documents[row] = window.documents
            if tokens is not None and window.tokens is not None:
                tokens[row] = window.tokens
        return Batch(acts, mask, documents, tokens)

    def prefetch(self, window_indices: Sequence[int]) -> None:
        self._reader.prefetch([int(window) for window in window_indices])

    def tokens(self, window_indices: Sequence[int]) -> Tensor | None:
        if not self._reader.has_tokens:
            return None
        return torch.stack([self._reader.tokens(int(window)) for window in window_indices])

    def describe(self) -> dict[str, Any]:
        return {
            **self.about,
            "folder": str(self.folder),
            "n_ctx": self.n_ctx,
            "n_windows": self.n_windows,
            "d_in": self.d_in,
            "dtype": str(self._reader.dtype).removeprefix("torch."),
            **({"keep_first": True} if self.keep_first else {}),
        }


class _Pair:
    """What a transcoder reads and what it predicts: an ActivationSource with a target."""

    def __init__(self, given: _OnePlace, wanted: _OnePlace, place: Place) -> None:
        self._given, self._wanted, self._place = given, wanted, place
        self.n_windows, self.n_ctx, self.d_in, self.d_out = given.n_windows, given.n_ctx, given.d_in, wanted.d_in

    def read(self, window_indices: Sequence[int]) -> Batch:
        given, wanted = self._given.read(window_indices), self._wanted.read(window_indices)
        return given._replace(mask=given.mask & wanted.mask, target=wanted.acts)

    def prefetch(self, window_indices: Sequence[int]) -> None:
        self._given.prefetch(window_indices)
        self._wanted.prefetch(window_indices)

    def tokens(self, window_indices: Sequence[int]) -> Tensor | None:
        return self._given.tokens(window_indices)

    def describe(self) -> dict[str, Any]:
        about = {name: value for name, value in self._given.describe().items() if name not in ("layer", "hook")}
        return about | described_place(self._place) | {"d_out": self.d_out}
