"""Activations that were saved in a folder of shards (`csae.data.shards`), read to the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csae.data.activations import Batch, OfPlaces, Place, sink_mask
from csae.data.places import described_place
from csae.data.reused import Reused
from csae.data.shards import ShardReader, hook_of, read_places
from csae.errors import UserError, shown

ANYWHERE = "activations"
"""the hook point of shards that don't say of which they are"""
INF_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


class ShardActivations(OfPlaces):
    """Activations in a folder of shards, of one hook point or of several.

    A file without `documents` has one document a window. A file without `mask` gets that of sink_mask, with keep_first
    as given, or as activations.json says. Of a stored mask, positions whose activations are all zero are left out. A
    transcoder's mask is that of both its hook points.

    places: those that are read, by default each hook point in the folder. Where there is one, `read` and the widths
    d_in and d_out are of it.
    """

    def __init__(self, folder: str | Path, keep_first: bool = False, places: Sequence[Place] | None = None) -> None:
        """Raises UserError where the folder or a file in it is not as the format wants it, or has no such place."""
        self.folder = Path(folder)
        inside = {hook: self.folder / name for hook, name in read_places(folder).items()}
        if inside:
            needed = [hook for hook in inside if places is None or any(hook in place for place in places)]
            self._hooks = {hook: _OneHook(inside[hook], keep_first) for hook in needed}
        else:
            one = _OneHook(self.folder, keep_first)
            self._hooks = {one.hook: one}
        self.places = tuple(map(Place, self._hooks)) if places is None else tuple(places)
        for place in self.places:
            self._check(place, inside or self._hooks)
        first = next(iter(self._hooks.values()))
        self.n_windows, self.n_ctx, self.keep_first = first.n_windows, first.n_ctx, first.keep_first
        for one in self._hooks.values():
            same = one.about.get("windows_sha256") == first.about.get("windows_sha256")
            if (one.n_windows, one.n_ctx) != (first.n_windows, first.n_ctx) or not same:
                raise UserError(
                    f"activations {str(folder)!r}: {one.folder.name} and {first.folder.name} hold other windows; the "
                    "command that wrote them goes on where it was cut short, or copy the folder again"
                )

    def read_all(self, window_indices: Sequence[int]) -> dict[Place, Batch]:
        """The same windows at each place."""
        indices = [index(window) for window in window_indices]
        self.prefetch(indices)
        read = {hook: self._hooks[hook].read(indices) for hook in self._read_hooks()}
        self._check_same_windows(read)
        batches = {}
        for place in self.places:
            batches[place] = given = read[place.hook]
            if place.to is not None:
                wanted = read[place.to]
                batches[place] = given._replace(mask=given.mask & wanted.mask, target=wanted.acts)
        return batches

    def prefetch(self, window_indices: Sequence[int]) -> None:
        """Has the system read windows that are needed soon, and doesn't wait for them."""
        indices = [index(window) for window in window_indices]
        for hook in self._read_hooks():
            self._hooks[hook].prefetch(indices)

    def tokens(self, window_indices: Sequence[int]) -> Tensor | None:
        """The token ids [B, T] of windows; None where not all files hold them."""
        return self._hooks[self.places[0].hook].tokens(window_indices)

    def describe(self) -> dict[str, Any]:
        """See `ActivationSource`. One hook point is described as its folder alone would be."""
        about = self._hooks[self.places[0].hook].describe()
        if self.places[0].to is None and len(self.places) == 1:
            return about
        about = {name: value for name, value in about.items() if name not in ("layer", "hook", "d_in")}
        about["folder"] = str(self.folder)
        if len(self.places) > 1:
            return about | {"places": [described_place(place) for place in self.places]}
        return about | described_place(self.places[0]) | {"d_in": self.d_in, "d_out": self.d_out}

    def _check_same_windows(self, read: dict[str, Batch]) -> None:
        known = {hook: batch.tokens for hook, batch in read.items() if batch.tokens is not None}
        for hook, tokens in known.items():
            first = next(iter(known))
            if not torch.equal(tokens, known[first]):
                raise UserError(
                    f"activations {str(self.folder)!r}: the windows of {shown(hook)} have other tokens than those of "
                    f"{shown(first)}: copy the folder again"
                )

    def _read_hooks(self) -> list[str]:
        return list(dict.fromkeys(hook for place in self.places for hook in place if hook is not None))

    def _width(self, hook: str) -> int:
        return self._hooks[hook].d_in

    def _check(self, place: Place, there: Iterable[str] | None = None) -> None:
        there = self._hooks if there is None else there
        for hook in place:
            if hook is not None and hook not in there:
                hold = ", ".join(map(shown, there))
                raise UserError(f"activations {str(self.folder)!r} hold {hold}; not {shown(hook)}: give another folder")


def _largest_bits_over(acts: Tensor) -> Tensor:
    """The bits, as an integer, of the largest absolute value of each position: [T, d_in] -> [T]. It writes over `acts`.

    They are ordered as the values are; Inf is above every number, and NaN above Inf.
    """
    integers = torch.int32 if acts.dtype == torch.float32 else torch.int16
    return acts.view(integers).bitwise_and_(torch.iinfo(integers).max).amax(dim=-1)


class _OneHook:
    """A folder of shards."""

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
        self._memory = Reused()
        self._told: set[int] = set()  # windows that the system reads, and nobody read since

    @property
    def hook(self) -> str:
        return hook_of(self.about) or ANYWHERE

    def read(self, indices: Sequence[int]) -> Batch:
        windows = [self._reader.read(window) for window in indices]
        self._told.difference_update(indices)
        acts = self._memory.empty(len(indices), self.n_ctx, self.d_in)
        largest = torch.empty(len(indices), self.n_ctx, dtype=torch.int32)
        infinite = [0] * len(indices)
        for row, stored in self._reader.activations(indices):
            acts[row] = stored
            largest[row], infinite[row] = _largest_bits_over(stored), INF_BITS[stored.dtype]
        finite = (largest < torch.tensor(infinite).unsqueeze(1)).all(dim=1)
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

    def prefetch(self, indices: Sequence[int]) -> None:
        new = [window for window in indices if window not in self._told]
        self._told.update(new)
        self._reader.prefetch(new)

    def tokens(self, window_indices: Sequence[int]) -> Tensor | None:
        if not self._reader.has_tokens:
            return None
        return torch.stack([self._reader.tokens(index(window)) for window in window_indices])

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
