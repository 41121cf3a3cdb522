"""What a folder of shards holds already, when more is to be added to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csae.data.activations import ActivationSource
from csae.data.seen import window_hashes
from csae.data.shard_writer import ANOTHER, Part, alike, check_about, parts_of
from csae.data.shards import ABOUT_FILE, Shard, listed, read_about
from csae.errors import UserError
from csae.files import write_json

OF_THE_WINDOWS = ("n_windows", "windows_sha256", "shuffle")  # what differs from one part to the next
HASHED_AT_ONCE = 1024
PHRASE = 16  # tokens; of all phrases in a text, one in SAMPLED is looked at, the same ones wherever windows are cut
SAMPLED = 64
ENOUGH_PHRASES = 16
RUN_AGAIN = 2  # windows, to see whether the model is the same


class Stored:
    """The parts of a folder that are whole, and what there is of one that was cut short.

    files, begun: those of the first hook point. n_bytes: of the whole parts, at all hook points.
    """

    def __init__(self, parts: Sequence[Sequence[Path]] = (), begun: Sequence[Path] = (), n_bytes: int = 0) -> None:
        self.n_parts, self.n_bytes = len(parts), n_bytes
        self.files = [file for part in parts for file in part]
        self.begun = list(begun)
        shards = [Shard(file) for file in self.files]
        self.n_windows = sum(shard.shape[0] for shard in shards)
        self._hashes = np.sort(_hashes_of(shards))

    def not_in(self, source: ActivationSource, windows: Sequence[int]) -> list[int]:
        """Those of the windows of a source whose tokens are in no whole part, in their order."""
        if not self.n_parts:
            return list(windows)
        hashes = [
            window_hashes(self._tokens(source, windows[start : start + HASHED_AT_ONCE]), torch.empty(0))
            for start in range(0, len(windows), HASHED_AT_ONCE)
        ]
        new = ~np.isin(np.concatenate(hashes), self._hashes)
        return [window for window, is_new in zip(windows, new, strict=True) if is_new]

    def check_begun(self, source: ActivationSource, part: Part, windows: Sequence[int]) -> None:
        """Raises UserError where the part that was cut short is not `part`, of these windows of the source."""
        for file in self.begun:
            files = part.files(file.parent)
            fits = file in files
            if fits:
                first = files.index(file) * part.windows_per_shard
                tokens = Shard(file).tensors["tokens"].long()
                wanted = windows[first : first + len(tokens)]
                fits = len(wanted) == len(tokens) and torch.equal(self._tokens(source, wanted).cpu().long(), tokens)
            if not fits:
                raise UserError(
                    f"activations {str(file.parent)!r}: other windows were being added when it was cut short "
                    f"({file.name}): go on with that command first, or delete the files of that part"
                )

    def check_text(self, source: ActivationSource, windows: Sequence[int]) -> None:
        """Raises UserError where much of the text in these windows of the source is there, cut into other windows.

        A text to which something was added, or of which more is read, may be shuffled and packed anew.
        """
        starts = range(0, len(windows), HASHED_AT_ONCE)
        new = [_phrases(self._tokens(source, windows[start : start + HASHED_AT_ONCE])) for start in starts]
        there = [_phrases(Shard(file).tensors["tokens"]) for file in self.files]
        one, other = (np.unique(np.concatenate([np.empty(0, np.uint64), *found])) for found in (new, there))
        shorter = min(len(one), len(other))
        if shorter < ENOUGH_PHRASES:
            return
        share = len(np.intersect1d(one, other, assume_unique=True)) / shorter
        if share > 0.5:
            raise UserError(
                f"--append: {share:.0%} of the shorter text, of this and what is there, is in both, cut into other "
                "windows: give only what is new, or write all of it to another folder"
            )

    @staticmethod
    def _tokens(source: ActivationSource, windows: Sequence[int]) -> Tensor:
        of = getattr(source, "tokens", None)
        tokens = None if of is None else of(windows)
        if tokens is None:
            raise UserError("--append: the source gives no token ids; needed to see which windows are there")
        return tokens


def stored_in(paths: Mapping[str, Path], about: Mapping[str, dict[str, Any]]) -> Stored:
    """What the folders of the hook points hold. about: what is to be added.

    Raises UserError where that is of another job, or damaged.
    """
    if not any(path.is_dir() and listed(path) for path in paths.values()):
        return Stored()
    found = {}
    for name, path in paths.items():
        check_about(path, about[name], but=OF_THE_WINDOWS)
        found[path] = parts_of(path)
    n_whole = min(len(whole) for whole, _ in found.values())
    if not n_whole:
        return Stored()  # the first part is begun, and goes on as without --append
    later = [file for whole, begun in found.values() for part in (*whole[n_whole:], begun) for file in part]
    n_bytes = sum(file.stat().st_size for whole, _ in found.values() for part in whole[:n_whole] for file in part)
    return Stored(found[next(iter(found))][0][:n_whole], later, n_bytes)


def check_weights(source: ActivationSource, paths: Mapping[str, Path], stored: Stored) -> None:
    """Raises UserError where the source's model gives others for the last windows that are stored: other weights.

    A source that can't read windows by their tokens is not checked.
    """
    run = getattr(source, "batches", None)
    if run is None:
        return
    last = stored.files[-1].name
    shards = {name: Shard(path / last) for name, path in paths.items()}
    tokens, documents = (next(iter(shards.values())).tensors[name][-RUN_AGAIN:] for name in ("tokens", "documents"))
    batches = list(run(tokens.long(), documents.long(), None).values())
    for shard, batch in zip(shards.values(), batches, strict=True):
        acts = shard.tensors["activations"][-RUN_AGAIN:]
        if not alike(acts, batch.acts.to("cpu", acts.dtype)):
            raise UserError(f"{shard.file}: the model gives others for its tokens, it has other weights: {ANOTHER}")


def update_about(paths: Mapping[str, Path]) -> None:
    """Brings activations.json of the hook points up to date with the shards there."""
    hashes = None
    for path in paths.values():
        said, files = read_about(path / ABOUT_FILE), listed(path)
        if hashes is None:
            hashes = _hashes_of([Shard(file) for file in files])
        now = said | {"n_windows": len(hashes), "windows_sha256": hashlib.sha256(hashes.tobytes()).hexdigest()}
        if now != said:
            write_json(path / ABOUT_FILE, now)


def _phrases(tokens: Tensor) -> np.ndarray:
    """Hashes of some phrases in windows of tokens [n, T]; which ones follows from the phrases alone: [m] uint64."""
    ids = tokens.cpu().numpy().astype(np.uint64)
    length = ids.shape[1] - PHRASE + 1
    if length < 1:
        return np.empty(0, np.uint64)
    factors = np.random.default_rng(0).integers(2**63, size=PHRASE, dtype=np.uint64) | np.uint64(1)
    hashes = np.zeros((len(ids), length), np.uint64)
    for at, factor in enumerate(factors):
        hashes += ids[:, at : at + length] * factor
    return hashes[(hashes >> np.uint64(32)) % np.uint64(SAMPLED) == 0]


def _hashes_of(shards: Sequence[Shard]) -> np.ndarray:
    """The hashes of windows by their tokens, in order: [windows] uint64."""
    found = [np.empty(0, np.uint64)]
    for shard in shards:
        if "tokens" not in shard.tensors:
            raise UserError(f"--append: {shard.file} holds no token ids; needed to see which windows are there")
        tokens = shard.tensors["tokens"]
        found += [window_hashes(part, torch.empty(0)) for part in tokens.split(HASHED_AT_ONCE)]
    return np.concatenate(found)
