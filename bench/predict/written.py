"""What is kept of predictions: counted.json, the counts that they start from, and predictions.json, what came out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from ..cases import BACKWARD, CASES, CONTEXTUAL_STEP, ENCODE, TOPK_STEP
from ..data import SHAPES
from . import launches, machine, model, source, strict, trips
from .launches import Recorded, Torch, Triton
from .model import Row
from .trips import Counted

COUNTED = Path(__file__).with_name("counted.json")
PREDICTIONS = Path(__file__).parents[1] / "predictions.json"
STEPS = (TOPK_STEP.name, CONTEXTUAL_STEP.name)
Found = dict[str, Any]


def recorded(shape: str) -> dict[str, Recorded]:
    """What each case and each op launches, by name."""
    ops = launches.op_names(SHAPES[shape])
    return {name: launches.of_case(name, SHAPES[shape]) for name in CASES} | {
        name: launches.of_op(name, SHAPES[shape]) for name in ops
    }


def counted(shape: str) -> dict[str, list[Counted]]:
    """The counts that are kept of a shape."""
    known = json.loads(COUNTED.read_text()) if COUNTED.exists() else {}
    return {call: [Counted(*one) for one in of_call] for call, of_call in known.get(shape, {}).items()}


def outdated(found: Sequence[Recorded], known: dict[str, list[Counted]]) -> dict[str, Found]:
    """The calls whose counts are missing, or of other launches or another source of a kernel than it has now."""
    calls: dict[str, tuple[Found, dict[int, str]]] = {}
    for of in found:
        for _, launch in of.launches:
            if isinstance(launch, Triton):
                call = of.calls[launch.call]
                _, launched = calls.setdefault(model.key(call), (call, {}))
                launched[launch.place] = source.digest(launch.variant.kernel)
    return {
        key: call
        for key, (call, launched) in calls.items()
        if [one.digest for one in known.get(key, [])] != [digest for _, digest in sorted(launched.items())]
    }


def count(shape: str, again: bool = False) -> None:
    """Count what the launches of a shape need and is not kept, or all of it again, and keep that."""
    found = list(recorded(shape).values())
    needed, kept = outdated(found, {}), {} if again else counted(shape)
    missing = outdated(found, kept)
    kept = {call: of for call, of in kept.items() if call in needed and call not in missing}
    strictly = {key: call for key, call in missing.items() if strict.is_strict(call)}
    others = {key: call for key, call in missing.items() if key not in strictly}
    if others:
        kept |= dict(zip(others, trips.count(list(others.values())), strict=True))
    for key, call in strictly.items():
        kept[key] = strict.count(call, next(of for of in found if call in of.calls))
    known = json.loads(COUNTED.read_text()) if COUNTED.exists() else {}
    known[shape] = kept
    shapes = []
    for name, calls in sorted(known.items()):
        lines = ",\n".join(f"{json.dumps(call)}: {json.dumps(of)}" for call, of in sorted(calls.items()))
        shapes.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    COUNTED.write_text("{\n" + ",\n".join(shapes) + "\n}\n")


def predictions() -> Found:
    """predictions.json; an empty one where there is none."""
    return json.loads(PREDICTIONS.read_text()) if PREDICTIONS.exists() else {"devices": {}}


def predict(shape: str) -> Found:
    """The rows of predictions.json of a shape: ms, launches, ratios, kernels, origins."""
    known = counted(shape)
    rows = {name: model.times(of, known) for name, of in recorded(shape).items()}
    ms = {"torch.mm": model.mm(SHAPES[shape].n, SHAPES[shape].d_in, SHAPES[shape].d_sae)}
    number: dict[str, int] = {}
    for name, of in rows.items():
        ms[name] = whole(of, name in STEPS)
        number[name] = sum(kernels(launch) for _, launch, _ in of)
        if name not in CASES:
            for kernel, (times, total) in by_kernel(of).items():
                ms[f"{name}: {kernel}"], number[f"{name}: {kernel}"] = total, times
    floor = sum(
        1e3 * max(work.operations / machine.OPERATIONS, work.bytes / machine.MEMORY)
        for work in BACKWARD.floor(SHAPES[shape], 2)
    )
    ratios = {
        "topk_encode forward / the product alone": ms[ENCODE.name] / ms["torch.mm"],
        "backward of encode + decode / its floor": ms[BACKWARD.name] / floor,
        "contextual step / TopK step": ms[CONTEXTUAL_STEP.name] / ms[TOPK_STEP.name],
    }
    return {
        "ms": {name: _short(value) for name, value in ms.items()},
        "launches": number,
        "ratios": {name: _short(value) for name, value in ratios.items()},
        "kernels": [line for name, of in rows.items() if name not in CASES for line in _kernels(name, of)],
        "origins": {name: origins(rows[name]) for name in STEPS},
    }


def put(found: Found, shape: str, new: Found) -> None:
    """Put what `predict` gave of a shape into predictions.json's content."""
    said = "the cost model of bench/predict: SASS for sm_90 by triton {}, loops counted on random data"
    of_device = found["devices"].setdefault(machine.DEVICE, {})
    of_device["source"] = said.format(triton.__version__)
    of_device["rates"] = {"operations_per_s": machine.OPERATIONS, "bytes_per_s": machine.MEMORY}
    for kind in ("ms", "launches", "ratios"):
        before = of_device.get(kind, {})
        others = {name: {s: value for s, value in of.items() if s != shape} for name, of in before.items()}
        rows = {name: others.pop(name, {}) | {shape: value} for name, value in new[kind].items()}
        of_device[kind] = rows | {name: of for name, of in others.items() if of}
    for kind in ("kernels", "origins"):
        of_device.setdefault(kind, {})[shape] = new[kind]


def kernels(launch: Torch | Triton) -> int:
    """How many kernels a launch is."""
    return launch.kernels if isinstance(launch, Torch) else 1


def whole(rows: Sequence[Row], step: bool) -> float:
    """Milliseconds of an op: of its kernels one after the other. Of a step: or of the host, which launches them.

    A benchmark of an op begins while the device is busy, so that the host is ahead; in a step it can't be.
    """
    host = sum(kernels(launch) for _, launch, _ in rows) * machine.LAUNCH * 1e3
    return max(sum(time.ms for _, _, time in rows), host if step else 0.0)


def by_kernel(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """For each Triton kernel: how many launches, and their milliseconds."""
    found: dict[str, tuple[int, float]] = {}
    for _, launch, time in rows:
        if isinstance(launch, Triton):
            name = launch.variant.kernel.fn.__name__
            number, ms = found.get(name, (0, 0.0))
            found[name] = number + 1, ms + time.ms
    return found


def _kernels(op: str, rows: Sequence[Row]) -> list[Found]:
    """A line for each form of a kernel in an op; numbers are those of its launches together, or their means."""
    forms: dict[str, list[tuple[Triton, model.Time]]] = {}
    for _, launch, time in rows:
        if isinstance(launch, Triton):
            forms.setdefault(str(launch.variant), []).append((launch, time))
    lines = []
    for name, of in forms.items():
        limiters = Counter[str]()
        for _, time in of:
            for limiter, ms in time.parts.items():
                limiters[limiter] += ms  # type: ignore[assignment]
        n = len(of)
        classes = {kind: sum(time.classes.get(kind, 0.0) for _, time in of) / n for kind in of[0][1].classes}
        lines.append(
            {
                "op": op,
                "form": name,
                "launches": n,
                "ms": _short(sum(time.ms for _, time in of)),
                "parts": {limiter: _short(ms) for limiter, ms in limiters.most_common() if ms >= 5e-4},
                "classes": {kind: round(number) for kind, number in classes.items()},
                "loops": _loops(of[0][0].variant.kernel, [time for _, time in of]),
                "resident": of[0][1].resident,
                "waves": _short(sum(time.waves for _, time in of) / n),
            }
        )
    return lines


def _loops(kernel: Any, times: Sequence[model.Time]) -> dict[str, Found]:
    """For each loop of a kernel: the mean trips of a program, and a warp's instructions a trip, by class."""
    found, nodes = {}, source.nodes(kernel)
    for name in times[0].loops:
        node = nodes.get(name.partition(",")[0])
        trips = sum(time.loops[name][0] for time in times) / len(times)
        classes = {kind: round(number) for kind, number in times[0].loops[name][1].items()}
        found[name] = {"text": node.text if node else "", "trips": _short(trips), "classes": classes}
    return found


def origins(rows: Sequence[Row]) -> dict[str, list[float]]:
    """For each function of csae: how many kernels it launches, and their milliseconds; most launches first."""
    found: dict[str, list[float]] = {}
    for where, launch, time in rows:
        of = found.setdefault(where, [0, 0.0])
        of[0] += kernels(launch)
        of[1] += time.ms
    return {where: [int(n), _short(ms)] for where, (n, ms) in sorted(found.items(), key=lambda of: -of[1][0])}


def _short(number: float) -> float:
    return float(f"{number:.3g}")
