"""The run: check each implementation, time it in turn with the others, measure its memory.

A round runs every implementation once, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csae.errors import UserError

from . import peers
from .cases import CASES, OURS, Build, Case, Work
from .check import difference
from .data import CHECK, DTYPES, SHAPES, Built, Data, Skip
from .measure import Ceilings, Clock, ceilings, map_large_blocks, median_and_spread, peak_bytes

# An implementation that takes longer to compile and check is left out.
SECONDS_TO_BUILD = 180
WARM_UP = 2

Report = dict[str, Any]
"""What `run` gives, as JSON has it: device, type, versions, threads, ceilings, rounds, results."""


class Broken(Exception):
    """An implementation left the CUDA device in a state in which this process can't use it."""

    def __init__(self, impl: str, reason: str) -> None:
        super().__init__(f"{impl} broke the device: {reason}")
        self.impl, self.reason = impl, reason


def run(
    shapes: Sequence[str] = (),
    cases: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    rounds: int | None = None,
    implementations: Sequence[str] = (),
    memory: bool = True,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Report:
    """Measure, and print what is being measured.

    Args:
        shapes: names of `SHAPES`; if none: small on a CPU; A, B and C on CUDA.
        cases: names of `CASES`, or parts of them; all if none.
        dtype: that of products: "float32" or "bfloat16"; if not given, float32 on a CPU, bfloat16 on CUDA. A
            training step's weights are float32.
        device: cuda where there is one, if not given.
        rounds: 7 on a CPU, 20 on CUDA, if not given.
        implementations: their names; all if none.
        memory: whether to measure it; on a CPU another process does, which takes seconds.

    Where an implementation breaks the CUDA device for this process, the run ends: the report has its name and the
    error as `broke`, and each result that is missing says so.

    Raises:
        UserError: an unknown name, or fewer rounds than one.
    """
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = on.type == "cuda"
    chosen = _with(_chosen(cases), implementations)
    sizes = [_named("shape", name, SHAPES) for name in shapes or (("A", "B", "C") if cuda else ("small",))]
    dtype = dtype or ("bfloat16" if cuda else "float32")
    number = _named("dtype", dtype, DTYPES)
    rounds = rounds if rounds is not None else (20 if cuda else 7)
    if rounds < 1:
        raise UserError(f"rounds: given {rounds}; needed at least 1")
    clock = Clock(on)
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    ceiling = Ceilings(0.0, 0.0)
    broke: Broken | None = None
    for shape in sizes:
        for case in chosen:
            say(f"{time.perf_counter() - started:4.0f} s  {shape.name}: {case.name}")
            # Measured again before each case, and the best is kept: noise must not raise the floor of the whole run.
            if broke:
                results += _not_run(case, Data(shape, number, on), broke)
                continue
            ceiling = Ceilings(*map(max, ceiling, ceilings(on, number, clock)))
            try:
                results += measure(case, Data(shape, number, on), rounds, clock, memory)
            except Broken as error:
                broke = error
                results += _not_run(case, Data(shape, number, on), broke)
    for result in results:
        if "median_ms" in result:
            work = CASES[result["case"]].floor(SHAPES[result["shape"]["name"]], number.itemsize)
            result["floor_ms"] = floor_ms(work, ceiling)
            result["share_of_floor"] = result["floor_ms"] / result["median_ms"]
    return {
        "device": device_name(on),
        "type": on.type,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "ceilings": {"dtype": dtype, **ceiling._asdict()},
        "results": results,
        **({"broke": {"impl": broke.impl, "reason": broke.reason}} if broke else {}),
    }


def floor_ms(parts: list[Work], ceiling: Ceilings) -> float:
    """Milliseconds of the parts, one after the other, each bound by its operations or its bytes."""
    seconds = (max(part.operations / ceiling.operations_per_s, part.bytes / ceiling.bytes_per_s) for part in parts)
    return 1000 * sum(seconds)


def measure(case: Case, data: Data, rounds: int, clock: Clock, memory: bool = True) -> list[dict[str, Any]]:
    """The results of one case, without the floor."""
    passed, skipped = check(case, data)
    times, walls, failed = _times(passed, data, rounds, clock)
    peaks = _peaks(case, data, list(times)) if memory else {}
    skipped |= failed
    medians = {name: median_and_spread(taken) for name, taken in times.items()}
    base = medians[OURS][0] if OURS in medians else None
    results = []
    for name in case.implementations:
        result: dict[str, Any] = {
            "case": case.name,
            "shape": data.shape.as_json(),
            "dtype": _dtype_name(data.dtype),
            "impl": name,
        }
        if name in medians:
            median, spread = medians[name]
            result |= {
                "median_ms": median,
                "spread_ms": spread,
                "peak_bytes": peaks.get(name),
                **({"wall_ms": statistics.median(walls[name])} if name in walls else {}),
                "ratio_to_ours": None if base is None else median / base,
            }
        else:
            result["skipped"] = skipped[name]
        results.append(result)
    return results


def check(case: Case, data: Data) -> tuple[dict[str, Build], dict[str, str]]:
    """The implementations that give the right result, and why each of the others is left out.

    Each is compared with the float64 reference at the size of CHECK, then at full size with the first that passed.
    """
    small = Data(CHECK, data.dtype, data.device)
    expected = case.reference(small)
    wanted: dict[str, Tensor] = {}
    passed: dict[str, Build] = {}
    skipped: dict[str, str] = {}
    for name, build in case.implementations.items():
        try:
            with _time_limit(SECONDS_TO_BUILD):
                found = build(small).outputs()
                wrong = difference(found, expected, data.dtype) if found else None
                if wrong is not None:
                    skipped[name] = f"differs from the reference: {wrong}"
                    continue
                found = build(data).outputs()
                wrong = difference(found, wanted, data.dtype, tied=True) if found and wanted else None
                if wrong is not None:
                    skipped[name] = f"differs from {next(iter(passed))} at full size: {wrong}"
                    continue
            wanted = wanted or found
            passed[name] = build
        except Exception as error:
            skipped[name] = _reason(error)
            _check_alive(data.device, name, skipped[name])
        found = {}
        if data.device.type == "cuda":
            _release(data.device)
    _release(data.device)
    return passed, skipped


def _times(
    builds: dict[str, Build], data: Data, rounds: int, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each implementation in each round; those with the host's time, on CUDA; why some have none."""
    # A GPU has no memory for all of them, each with its weights and moments. There each is built again in every round,
    # which takes little time.
    keep = data.device.type != "cuda"
    kept: dict[str, Built] = {}
    times: dict[str, list[float]] = {}
    walls: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, build in builds.items():
            if name in failed:
                continue
            try:
                built = kept.get(name)
                if built is None:
                    built = build(data)
                    for _ in range(WARM_UP):
                        built.run()
                times.setdefault(name, []).append(clock(built.run))
                if not keep:
                    walls.setdefault(name, []).append(clock.wall(built.run))
                if keep:
                    kept[name] = built
            except Exception as error:
                failed[name] = _reason(error)
                times.pop(name, None)
                _check_alive(data.device, name, failed[name])
            built = None
            if not keep:
                _release(data.device)
    return times, walls, failed


def _peaks(case: Case, data: Data, names: list[str]) -> dict[str, int | None]:
    """Peak memory of each implementation. On a CPU another process measures it, where nothing else is resident."""
    if data.device.type == "cuda":
        return {name: _peak(case.implementations[name], data) for name in names}
    if sys.platform != "linux":
        return {}
    asked = json.dumps({"case": case.name, "shape": data.shape.name, "dtype": _dtype_name(data.dtype), "names": names})
    program = f"import sys; from {__package__}.harness import peaks_here; peaks_here(sys.argv[1])"
    same_modules = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", program, asked], capture_output=True, text=True, env=same_modules)
    found: dict[str, int | None] = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            found |= json.loads(line)
    return found


def peaks_here(asked: str) -> None:
    """Print a line of JSON for each implementation in `asked`: its peak memory in this process."""
    given = json.loads(asked)
    map_large_blocks()
    case = CASES[given["case"]]
    data = Data(SHAPES[given["shape"]], DTYPES[given["dtype"]], torch.device("cpu"))
    for name in given["names"]:
        print(json.dumps({name: _peak(case.implementations[name], data)}), flush=True)


def _peak(build: Build, data: Data) -> int | None:
    try:
        return peak_bytes(build(data), data.device)
    except Exception:
        return None  # it ran before; here there may be too little memory
    finally:
        _release(data.device)


def _check_alive(device: torch.device, impl: str, reason: str) -> None:
    """Raises Broken where the device no longer answers: an illegal access, for one, ends all use by this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise Broken(impl, reason) from error


def _not_run(case: Case, data: Data, broke: Broken) -> list[dict[str, Any]]:
    """The results of a case after the device was broken."""
    return [
        {
            "case": case.name,
            "shape": data.shape.as_json(),
            "dtype": _dtype_name(data.dtype),
            "impl": name,
            "skipped": broke.reason if name == broke.impl else f"not run: {broke}",
        }
        for name in case.implementations
    ]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    if isinstance(error, Skip | TimeoutError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer. No limit on Windows or in another thread: no alarm there."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"not compiled and checked in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def _chosen(parts: Sequence[str]) -> list[Case]:
    if not parts:
        return list(CASES.values())
    for part in parts:
        if not any(part in name for name in CASES):
            raise UserError(f"case: given {part!r}; needed a part of one of {', '.join(map(repr, CASES))}")
    return [case for name, case in CASES.items() if any(part in name for part in parts)]


def _with(cases: list[Case], implementations: Sequence[str]) -> list[Case]:
    """The cases with these implementations only; all if none."""
    if not implementations:
        return cases
    known = {name: name for case in cases for name in case.implementations}
    for name in implementations:
        _named("implementation", name, known)
    return [
        dataclasses.replace(
            case, implementations={name: of for name, of in case.implementations.items() if name in implementations}
        )
        for case in cases
    ]


def _named(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise UserError(f"{what}: given {name!r}; needed one of {', '.join(map(repr, known))}")
    return known[name]


def device_name(device: torch.device) -> str:
    """The name that its maker gave it; for a CPU also the instruction set that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("csae", "triton", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | peers.versions()
