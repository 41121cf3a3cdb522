"""What saved activations cost: writing them beside the model's bare pass, reading them beside the disk.

    python -m csae.bench.saved --out FOLDER [--model NAME] [--layer 12] [--windows 96]
    python -m csae.bench.saved --read FOLDER      reading alone, of a folder that is there

Writing: `csae.data.cache.write_cache` and the model's pass alone, in turns, the best of each. Reading: windows in an
order of training, out of the page cache and from the disk, against the same files read from beginning to end; the
median of each. What was just written may lie in the cache of a virtual machine's host, which no program can empty: of
the disk, a folder written long ago, larger than that, tells the truth.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from csae.config import TrainConfig
from csae.data.activations import Batch, ModelActivations
from csae.data.batches import IndexedBatches
from csae.data.cache import write_cache
from csae.data.language_model import LanguageModel
from csae.data.loading import smollm2
from csae.data.shard_activations import ShardActivations
from csae.data.shards import listed
from csae.data.text import python_prose, tokenize

BATCH_WINDOWS = 8
BESIDE = ("mlp.in", "mlp.out", "attn.out")
READ_BYTES = 8 * 2**20


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def writing(source: ModelActivations, folder: Path, repeats: int) -> None:
    """Prints the time a token of the bare pass and of the cache, one hook point and four."""
    lm, tokens = source.lm, source.token_windows.tokens
    first, block = source.places[0].hook, source.places[0].hook.rpartition(":")[2]
    several = ModelActivations(lm, [first, *(f"{name}:{block}" for name in BESIDE)], source.token_windows)
    point = lm.hook(first)
    n_tokens = tokens.numel()

    def bare() -> None:
        for start in range(0, len(tokens), BATCH_WINDOWS):
            lm.read(tokens[start : start + BATCH_WINDOWS].long(), [point])

    def cache(what: ModelActivations) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        write_cache(what, folder)

    taken: dict[str, list[float]] = {"bare pass": [], "cache": [], "cache of 4 hook points": []}
    for _ in range(repeats):
        taken["bare pass"].append(seconds(bare))
        taken["cache"].append(seconds(lambda: cache(source)))
        taken["cache of 4 hook points"].append(seconds(lambda: cache(several)))
    for name, times in taken.items():
        ratio = min(times) / min(taken["bare pass"])
        print(f"{name}: {min(times) / n_tokens * 1e6:.1f} us a token, {ratio:.3f} of the bare pass")


def drop(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for file in listed(folder):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_order(folder: Path) -> None:
    into = bytearray(READ_BYTES)
    for file in listed(folder):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(into):
                pass


def as_in_training(folder: Path) -> None:
    source = ShardActivations(folder)
    n_steps = source.n_windows // BATCH_WINDOWS
    steps = IndexedBatches(source, range(source.n_windows), TrainConfig(steps=n_steps, batch_windows=BATCH_WINDOWS))
    for _, _ in zip(range(n_steps), steps.start(0), strict=False):
        pass


def reading(folder: Path, repeats: int) -> None:
    """Prints how fast the files are read."""
    size = sum(file.stat().st_size for file in listed(folder))
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for how, work in (("from beginning to end", in_order), ("windows as in training", as_in_training)):
            drop(folder)
            for where in ("from the disk", "from memory"):
                name = f"{how}, {where}"
                taken[name].append(seconds(lambda: work(folder)))  # noqa: B023
    for name, times in taken.items():
        print(f"{name}: {size / median(times) / 1e9:.2f} GB/s")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="a folder for the shards; removed at the end")
    where.add_argument("--read", type=Path, help="a folder of shards, of one hook point")
    parser.add_argument("--model", default=None)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--read-gb", type=float, default=1.5)
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    if given.read is not None:
        reading(given.read, given.repeats)
        return
    lm = LanguageModel.load(smollm2() if given.model is None else given.model, device="cpu")
    windows = tokenize(python_prose(), lm.tokenizer, given.n_ctx, given.windows * given.n_ctx)
    source = ModelActivations(lm, given.layer, windows)
    n_windows, threads = len(windows.tokens), torch.get_num_threads()
    print(f"{lm.name}, layer {given.layer}, {n_windows} windows of {given.n_ctx}, {threads} threads")
    writing(source, given.out, given.repeats)
    shutil.rmtree(given.out, ignore_errors=True)
    write_cache(
        Copies(source, max(BATCH_WINDOWS, int(given.read_gb * 1e9 / (given.n_ctx * source.d_in * 2)))), given.out
    )
    reading(given.out, given.repeats)
    shutil.rmtree(given.out)


class Copies:
    """The same windows again and again, to fill a disk with."""

    def __init__(self, source: ModelActivations, n_windows: int) -> None:
        self.n_windows, self.n_ctx, self.d_in = n_windows, source.n_ctx, source.d_in
        self._batch = source.read(range(min(16, source.n_windows)))

    def read(self, window_indices: Sequence[int]) -> Batch:
        acts, mask, documents, _, _ = self._batch
        rows = [window % len(acts) for window in window_indices]
        return Batch(acts[rows], mask[rows], documents[rows], None)

    def describe(self) -> dict[str, Any]:
        return {"data": "copies"}


if __name__ == "__main__":
    main()
