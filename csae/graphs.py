"""A function of tensors as a CUDA graph: captured once, then launched whole, with no Python between its kernels.

A captured function must not read a number from the device, copy one to it, or take a Python number that changes. What
changes comes in tensors: `Graphs.run` copies them to where the graph reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csae.progress import say

Inputs = dict[str, Tensor]
# Graphs that are kept, for a graph holds memory: steps with one sweep more and one less take turns, and so may two
# capacities for dead features (`csae.dead_rows.pad`), from line to line of metrics.
MOST = 4
# Calls before a capture, which waits for the device and empties the allocator's cache. Where the capacity for dead
# features changes with each line of metrics, every 10 steps by default, none is made.
CALLS = 16


class _Graph(NamedTuple):
    inputs: Inputs
    replay: Callable[[], None]
    results: Any


class Graphs:
    """Captured functions on a device, by what they depend on beside their inputs."""

    def __init__(self, device: torch.device, capture: Callable[..., tuple[Callable[[], None], Any]] | None = None):
        """capture: takes a function, and gives what runs it again and where its results will be. For tests."""
        self.device, self._capture = device, capture or _Capture(device)
        self._known: OrderedDict[Hashable, _Graph | int] = OrderedDict()
        self.refused = False

    def run(
        self,
        key: Hashable,
        function: Callable[[Inputs], Any],
        inputs: Inputs,
        replayed: Callable[[], None],
        failed: Callable[[], None],
    ) -> Any:
        """What function(inputs on the device) gives; valid until the next call.

        The first CALLS times with a key it is called, which compiles and loads kernels. The next time it is captured,
        from then on replayed. If it can't be captured, one line says so, and it is always called.

        Args:
            key: equal only where the function launches the same kernels on the same addresses, but for its inputs.
            replayed: called after each replay, in which the function's Python did not run.
            failed: called after a capture that broke off: Python ran, and no kernel.
        """
        key = key, tuple((name, of.shape, of.dtype) for name, of in inputs.items())
        known = self._known.pop(key, 0)
        if not self.refused:
            self._known[key] = known + 1 if isinstance(known, int) else known
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        if isinstance(known, _Graph):
            for name, read in known.inputs.items():
                read.copy_(inputs[name], non_blocking=True)
            known.replay()
            replayed()
            return known.results
        here = {name: of.to(self.device, non_blocking=True) for name, of in inputs.items()}
        if known < CALLS or self.refused:
            return function(here)
        static = {name: of.clone() for name, of in here.items()}
        try:
            replay, results = self._capture(lambda: function(static))
        except BaseException as error:
            failed()
            if not isinstance(error, RuntimeError):
                raise
            self.refused = True
            reason = str(error).strip().partition("\n")[0]
            say(f"a step can't be captured as a CUDA graph ({reason}): its kernels are launched one by one")
            return function(here)
        self._known[key] = _Graph(static, replay, results)
        replay()
        return results


class _Capture:
    """Captures on a device. Graphs share their memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture a function without running it: what runs it, and where its results will be."""
        graph = torch.cuda.CUDAGraph()
        # torch captures on the current device, and leaves its own stream current where a capture breaks off.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream(self.device)
            # Other threads read data meanwhile: what they do on the device is none of this capture's.
            how = {"pool": self._pool, "stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **how):
                results = function()
        return graph.replay, results
