"""Time and memory of a function, and the two ceilings of a device."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from csae.kernels import cpu

from .data import Built

# Of the clock by which the device sleeps: 2 GHz or a little less.
CYCLES_PER_MS = 2_000_000
LONGEST_WAIT_MS = 50.0


class Ceilings(NamedTuple):
    """The highest rates of the device."""

    operations_per_s: float
    """of a large square matrix product in the dtype of the cases"""
    bytes_per_s: float
    """read and written by a large copy"""


class Clock:
    """Milliseconds of a function on a device.

    On CUDA by events, after the L2 cache was emptied, with the device kept busy until the host has launched the
    function: the time of the host isn't counted, unless the function waits for the device. `wall` counts it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None
        self.host_ms = 1.0  # that the host took to launch the last function

    def __call__(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            return self.wall(run)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int(CYCLES_PER_MS * min(LONGEST_WAIT_MS, 1.5 * self.host_ms + 0.1)))
        begin.record()
        start = time.perf_counter()
        run()
        self.host_ms = 1000 * (time.perf_counter() - start)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def wall(self, run: Callable[[], object]) -> float:
        """By the host's clock, from the call until the device has finished."""
        start = time.perf_counter()
        run()
        if self.flush is not None:
            torch.cuda.synchronize(self.device)
        return 1000 * (time.perf_counter() - start)


def ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> Ceilings:
    """Measured now: the best of several tries."""
    (n, d, F), length = ((8192, 8192, 8192), 1 << 30) if device.type == "cuda" else ((2048, 576, 8192), 1 << 28)
    x, W = (torch.randn(size, d, device=device).to(dtype) for size in (n, F))
    out = torch.empty(n, F, dtype=dtype, device=device)
    product = _best(clock, lambda: torch.mm(x, W.T, out=out))
    source = torch.zeros(length // 4, device=device)
    target = torch.zeros_like(source)
    # On a CPU an update in place is faster than a copy: before a copy writes to memory, the CPU reads it.
    moved = min(_best(clock, lambda: target.copy_(source)), _best(clock, lambda: target.add_(1)))
    return Ceilings(2 * n * d * F / (product / 1000), 2 * length / (moved / 1000))


def _best(clock: Clock, run: Callable[[], object]) -> float:
    return min(clock(run) for _ in range(4))


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles."""
    if len(times) < 2:
        return times[0], 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return middle, high - low


def peak_bytes(built: Built, device: torch.device) -> int | None:
    """The most memory that a run needs beyond its inputs, weights and optimizer state, in bytes.

    It is run once before. Gradients of that run are dropped, so that those of the measured run count. On a CPU this is
    resident memory as Linux counts it; None on other systems.
    """
    built.run()
    for parameter in built.parameters:
        parameter.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        built.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    _return_what_is_free()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    built.run()
    return max(0, resident("VmHWM") - before)


def map_large_blocks() -> None:
    """Have glibc map every block of a megabyte or more by itself, so that a freed one is no longer resident."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def _return_what_is_free() -> None:
    cpu.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (most) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
