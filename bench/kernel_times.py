"""Each kernel's own time within its op, beside what was predicted for it without a GPU.

    python -m csae.bench.kernel_times [--shapes A B C] [OPS]      prints a table

The predictions are in predictions.json; `bench.predict` makes them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from csae.kernels.triton.variant import Variant

from . import tune
from .data import SHAPES, Data
from .harness import device_name
from .measure import Clock
from .predictions import Row, predicted, table

ROUNDS = 5


def measure(data: Data, only: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of each op of tune.py, or of those named in `only`, one op after the other; first the product alone."""
    clock, device, shape = Clock(data.device), device_name(data.device), data.shape.name

    def row(op: str, kernel: str, launches: int, ms: float) -> Row:
        known = {"shape": shape, "op": op, "kernel": kernel, "launches": launches, "ms": ms}
        return known | {"predicted_ms": predicted(device, f"{op}: {kernel}" if kernel else op, shape)}

    if not only:
        out = torch.empty(data.shape.n, data.shape.d_sae, dtype=data.dtype, device=data.device)
        yield row("torch.mm", "", 1, _median(clock, lambda: torch.mm(data.x, data.W_enc.T, out=out)))
        del out
    for op, run in tune.ops(data):
        if only and op not in only:
            continue
        whole = _median(clock, run)
        own = kernel_times(run, data.device)
        yield row(op, "", sum(launches for launches, _ in own.values()), whole)
        for kernel, (launches, ms) in own.items():
            yield row(op, kernel, launches, ms)


def kernel_times(run: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """For each Triton kernel that `run` launches: how many launches, and their milliseconds, the median of ROUNDS."""
    rounds = [_once(run, device) for _ in range(ROUNDS)]
    return {name: (of[0], statistics.median(one[name][1] for one in rounds)) for name, of in rounds[0].items()}


def _once(run: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    spans: list[tuple[str, Any, Any]] = []
    launch = Variant.launch
    cuda = device.type == "cuda"

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self: Variant, *arguments: Any) -> None:
        begin = mark()
        launch(self, *arguments)
        spans.append((self.kernel.__name__, begin, mark()))

    Variant.launch = timed  # type: ignore[method-assign,assignment]
    try:
        if cuda:
            torch.cuda._sleep(20_000_000)  # 10 ms, in which the host launches all: gaps between launches don't count
        run()
    finally:
        Variant.launch = launch  # type: ignore[method-assign]
    if cuda:
        torch.cuda.synchronize(device)
    found: dict[str, tuple[int, float]] = {}
    for name, begin, end in spans:
        number, ms = found.get(name, (0, 0.0))
        found[name] = number + 1, ms + (begin.elapsed_time(end) if cuda else 1000 * (end - begin))
    return found


def _median(clock: Clock, run: Callable[[], object]) -> float:
    run()  # compiles
    return statistics.median(clock(run) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["A", "B", "C"])
    parser.add_argument("ops", nargs="*")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [row for shape in args.shapes for row in measure(Data(SHAPES[shape], dtype, device), args.ops)]
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
