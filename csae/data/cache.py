"""Activations of a source, written to a folder of shards; more of them, added to it later."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csae.data.activations import ActivationSource, Batch, Place, sink_mask, window_order
from csae.data.append import OF_THE_WINDOWS, Stored, check_weights, stored_in, update_about
from csae.data.shard_writer import Part, begun, check_about, check_whole, claimed, missing_of, write_files
from csae.distributed.hosts import Hosts
from csae.distributed.ranks import Ranks
from csae.errors import UserError, shown
from csae.progress import Progress, quiet, say

SHARD_BYTES = 256 * 2**20
HEADER_BYTES = 1024  # of a shard, at most
ABOUT_BYTES = 4096  # of an activations.json, at most


def say_nothing(line: str) -> None:
    """Where nobody is to be told."""


class Cached(NamedTuple):
    """What `write_cache` did."""

    n_windows: int
    """in the folder"""
    n_added: int
    """of these, what the call asked for; an earlier start of the same call may have written some"""
    n_left: int
    """windows of the source for which max_bytes leaves no room"""


def write_cache(
    source: ActivationSource,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    progress: Progress = quiet,
    shard_bytes: int = SHARD_BYTES,
    *,
    max_bytes: int | None = None,
    shuffle: int | None = None,
    append: bool = False,
    ranks: Ranks | None = None,
    say: Callable[[str], None] = say_nothing,
) -> Cached:
    """Stores the windows of a source, with mask, documents and tokens, as shards of about shard_bytes each.

    A source of several hook points is read once for all, and `folder` gets a folder for each, which is one of shards by
    itself. The call goes on where the folder holds a part of the same job.

    dtype: float16, bfloat16 or float32. max_bytes: of all files together; as many windows are stored as fit. shuffle: a
    seed, which draws the order in which windows are stored, and with max_bytes also which; by default the source's
    order. append: add to a folder of the same model, hook points and sizes; windows whose tokens are there stay out.
    ranks: each calls this with the same source of its own, and writes some of the files; they are those that one
    process writes, and any number of ranks goes on. say: gets a line on what fits in max_bytes, before it is read.

    Raises UserError where the folder holds something else, the disk is full, or an activation is too large for the
    dtype; Stopped after Ctrl-C.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: given {dtype}; needed torch.float16, torch.bfloat16 or torch.float32")
    folder = Path(folder)
    places = _folders(source)
    sources = {name: source.at(place) for name, place in places.items()} if places else {"": source}  # type: ignore[attr-defined]
    said: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if shuffle is not None:
        said["shuffle"] = shuffle
    about = {name: one.describe() | said for name, one in sources.items()}
    top = {"": {"places": {place.hook: name for name, place in places.items()}}} if places else {}
    window_bytes = _window_bytes([one.d_in for one in sources.values()], source.n_ctx, dtype)
    windows_per_shard = max(1, shard_bytes // sum(window_bytes))
    order = list(range(source.n_windows)) if shuffle is None else window_order(source.n_windows, shuffle, 0)

    def read(windows: range) -> dict[str, dict[str, Tensor]]:
        chosen = order[windows.start : windows.stop]
        if not places:
            return {"": _stored(source.read(chosen), dtype)}
        batches = source.read_all(chosen)  # type: ignore[attr-defined]
        return {name: _stored(batches[place], dtype) for name, place in places.items()}

    def plan() -> Plan:
        """Claims the folder, looks at it, and begins it; rank 0 does this for all."""
        held.enter_context(claimed(folder))
        paths = {name: folder / name for name in sources}
        stored = stored_in(paths, about) if append else Stored()
        chosen = stored.not_in(source, order)
        n_left = 0
        if max_bytes is not None:
            fit = _fit(max_bytes - stored.n_bytes, window_bytes, windows_per_shard)
            if not fit and not stored.n_parts:
                needed = sum(window_bytes) + HEADER_BYTES * len(paths) + ABOUT_BYTES * (len(paths) + 1)
                raise UserError(f"--max-bytes: given {max_bytes}; needed {needed} for one window")
            n_left = max(0, len(chosen) - fit)
            chosen = chosen[:fit]
        part = Part(stored.n_parts + 1, len(chosen), windows_per_shard)
        if max_bytes is not None:
            say(_fits(part, window_bytes, source.n_ctx, stored, n_left, max_bytes))
        _warn_if_full(paths, part, sum(window_bytes))
        if not stored.n_parts:
            whole = {name: one | {"n_windows": len(chosen)} for name, one in about.items()}
            held.enter_context(begun(folder, part, whole | top, alone=ranks is None))
        else:
            for said_there in top.values():
                check_about(folder, said_there, but=OF_THE_WINDOWS)
            stored.check_begun(source, part, chosen)
            stored.check_text(source, chosen)
            check_weights(source, paths, stored)
        return Plan(about, chosen, part, stored.n_windows, n_left, paths)

    hosts = Hosts(ranks)
    with ExitStack() as held:
        found = hosts.from_first(plan)
        hosts.all(lambda: _check_same(found.about, about))
        order = found.windows

        def missing() -> list[int]:
            check_whole(found.paths, read, found.part)
            return missing_of(found.paths, found.part)

        mine = hosts.from_first(missing)
        if ranks is not None:
            mine = mine[ranks.rank :: ranks.size]
        write_files(found.paths, read, found.part, mine, progress)
        hosts.gather(None)  # all of it is there
        if found.part.number > 1:
            hosts.from_first(lambda: update_about(found.paths))
    return Cached(found.n_before + len(order), len(order), found.n_left)


def windows_that_fit(max_bytes: int, widths: Sequence[int], n_ctx: int, dtype: torch.dtype) -> int:
    """How many windows of activations of these widths `write_cache` can store in max_bytes."""
    window_bytes = _window_bytes(widths, n_ctx, dtype)
    return _fit(max_bytes, window_bytes, max(1, SHARD_BYTES // sum(window_bytes)))


def _window_bytes(widths: Sequence[int], n_ctx: int, dtype: torch.dtype) -> list[int]:
    """Of a window at each hook point: activations, mask, documents and tokens."""
    return [n_ctx * (width * dtype.itemsize + 9) for width in widths]


class Plan(NamedTuple):
    """What rank 0 found in the folder, and decided for all."""

    about: dict[str, Any]
    """its source"""
    windows: list[int]
    """of the source, in the order in which they are written"""
    part: Part
    n_before: int
    """windows that are there already"""
    n_left: int
    """windows for which max_bytes leaves no room"""
    paths: dict[str, Path]


def _folders(source: ActivationSource) -> dict[str, Place]:
    """The places of a source that has several, by the names of their folders; none of a source of one."""
    places: tuple[Place, ...] = getattr(source, "places", ())
    if len(places) < 2:
        return {}
    if any(place.to is not None for place in places):
        raise ValueError(f"source: its places are {places}; needed hook points: a transcoder's two are places each")
    names = {re.sub(r"[^\w.-]", "-", place.hook): place for place in places}
    if len(names) < len(places):
        raise ValueError(f"source: its places are {places}; needed names that differ in more than punctuation")
    return names


def _stored(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch as it goes to the disk, by the names in the format."""
    activations = batch.acts.to(dtype)
    if not activations.isfinite().all():
        largest = float(batch.acts.abs().max())
        raise UserError(f"an activation of {largest:.0f} is too large for {dtype}; store bfloat16 or float32")
    if (batch.mask & ~sink_mask(activations, keep_first=True)).any():  # a row of zeros would be read as padding
        raise UserError(f"activations are so small that {dtype} rounds them to zero; store bfloat16 or float32")
    stored = {"activations": activations, "mask": batch.mask, "documents": batch.documents.int()}
    return stored if batch.tokens is None else stored | {"tokens": batch.tokens.int()}


def _fit(n_bytes: int, window_bytes: Sequence[int], windows_per_shard: int) -> int:
    """How many windows fit in n_bytes; window_bytes: of one, at each hook point."""
    left = max(0, n_bytes - ABOUT_BYTES * (len(window_bytes) + 1))
    headers, window = HEADER_BYTES * len(window_bytes), sum(window_bytes)
    shards, rest = divmod(left, headers + windows_per_shard * window)
    return shards * windows_per_shard + max(0, rest - headers) // window


def _fits(part: Part, window_bytes: Sequence[int], n_ctx: int, stored: Stored, n_left: int, max_bytes: int) -> str:
    """What fits in max_bytes, in words."""
    n = part.n_windows
    headers = HEADER_BYTES * len(window_bytes) * len(part.sizes()) + ABOUT_BYTES * (len(window_bytes) + 1)
    of = f" of {n + n_left:,}" if n_left else ""
    more = " more" if stored.n_parts else ""
    return (
        f"--max-bytes {max_bytes:,}: {n:,}{of}{more} windows fit, {n * n_ctx:,} tokens, "
        f"{n * sum(window_bytes) + headers:,} bytes"
    )


def _check_same(of_first: Mapping[str, dict[str, Any]], about: Mapping[str, dict[str, Any]]) -> None:
    """Raises UserError where a rank has another source than rank 0."""
    for name, said in about.items():
        other = of_first.get(name, {})
        differing = [key for key in said.keys() | other.keys() if said.get(key) != other.get(key)]
        if differing:
            key = min(differing)
            raise UserError(
                f"rank 0 has another source ({key}: {shown(other.get(key))}, here {shown(said.get(key))}): needed the "
                "same model and text on all machines"
            )


def _warn_if_full(paths: Mapping[str, Path], part: Part, window_bytes: int) -> None:
    folder = next(iter(paths.values()))
    sizes = zip(part.files(folder), part.sizes(), strict=True)
    needed = window_bytes * sum(size for file, size in sizes if not file.is_file())
    there = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        say(
            f"{there}: {free / 1e6:,.1f} MB are free, and {needed / 1e6:,.1f} MB are to be written: the disk will be "
            "full before that (--max-bytes stores less)"
        )
