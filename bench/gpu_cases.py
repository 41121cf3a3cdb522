"""The cases of `make gpu`, in order: what a GPU is asked for first, if it is here for five minutes only.

smoke      the device; every op at A in bfloat16 beside plain PyTorch; a TMA program with many tiles; memcheck
kernels    each kernel's own time at A, B and C, beside its prediction (kernel_times.py)
steps      the TopK step, the encode and the contextual step: ours, the product alone, and dense PyTorch; then other ops
tests      the tests marked gpu, a file at a time
tune       tiles of product and selection, then of the other kernels (tune.py); what they change is measured again
others     what torch.compile makes, FlexAttention, other libraries
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton

from . import compiled, gpu_results, harness, kernel_times, report, targets, tune
from .cases import BACKWARD, CASES, CONTEXTUAL_STEP, DECODE, ENCODE, LOOK_BACK, OURS, TOPK_STEP, Case
from .data import DTYPES, SHAPES, Data
from .gpu import ROOT, Failed, Here, Keep, Skip
from .gpu import Case as Part
from .measure import Clock, ceilings
from .peer_topk import TOPK

Found = tuple[str, dict[str, Any]]

SIZES = ("A", "B", "C")
SHAPES[tune.TINY.name] = tune.TINY  # for a rehearsal
ROUNDS = 10

# Plain PyTorch that each op is held against before anything is timed.
BESIDE = {
    ENCODE.name: (OURS, "csae threshold", "PyTorch dense"),
    DECODE.name: (OURS, "PyTorch sparse"),
    BACKWARD.name: (OURS, "PyTorch sparse"),
    LOOK_BACK.name: (OURS, "SDPA"),
    TOPK_STEP.name: (OURS, "PyTorch dense"),
    CONTEXTUAL_STEP.name: (OURS, "PyTorch sparse + SDPA"),
}
FIRST = {
    TOPK_STEP.name: (OURS, "csae, captured", "csae, shared budget", "mm", "PyTorch dense"),
    ENCODE.name: (OURS, "csae threshold", "csae, above a threshold", "mm", "PyTorch dense", *TOPK),
    CONTEXTUAL_STEP.name: (OURS, "csae, captured", "csae TopK step", "mm"),
    BACKWARD.name: (OURS, "PyTorch sparse"),
    DECODE.name: (OURS, "PyTorch sparse"),
    LOOK_BACK.name: (OURS, "SDPA"),
}
LAST = {  # where it has to be compiled, or is another library's
    TOPK_STEP.name: ("PyTorch dense, compiled", "sparsify", "SAELens", "dictionary_learning"),
    ENCODE.name: ("PyTorch dense, compiled",),
    LOOK_BACK.name: ("FlexAttention, compiled", "FlexAttention, compiled, null as a key"),
}
TESTS = (
    *(f"kernels/test_triton_{name}" for name in (
        "many_tiles", "topk_encode", "topk_threshold", "threshold_encode", "sparse_decode", "feature_rows",
        "lookback_attention", "cuda_graph", "models",
    )),
    "distributed/test_one_rank",  # a sharded SAE on one rank of NCCL
)  # fmt: skip


def listed(here: Here) -> list[Part]:
    """The cases in order."""
    sizes: Sequence[str] = (tune.TINY.name,) if here.rehearse else SIZES
    first = sizes[0]
    smoke = [
        Part("smoke: device", 40, device),
        *(Part(f"smoke: {name}, {first}", 20, smoke_of, (name, first)) for name in BESIDE),
        Part("smoke: TMA with many tiles", 20, run_tests, ("kernels/test_triton_many_tiles", "bfloat16 and 200")),
        Part("smoke: memcheck", 30, memcheck, ("topk_encode bfloat16 n=130",)),
    ]
    if here.rehearse:  # as many of each kind as show that it runs
        return [
            *smoke,
            Part("kernels: look-back, rehearsal", 120, kernels, (first, ("gather_sum", "look-back"))),
            Part("steps: topk_encode forward, rehearsal", 60, measure, (ENCODE.name, first, (OURS, "mm"))),
            Part("tests: cuda_graph", 60, run_tests, ("kernels/test_triton_cuda_graph", "")),
            Part("tune: product and selection", 120, tuned, (("topk_encode",), sizes)),
            Part("others: PyTorch dense, rehearsal", 60, measure, (ENCODE.name, first, (OURS, "PyTorch dense"))),
        ]
    return [
        *smoke,
        *(Part(f"kernels: {size}", 30, kernels, (size, ())) for size in sizes),
        *(Part(f"steps: {name}, {size}", 30, measure, (name, size, impls)) for name, impls in FIRST.items()
          for size in sizes),
        *(Part(f"tests: {name}", 40, run_tests, (name, "")) for name in TESTS),
        Part("tune: product and selection", 60, tuned, (("topk_encode",), sizes)),
        *(Part(f"tuned: {name}, {size}", 20, measure, (name, size, FIRST[name][:3]))
          for name in (ENCODE.name, TOPK_STEP.name) for size in sizes),
        Part("tune: other kernels", 60, tuned, (("gather_sum", "feature_sums", "adam_rows", "look-back"), sizes)),
        *(Part(f"others: {impl}, {name}, {size}", 60, measure, (name, size, (OURS, impl)))
          for name, impls in LAST.items() for impl in impls for size in sizes),
    ]  # fmt: skip


def has_gpu() -> bool:
    """Whether there is a CUDA device, asked in another process: it has to stay closed in this one."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(torch.cuda.is_available)


def summary(here: Here) -> str:
    """The targets and the kernels' times, as far as they are known."""
    files = sorted(here.results.glob("*.json"), key=lambda file: file.stat().st_mtime)
    return "\n\n".join(targets.short(found) for found in map(report.read, files[-1:]) if gpu_results.of_gpu(found))


# --- the works -------------------------------------------------------------------------------------------------------


def _on(here: Here) -> torch.device:
    return torch.device("cpu" if here.rehearse else "cuda")


def _dtype(here: Here) -> str:
    return "float32" if here.rehearse else "bfloat16"


def device(here: Here, keep: Keep) -> Found:
    """The device's name and rates; the carried kernels are put where triton looks for them."""
    on = _on(here)
    name = harness.device_name(on)
    empty: dict[str, Any] = {
        "device": name,
        "type": "cuda" if not here.rehearse else "rehearsal",
        "versions": harness.versions(),
    }
    empty |= {"threads": torch.get_num_threads(), "rounds": ROUNDS, "results": []}
    rates = ceilings(on, DTYPES[_dtype(here)], Clock(on)) if not here.rehearse else (1.0, 1.0)
    rate = {"dtype": _dtype(here), "operations_per_s": rates[0], "bytes_per_s": rates[1]}
    keep({"report": empty | {"ceilings": rate}})
    line = f"{name}, torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    if here.peers:
        _install(here)
    if here.compiled:
        line += f"; {compiled.install(here.compiled)}"
    return line, {}


def smoke_of(here: Here, keep: Keep, case: str, shape: str) -> Found:
    """Ours, at full size, beside plain PyTorch."""
    whole = CASES[case]
    wanted = {name: of for name, of in whole.implementations.items() if name in BESIDE[case]}
    chosen = Case(whole.name, whole.floor, whole.reference, wanted)
    passed, skipped = harness.check(chosen, Data(SHAPES[shape], DTYPES[_dtype(here)], _on(here)))
    wrong = {name: why for name, why in skipped.items() if not (here.rehearse and "CUDA" in why)}
    said = "; ".join(f"{name}: {why}" for name, why in skipped.items())
    return said or f"{len(passed)} agree", {"failed": bool(wrong)}


def memcheck(here: Here, keep: Keep, *words: str) -> Found:
    """Some cases of bench.sanitize under compute-sanitizer."""
    sanitize = [sys.executable, "-m", "csae.bench.sanitize", *" ".join(words).split()]
    # Without torch's cache every tensor is an allocation of its own, so that an access beyond its end is seen. Failing
    # calls of the CUDA API are not reported: torch makes some to find out what the device can do.
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3", "--report-api-errors", "no"]
    command += ["--print-limit", "20", *sanitize]
    if here.rehearse:
        return f"would run: {shlex.join(command)}", {}
    if shutil.which(command[0]) is None:
        raise Skip("compute-sanitizer is not installed")
    output = _run(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    summaries = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]
    return "; ".join([*summaries[-1:], _last(output)]), {}


def kernels(here: Here, keep: Keep, shape: str, only: Sequence[str]) -> Found:
    """Each kernel's own time."""
    data = Data(SHAPES[shape], DTYPES[_dtype(here)], _on(here))
    rows: list[dict[str, Any]] = []
    for row in kernel_times.measure(data, only):
        rows.append(row)
        keep({"kernels": rows})
    far = [row for row in rows if row.get("predicted_ms") and abs(row["ms"] / row["predicted_ms"] - 1) > 0.3]
    return f"{len(rows)} rows, {len(far)} off their prediction by more than 30%", {}


def measure(here: Here, keep: Keep, case: str, shape: str, impls: Sequence[str]) -> Found:
    """Some implementations of a case. Where one breaks the device, the others are left for another process."""
    sys.path.append(str(here.state / "peers"))
    found = harness.run(
        [shape], [case], _dtype(here), _on(here).type, 1 if here.rehearse else ROUNDS, impls, memory=not here.rehearse
    )
    found["results"] = [result for result in found["results"] if result["case"] == case]
    timed = {result["impl"]: result["median_ms"] for result in found["results"] if "median_ms" in result}
    line = ", ".join(f"{impl} {ms:.3g} ms" for impl, ms in timed.items()) or found["results"][0]["skipped"]
    broke = found.pop("broke", None)
    if broke is None:
        return line, {"report": found, "failed": not timed}
    rest = [impl for impl in impls if impl != broke["impl"]]
    said = {"report": found, "failed": True}
    return f"{broke['impl']} broke the device: {broke['reason']}", said | (
        {"rest": [case, shape, rest]} if rest else {}
    )


def run_tests(here: Here, keep: Keep, name: str, words: str) -> Found:
    """The tests of one file."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu and not slow"]
    # The other conftest.py import packages that may be missing here.
    command += ["-p", "no:cacheprovider", "--confcutdir=tests/kernels", f"tests/{name}.py"]
    command += ["-k", words] if words else []
    if here.rehearse:
        return f"would run: {shlex.join(command[1:])}", {}
    if not words and importlib.util.find_spec("xdist") is not None:  # compiling keeps many cores busy
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return _last(_run(command, {})), {}


def tuned(here: Here, keep: Keep, names: Sequence[str], sizes: Sequence[str]) -> Found:
    """The fastest tiles of some ops, into tuned.json after each op."""
    shapes = [SHAPES[size] for size in sizes]
    most = 1 if here.rehearse else None
    said = tune.tune(shapes, _on(here), DTYPES[_dtype(here)], 50, most, here.tuned, names)
    print(*said, sep="\n")
    return f"{sum(' for ' in line for line in said)} forms were tried to their end", {}


def _install(here: Here) -> None:
    """Unpack the peers' wheels where later cases find them."""
    folder = here.state / "peers"
    wheels = [str(wheel) for wheel in sorted((here.peers or folder).glob("*.whl"))]
    if not wheels:
        raise Failed(f"no wheels in {here.peers}")
    shutil.rmtree(folder, ignore_errors=True)
    # What they need is in wheels too, or installed already; pip must not install another torch.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    _run([*install, *wheels], {})


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Run a command in the checkout; returns what it prints, which goes to the log too. Raises Failed."""
    print(f"$ {shlex.join(command)}", flush=True)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    except KeyboardInterrupt:  # the command was interrupted too, and may say how far it came
        rest = process.communicate(timeout=3)[0]
        print(rest, flush=True)
        raise Failed(f"stopped: {_last(rest)}") from None
    if process.wait() != 0:
        raise Failed(f"{_last(''.join(lines))} (exit code {process.returncode})")
    return "".join(lines)


def _last(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else "no output"
