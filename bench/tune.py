"""Find the fastest tiles of the Triton kernels on this device, and write them where the launchers read them.

    python -m csae.bench.tune [--shapes A B C] [--ops NAMES] [--seconds 120] [--into kernels/triton/tuned.json]

Each op is timed as a whole, with each candidate of each kernel that it launches; all other kernels have their default
form. A form that can't be compiled or launched is left out. What was found so far is written after each op at each
shape, so that little is lost where the run is stopped. Entries of forms that this run didn't try are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from csae.kernels.pairs import Table
from csae.kernels.triton import offline, tuning
from csae.kernels.triton.variant import Variant

from .data import SHAPES, Data, Shape
from .measure import Clock

# For a run in Triton's interpreter, which is very slow.
TINY = Shape("tiny", 8, 16, 96, 2, T=4, heads=1, d_head=8, d_value=8)
ROUNDS = 5
# A smaller gain is not worth an entry: the next run may find the form slower.
WORTH = 0.98

Op = Callable[[], object]


def ops(data: Data) -> Iterator[tuple[str, Op]]:
    """Everything that launches kernels, by name. The inputs of each are made when it is reached."""
    names = ("topk_encode", "topk_threshold", "threshold_encode", "sparse_decode", "feature_rows", "lookback_attention")
    topk, sampled, threshold, sums, rows, look_back = (import_module(f"csae.kernels.triton.{name}") for name in names)
    n, d_in, d_sae, k = data.shape.n, data.shape.d_in, data.shape.d_sae, data.shape.k
    values, indices = data.code
    yield "topk_encode", lambda: topk.topk_encode(data.x, data.W_enc, data.b_enc, k)
    yield "topk_threshold", lambda: sampled.topk_encode(data.x, data.W_enc, data.b_enc, k)
    # A threshold that about k features of a token exceed.
    acts = data.x[:64].float() @ data.W_enc.float().T + data.b_enc.float()
    above = acts.topk(k).values[:, -1].mean()
    del acts
    room = min(2 * k, d_sae)
    yield "threshold_encode", lambda: threshold.threshold_encode(data.x, data.W_enc, data.b_enc, above, room)
    wide = [of.float() for of in (data.x, data.W_enc, data.b_enc)]
    yield "topk_encode, float32", partial(topk.topk_encode, *wide, k)
    del wide
    yield "gather_sum", lambda: sums.gather_sum(values, indices, data.W_dec)
    yield "gather_dot", lambda: sums.gather_dot(data.grad, values, indices, data.W_dec)

    pairs = rows.sort_pairs(indices.flatten(), torch.arange(n, device=data.device).repeat_interleave(k), d_sae)
    weights = values.float().flatten()
    yield "feature_sums", lambda: rows.feature_sums(pairs, [weights, weights], [data.x, data.grad])
    hyper = torch.tensor([1e-3, 1.0, 1e-8, 0.1, 0.999, 0.001], device=data.device)
    seed = torch.ones(1, dtype=torch.int64, device=data.device)
    param, exp_avg, exp_avg_sq = (torch.rand(d_sae, d_in, device=data.device) for _ in range(3))
    rounded = param.bfloat16()  # as a step under autocast has it
    for unit_rows in (False, True):
        table = Table(param, exp_avg, exp_avg_sq, weights, data.x, unit_rows, rounded)
        name = "adam_rows, unit rows" if unit_rows else "adam_rows"
        yield name, partial(rows.adam_rows, pairs, [table], hyper, seed, False)
    del param, exp_avg, exp_avg_sq, rounded, table

    qkv = (*data.qkv, data.slope, data.null, None, None)
    yield "look-back", lambda: look_back.backward(data.grad_look_back, *qkv, *look_back.forward(*qkv))

    # The second encode of a contextual step, for as many tokens as keep their pre-activations at a time.
    some = data.x[: max(1, 2**26 // d_sae)]
    W_a, a = (torch.rand(size, qkv[2][0, 0].numel(), device=data.device).to(data.dtype) for size in (d_sae, len(some)))
    kept = topk.encode_and_keep(some, data.W_enc, data.b_enc, k)[2]
    yield "encode_and_keep", lambda: topk.encode_and_keep(some, data.W_enc, data.b_enc, k)
    yield "encode_again", lambda: topk.encode_again(kept, a, W_a, k)


def launched(op: Op) -> list[Variant]:
    """The variants that an op launches."""
    found: dict[str, Variant] = {}
    launch = Variant.launch

    def record(self: Variant, *arguments: object) -> None:
        found[str(self)] = self
        launch(self, *arguments)  # type: ignore[arg-type]

    Variant.launch = record  # type: ignore[method-assign,assignment]
    try:
        op()
    finally:
        Variant.launch = launch  # type: ignore[method-assign]
    return list(found.values())


def candidates(default: Variant) -> list[Variant]:
    """Other forms of a variant, where its module offers some."""
    module = import_module(default.kernel.fn.__module__)
    offered = module.candidates(default) if hasattr(module, "candidates") else []
    return [other for other in offered if str(other) != str(default)]


class Timed(NamedTuple):
    """A candidate, and how long the op took with it, as a share of the time with the default."""

    default: Variant
    other: Variant
    shares: list[float]
    """one for each op and shape that launched the default"""


def compilable(others: list[Variant], device: torch.device) -> Iterator[Variant]:
    """Those of `others` that can be launched. They are compiled in parallel, and lie in triton's cache afterwards."""
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    if capability not in offline.TARGETS:
        yield from others
        return
    for other, target, compiled in offline.compile_all([(other, capability) for other in others], os.cpu_count() or 1):
        if not offline.problems(other, target, compiled):
            yield other


def try_candidates(
    op: Op, timed: dict[tuple[str, str], Timed], entries: dict[str, dict[str, int]], clock: Clock, until: float
) -> None:
    """Time an op with each candidate of each kernel that it launches. entries: the table that the launchers read."""
    used = {str(variant) for variant in launched(op)}
    mine = [form for form in timed.values() if str(form.default) in used]
    whole = _median(op, clock) if mine else math.nan
    for form in mine:
        if time.monotonic() > until:
            return
        entries[str(form.default)] = tuning.changes(form.default, form.other)
        try:
            form.shares.append(_median(op, clock) / whole)
        except (triton.runtime.errors.TritonError, RuntimeError):  # the latter of CUDA, for a launch that it refuses
            form.shares.append(math.inf)  # it doesn't fit the device
            if clock.device.type == "cuda":
                torch.cuda.synchronize(clock.device)  # raises where the device is lost: nothing after it would count
        finally:
            del entries[str(form.default)]


def chosen(timed: dict[tuple[str, str], Timed]) -> list[tuple[Timed, float]]:
    """For each timed variant, the form that is best over all shapes, and its share of the default's time."""
    best: dict[str, tuple[Timed, float]] = {}
    most = {name: max(len(f.shares) for (of, _), f in timed.items() if of == name) for name, _ in timed}
    for (name, _), form in timed.items():
        if form.shares and len(form.shares) == most[name]:
            share = statistics.geometric_mean(form.shares)
            best[name] = min(best.get(name, (form, share)), (form, share), key=lambda found: found[1])
    return list(best.values())


def tune(
    shapes: list[Shape],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    most: int | None,
    into: Path,
    names: Sequence[str] = (),
) -> list[str]:
    """Write the table of this device to `into`; returns lines to print.

    most: how many candidates a variant. names: ops to tune; all if none.
    """
    until = time.monotonic() + seconds
    clock = Clock(device)
    entries: dict[str, dict[str, int]] = {}
    tuning.table()[tuning.device_name(device)] = entries
    timed: dict[tuple[str, str], Timed] = {}
    said = []
    for shape in shapes:
        data = Data(shape, dtype, device)
        known = {name for name, _ in timed}
        defaults = {str(default): default for _, op in _chosen(data, names) for default in launched(op)}
        offered = [
            (default, other)
            for name, default in defaults.items()
            if name not in known
            for other in candidates(default)[:most]
        ]
        fit = {str(other) for other in compilable([other for _, other in offered], device)}
        timed |= {(str(d), str(o)): Timed(d, o, []) for d, o in offered if str(o) in fit}
        said.append(f"{shape.name}: {len(defaults)} variants, {len(offered)} candidates, {len(fit)} of them fit")
        for _, op in _chosen(data, names):
            try_candidates(op, timed, entries, clock, until)
            write(timed, device, into)
        del data, op
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if time.monotonic() > until:
        said.append(f"the {seconds:.0f} s were up: what was not tried keeps its default")
    return said + [f"{share:.3f} of the op's time: {form.other} for {form.default}" for form, share in chosen(timed)]


def write(timed: dict[tuple[str, str], Timed], device: torch.device, into: Path) -> None:
    """Write the best of the forms that were timed; entries of others, and of other devices, stay as they are."""
    table = json.loads(into.read_text()) if into.exists() else {}
    entries = table.setdefault(tuning.device_name(device), {})
    for form, share in chosen(timed):
        entries.pop(str(form.default), None)
        if share < WORTH:
            entries[str(form.default)] = tuning.changes(form.default, form.other)
    new = into.with_suffix(".new")
    new.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    os.replace(new, into)  # at once: a run that is stopped here leaves the table before


def _chosen(data: Data, names: Sequence[str]) -> Iterator[tuple[str, Op]]:
    """The ops with these names, or with more words after a comma; all if none."""
    for name, op in ops(data):
        if not names or name.partition(",")[0] in names:
            yield name, op


def _median(op: Op, clock: Clock) -> float:
    op()  # the first run compiles
    return statistics.median(clock(op) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "tiny"], default=["A", "B", "C"])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--into", type=Path, default=tuning.PATH)
    parser.add_argument("--ops", nargs="+", default=(), help="names of ops; all, if not given")
    parser.add_argument("--most", type=int, help="candidates of a variant; all, if not given")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [TINY if name == "tiny" else SHAPES[name] for name in args.shapes]
    # Triton's interpreter can't compute with bfloat16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(*tune(shapes, device, dtype, args.seconds, args.most, args.into, args.ops), sep="\n")


if __name__ == "__main__":
    main()
