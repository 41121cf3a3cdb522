"""Counts of `topk_encode` of float32 (kernels/triton/topk_coarse.py), whose candidates depend on the whole depth.

`trips` runs products a block deep, where rounded numbers bound pre-activations more closely. So what finds the bounds
is counted in half precision, with as many candidates; and what is done for each candidate follows from how many there
are for normal numbers, which is measured on a few rows. All rows are taken to be proven, so that the fallback reads its
flags and does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from csae.kernels.triton.topk_coarse import BESIDE, n_kept

from . import source, trips
from .launches import Recorded, Triton
from .trips import Call, Counted

ROWS = 16  # in which candidates are counted


def is_strict(call: Call) -> bool:
    """Whether a call is one of float32, which is searched by bounds."""
    x = call["given"].get("x")
    return call["operator"] == "topk_encode" and isinstance(x, dict) and x["dtype"] == "float32"


def in_half(call: Call) -> Call:
    """The call in half precision that does what a strict one does to find its bounds."""
    x, W_enc = (call["given"][name]["shape"] for name in ("x", "W_enc"))
    wide = x[-1] + BESIDE
    shapes = {"x": [x[0], wide], "W_enc": [W_enc[0], wide], "b_enc": [W_enc[0]]}
    given = {name: {"shape": shape, "dtype": "float16"} for name, shape in shapes.items()}
    return {"operator": "topk_encode", "given": given | {"k": n_kept(call["given"]["k"])}}


def reached(d_in: int, d_sae: int, k: int) -> float:
    """How many features' bounds reach the least of the first k pre-activations, for normal numbers."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1 << 16, generator=generator)
    lost = float((numbers - numbers.half().float()).norm() / numbers.norm())
    above = (2 * lost + 2.0**-22 * (d_in + BESIDE)) * math.sqrt(d_in)  # of pre-activations with a variance of one
    acts = torch.randn(ROWS, d_sae, generator=generator)
    least = acts.topk(k).values[:, -1:]
    return float((acts + above >= least).sum(1).float().mean())


def count(call: Call, recorded: Recorded, half: Sequence[Counted] | None = None) -> list[Counted]:
    """What the launches of a strict call, recorded, take; half: the counts of `in_half`."""
    bounds = iter(trips.count([in_half(call)])[0] if half is None else half)
    d_in, d_sae, k = call["given"]["x"]["shape"][-1], call["given"]["W_enc"]["shape"][0], call["given"]["k"]
    mine = [of for _, of in recorded.launches if isinstance(of, Triton) and recorded.calls[of.call] == call]
    found = []
    for launch in mine:
        name, constants = launch.variant.kernel.fn.__name__, launch.variant.constants
        if name == "_settle_exact":
            found.append(_settle(launch, reached(d_in, d_sae, k)))
        elif name in ("_scale", "_round"):
            loops = math.ceil(d_in / constants["BLOCK"])
            read, written = (4.0, 2.0) if name == "_round" else (0.0, 0.0)
            size = launch.grid[0] * d_in
            found.append(_given(launch, float(loops), {"given_ptr": read * size}, {"rounded_ptr": written * size}))
        elif constants.get("GATED"):
            found.append(_nothing_wanted(launch))
        else:
            found.append(next(bounds))
            if found[-1].kernel != name:
                raise ValueError(f"{name}: counted in half precision is {found[-1].kernel}; needed the same launches")
    return found


def _given(launch: Triton, loops: float, loaded: dict[str, float], stored: dict[str, float]) -> Counted:
    """A launch of which every loop and branch is executed so often; branches that constants decide, always."""
    kernel, constants = launch.variant.kernel, launch.variant.constants
    ways = source.calls(kernel, constants)
    times = {
        name: [1.0 if node.test in constants else loops] * max(1, len(ways.get(name.partition(":")[0], [])))
        for name, node in source.nodes(kernel).items()
    }
    return Counted(kernel.fn.__name__, source.digest(kernel), constants, times, loaded, stored)


def _nothing_wanted(launch: Triton) -> Counted:
    """A gated launch of which no row is wanted: a program reads the flag of its row, and one of a product all flags."""
    kernel, flags = launch.variant.kernel, 4.0 * launch.grid[0]
    of_product = "BLOCK_M" in launch.variant.constants
    counted = _given(launch, 0.0, {"only_ptr": flags * (launch.numbers["rows"] if of_product else 1.0)}, {})
    for name, node in source.nodes(kernel).items():
        if node.loop and trips.FLAGS in node.text:
            counted.trips[name] = [math.ceil(launch.numbers["rows"] / trips.FLAGS_AT_ONCE)]
        elif of_product and not name.startswith(f"{kernel.fn.__name__}:"):
            counted.trips[name] = [0.0]
    return counted


def _settle(launch: Triton, reach: float) -> Counted:
    constants, k = launch.variant.constants, launch.numbers["k"]
    width = launch.numbers["d_in"] * constants["UNIT"]
    first = math.ceil(k / constants["ROWS"])
    more = max(0.0, (reach - first * constants["ROWS"]) / constants["ROWS"] + 0.5)
    deep = math.ceil(width / constants["COLUMNS"])
    rows = (first + more) * constants["ROWS"] * launch.grid[0]
    counted = _given(launch, 1.0, {"table": 4.0 * rows * width, "x_ptr": 4.0 * launch.grid[0] * width}, {})
    for name, node in source.nodes(launch.variant.kernel).items():
        if node.loop:
            around = {
                "range(0, first,": [float(first)],
                "range(first,": [more],
                "range(0, width,": [first * deep, more * deep],
            }
            counted.trips[name] = next(times for text, times in around.items() if text in node.text)
    stored = {"exact_ptr": 24.0 * launch.grid[0] * constants["BLOCK"], "pairs_ptr": 8.0 * launch.grid[0] * k}
    return counted._replace(stored=stored)
