"""Predicted times of launches, and of what is made of them: the rows of predictions.json."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from csae.errors import UserError
from csae.kernels.triton.variant import Variant

from . import machine, sass, source
from .launches import Recorded, Torch, Triton
from .trips import Counted


class Time(NamedTuple):
    """What a launch takes, and why."""

    ms: float
    limiter: str
    parts: dict[str, float]
    """milliseconds that each limiter alone would take"""
    classes: dict[str, float]
    """instructions that a warp issues in a program, by class"""
    loops: dict[str, tuple[float, dict[str, float]]]
    """for each loop: its trips in a program, and a warp's instructions a trip by class"""
    resident: int
    """programs a multiprocessor holds"""
    waves: float


_codes: dict[str, sass.Code] = {}


def code_of(variant: Variant) -> sass.Code:
    """The variant's code for sm_90, compiled once."""
    if str(variant) not in _codes:
        _codes[str(variant)] = sass.compiled(variant)
    return _codes[str(variant)]


def of_triton(launch: Triton, counted: Counted) -> Time:
    """A launch's time, given how a sample of its programs ran."""
    variant, code = launch.variant, code_of(launch.variant)
    programs = math.prod(launch.grid)
    reached = _whole_tiles(variant, counted.trips)
    places = sass.placed(code, variant.kernel, variant.constants, reached)
    times = [of.executed for of in places]
    multiplies = reached.get("multiply_tile:1", [1.0]) != [0.0]  # not where no row of a gated product is wanted
    busy = sass.busy(code, variant.num_warps, times, multiplies * _operations(launch) / programs)
    resident = sass.resident(code, variant.num_warps)
    waves = programs / machine.MULTIPROCESSORS / resident
    each = math.ceil(programs / machine.MULTIPROCESSORS) / machine.CLOCK * 1e3  # programs of one multiprocessor, in ms
    parts = {
        "issue": busy.issue * each,
        **{unit: clocks * each for unit, clocks in busy.units.items()},
        "wgmma": busy.tensor * each,
        "waits": max(1.0, waves) * busy.alone / machine.CLOCK * 1e3,
        "L2": _from_l2(launch, counted) / machine.L2 * 1e3,
        "memory": _from_memory(launch, counted) / machine.MEMORY * 1e3,
        "launch": machine.KERNEL * 1e3,
    }
    limiter = max(parts, key=lambda name: parts[name])
    loops = sass.by_loop(code, places)
    return Time(parts[limiter], limiter, parts, sass.by_class(code, times), loops, resident, waves)


def _whole_tiles(variant: Variant, reached: dict[str, list[float]]) -> dict[str, list[float]]:
    """The counts of the busiest program of a persistent kernel, which takes a whole number of tiles."""
    for name, node in source.nodes(variant.kernel).items():
        # The loop over tiles; or, where it is one with that over the depth, what is done at a tile's end.
        a_tile = node.loop and "programs" in node.text and "steps" not in node.text
        if (a_tile or node.test == "step == steps - 1") and reached.get(name, [0])[0]:
            more = math.ceil(reached[name][0]) / reached[name][0]
            return {of: [count * more for count in counts] for of, counts in reached.items()}
    return reached


def _operations(launch: Triton) -> float:
    """Of the products of matrices: only of kernels with a PRECISION."""
    constants, numbers = launch.variant.constants, launch.numbers
    if "PRECISION" not in constants:
        return 0.0
    if "BLOCK_M" in constants:
        depth = numbers["steps"] * constants["BLOCK_K"] if "steps" in numbers else numbers["units"] * constants["UNIT"]
        tiles = [
            math.ceil(numbers[n] / constants[b]) * constants[b]
            for n, b in (("rows", "BLOCK_M"), ("columns", "BLOCK_N"))
        ]
        return 2.0 * math.prod(tiles) * depth
    # Attention: the tiles on and below the diagonal.
    block_t, block_j, T = constants["BLOCK_T"], constants["BLOCK_J"], int(numbers["T"])
    pairs = sum(min(T, first + block_t) // block_j * block_j * block_t for first in range(0, T, block_t))
    products = {"_forward": 2, "_backward_queries": 3, "_backward_keys": 4}.get(launch.variant.kernel.fn.__name__, 2)
    return 2.0 * launch.grid[0] * pairs * products * constants["SIZE"]


def _from_l2(launch: Triton, counted: Counted) -> float:
    """Bytes that pass between L2 and the multiprocessors, but those of the tiles of a product.

    These are known to come faster than a gather does: at 790 TFLOP/s, tiles of 128 x 256 take 9.3 TB/s, unless
    neighbours' requests for the same lines are answered once.
    """
    tiles = ("x_", "W_") if "BLOCK_M" in launch.variant.constants else ()
    loaded = sum(size for name, size in counted.loaded.items() if not name.startswith(tiles))
    return sum(counted.stored.values()) + loaded


def _from_memory(launch: Triton, counted: Counted) -> float:
    """Bytes that pass between memory and L2."""
    moved = sum(counted.stored.values())
    for name, loaded in counted.loaded.items():
        size = launch.sizes.get(name, 0)
        # Programs go through one slab of columns after the other (grid's second axis): L2 has to hold a slab.
        slab = size / (launch.grid[1] if len(launch.grid) > 1 and name.startswith(("table", "rows")) else 1)
        again = max(0.0, 1 - machine.HALF_L2_BYTES / slab) if slab and name.startswith(("table", "rows")) else 0.0
        moved += min(loaded, size) + max(0.0, loaded - size) * again
    return moved


def of_torch(launch: Torch) -> Time:
    """An operation of PyTorch: its operations or its bytes, but no less than a kernel takes."""
    rate = machine.FLOAT32_OPERATIONS if str(launch.dtype) == "torch.float32" else machine.OPERATIONS
    parts = {
        "memory": launch.bytes / machine.MEMORY * 1e3,
        "wgmma": launch.operations / rate * 1e3,
        "launch": launch.kernels * machine.KERNEL * 1e3,
    }
    if launch.name == "sort":
        parts["launch"] = ((launch.kernels - 4) * machine.KERNEL + 4 * machine.RADIX_PASS) * 1e3
    limiter = max(parts, key=lambda name: parts[name])
    return Time(parts[limiter], limiter, parts, {}, {}, 0, 0.0)


def mm(n: int, d_in: int, d_sae: int) -> float:
    """Milliseconds of torch.mm in bfloat16: tiles of 128 x 256, in whole waves."""
    tiles = math.ceil(n / 128) * math.ceil(d_sae / 256)
    waves = tiles / machine.MULTIPROCESSORS
    return 2.0 * n * d_in * d_sae / machine.OPERATIONS * 1e3 * math.ceil(waves) / waves


Row = tuple[str, "Torch | Triton", Time]


def times(recorded: Recorded, known: dict[str, list[Counted]]) -> list[Row]:
    """The time of each launch. known: the counts of each call that launches. Raises UserError where one is missing."""
    found: list[Row] = []
    for where, launch in recorded.launches:
        if isinstance(launch, Torch):
            found.append((where, launch, of_torch(launch)))
        else:
            call = recorded.calls[launch.call]
            of_call = known.get(key(call), [])
            kernel = launch.variant.kernel.fn.__name__
            if len(of_call) <= launch.place or of_call[launch.place].kernel != kernel:
                raise UserError(
                    f"counted.json: launch {launch.place + 1} of {call['operator']}, {kernel}, was not counted; needed "
                    "`python -m csae.bench.predict --write`"
                )
            counted = of_call[launch.place]
            found.append((where, launch, of_triton(launch, counted)))
    return found


def key(call: dict[str, Any]) -> str:
    return json.dumps(call, sort_keys=True)
