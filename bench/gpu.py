"""All that needs a GPU, in one command of less than ten minutes: `make gpu`.

    python -m csae.bench.gpu [--fresh] [--peers FOLDER] [--minutes 10]
    python -m csae.bench.gpu --rehearse      as far as a machine without a GPU allows, in tiny sizes

In turn: build in place, without pip; the tests marked gpu, among them a sharded SAE on one rank of NCCL;
compute-sanitizer's memcheck and racecheck on small cases of every kernel; the fastest tiles of each kernel, into
kernels/triton/tuned.json; the benchmark at shapes A, B and C, into bench/results/<device>.json and bench/RESULTS.md;
and kernels/RESOURCES.md again, with the tiles that were chosen.

A stage that is done is left out the next time, unless the code or the device has changed. So a run that was cut short
is continued by the next one. build/gpu keeps the logs and the list of stages that are done. Every stage is stopped when
its time is up. --peers: a folder with wheels of other libraries to measure against.

Needs torch, triton, numpy, what csae needs to be imported, and pytest; no network and no virtual environment.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("A", "B", "C")


class Skip(Exception):
    """A stage can't be done here, which is no failure; the message says why."""


class Failed(Exception):
    """A stage went wrong; the message says how."""


class Here(NamedTuple):
    """Where and how a run takes place."""

    device: str
    rehearse: bool
    """no GPU: kernels are interpreted, sizes tiny, and no file of the repository is written"""
    peers: Path | None
    state: Path
    """what is kept between runs"""
    results: Path
    """JSON files of the benchmark"""
    table: Path
    """RESULTS.md"""
    tuned: Path
    """tuned.json"""


class Stage(NamedTuple):
    """A part of the run."""

    name: str
    seconds: int
    """after which it is stopped"""
    work: Callable[[Here, float], str]
    """does the work within that many seconds, and returns a line on the result"""


# --- the stages ----------------------------------------------------------------------------------------------------


def build(here: Here, seconds: float) -> str:
    """Make csae importable from the checkout; build the native library if cmake, ninja and a compiler are there."""
    try:
        python(here, "build", ["-c", "import csae.kernels.triton"], seconds)
    except Failed:  # the checkout was copied without its links
        link = ROOT / "csae" / "kernels"
        if not link.is_symlink():
            link.symlink_to(Path("..", "kernels"), target_is_directory=True)
        python(here, "build", ["-c", "import csae.kernels.triton"], seconds)
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        return f"csae is importable; the native CPU library is left out, since there is no {' and no '.join(missing)}"
    folder = here.state / "native"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    run(here, "build", configure, seconds)
    run(here, "build", ["cmake", "--build", str(folder)], seconds)
    library = folder / "libcsae_cpu.so"
    if not here.rehearse:
        shutil.copy2(library, ROOT / "kernels" / "cpu" / library.name)
    return "csae is importable; the native CPU library is built"


def tests(here: Here, seconds: float) -> str:
    """The tests marked gpu: of kernels, and of NCCL. Other files import packages that may be missing here."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    command = ["-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    command += ["--confcutdir=tests/kernels", "tests/kernels", "tests/distributed/test_one_rank.py"]
    if here.rehearse:
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist") is not None:  # compiling keeps many cores busy
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return last_line(python(here, "tests", command, seconds))


def memcheck(here: Here, seconds: float) -> str:
    return sanitizer(here, "memcheck", seconds)


def racecheck(here: Here, seconds: float) -> str:
    return sanitizer(here, "racecheck", seconds)


def sanitizer(here: Here, tool: str, seconds: float) -> str:
    """bench.sanitize under a tool of compute-sanitizer."""
    sanitize = [sys.executable, "-m", "csae.bench.sanitize"]
    # Without torch's cache every tensor is an allocation of its own, so that an access beyond its end is seen. Failing
    # calls of the CUDA API are not reported: torch makes some to find out what the device can do.
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", "--report-api-errors", "no"]
    command += ["--print-limit", "20", *sanitize]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if here.rehearse:
        if tool != "memcheck":
            return f"would run: {shlex.join(command)}"
        ran = last_line(run(here, tool, sanitize, seconds, {"TRITON_INTERPRET": "1"}))
        return f"{ran} in the interpreter; would run: {shlex.join(command)}"
    if shutil.which(command[0]) is None:
        raise Skip("compute-sanitizer is not installed")
    output = run(here, tool, command, seconds, environment)
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    return summary[-1].strip("= ") if summary else last_line(output)


def tune(here: Here, seconds: float) -> str:
    """Find the fastest tiles. It gets less than its time: compiling and the last candidate may overrun a little."""
    sizes = ["--shapes", "tiny", "--most", "1"] if here.rehearse else ["--shapes", *SHAPES]
    sizes += ["--seconds", f"{0.8 * seconds:.0f}", "--into", str(here.tuned)]
    python(
        here, "tune", ["-m", "csae.bench.tune", *sizes], seconds, {"TRITON_INTERPRET": "1"} if here.rehearse else None
    )
    table = json.loads(here.tuned.read_text())
    entries = next(of_device for name, of_device in table.items() if name.startswith(("cpu", here.device)))
    return f"{len(entries)} kernels are faster in another form than by default: {here.tuned.name}"


MEASURE = """
import sys
from pathlib import Path
from csae.bench import cases, harness, report
folder, rounds, *shapes = sys.argv[1:]
for case in cases.CASES:
    for shape in shapes:
        file = Path(folder, f"{shape} {case}.json")
        if not file.exists():
            found = harness.run([shape], [case], rounds=int(rounds))
            found["results"] = [result for result in found["results"] if result["case"] == case]
            report.write(found, file)
"""


def bench(here: Here, seconds: float) -> str:
    """Measure each case at each shape. What is left when time is up is measured next time."""
    folder = here.state / "measured"
    code = key(here, "bench")
    if not (folder / code).exists():
        shutil.rmtree(folder, ignore_errors=True)  # it was measured with other code
        folder.mkdir(parents=True)
        (folder / code).touch()
    shapes, rounds = (["small"], "1") if here.rehearse else (SHAPES, "10")
    measure = ["-c", MEASURE, str(folder), rounds, *shapes]
    path = os.pathsep.join([str(ROOT), *([str(peers(here, seconds))] if here.peers else [])])
    try:
        python(here, "bench", measure, seconds, {"PYTHONPATH": path})
    finally:
        written = write_results(here, sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime))
    return written


def peers(here: Here, seconds: float) -> Path:
    """Unpack the peers' wheels; returns the folder, which is empty where that fails."""
    folder = here.state / "peers"
    wheels = [str(wheel) for wheel in sorted((here.peers or folder).glob("*.whl"))]
    shutil.rmtree(folder, ignore_errors=True)
    # What they need is in wheels too, or installed already; pip must not install another torch.
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder), *wheels]
    try:
        if not wheels:
            raise Failed(f"no wheels in {here.peers}")
        python(here, "peers", install, seconds)
    except Failed as reason:
        print(f"peers      left out: {reason}", flush=True)
    return folder


def resources(here: Here, seconds: float) -> str:
    """Write kernels/RESOURCES.md, which lists the tuned forms too."""
    command = ["-m", "csae.kernels.triton.offline", "--write", "--processes", str(os.cpu_count() or 1)]
    if here.rehearse:
        return f"would run: {shlex.join(command)}"
    return last_line(python(here, "resources", command, seconds))


def write_results(here: Here, files: list[Path]) -> str:
    """Write one JSON file with all that was measured on this device, and the table of all devices."""
    from . import report, targets

    parts = [report.read(file) for file in files]
    if not parts:
        raise Failed("nothing was measured")
    whole = parts[0] | {"results": [result for part in parts for result in part["results"]]}
    file = here.results / f"{here.device.replace(' ', '-')}.json"
    report.write(whole, file)
    here.table.write_text(targets.markdown(here.results))
    timed = sum("skipped" not in result for result in whole["results"])
    return f"{timed} timed, {len(whole['results']) - timed} not: {file.name}, {here.table.name}"


STAGES = (
    Stage("build", 60, build),
    Stage("tests", 150, tests),
    Stage("memcheck", 90, memcheck),
    Stage("racecheck", 60, racecheck),
    Stage("tune", 130, tune),
    Stage("bench", 240, bench),
    Stage("resources", 90, resources),
)


# --- running them ----------------------------------------------------------------------------------------------------


def python(
    here: Here, log: str, arguments: list[str], seconds: float, environment: dict[str, str] | None = None
) -> str:
    """Run this Python."""
    return run(here, log, [sys.executable, *arguments], seconds, environment)


def run(here: Here, log: str, command: list[str], seconds: float, environment: dict[str, str] | None = None) -> str:
    """Run a command in the checkout. Returns what it prints, which is also kept in build/gpu/<log>.log.

    Raises Failed where it fails or takes longer than `seconds`.
    """
    path = here.state / f"{log}.log"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})}
    with path.open("a+") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            raise Failed(f"stopped after {seconds:.0f} s: see {path}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and its children
                process.wait()
        file.seek(start)
        output = file.read()
    if process.returncode != 0:
        raise Failed(f"{last_line(output)} (exit code {process.returncode}): see {path}")
    return output


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else "no output"


def key(here: Here, stage: str) -> str:
    """A hash of the device, torch and the code, and for the benchmark of the tiles."""
    digest = hashlib.sha256(repr((here.device, torch.__version__, sys.version, str(here.peers))).encode())
    folders = ("kernels", "csae", "bench", "tests")
    files = {file.resolve() for folder in folders for file in (ROOT / folder).rglob("*.py")}
    files |= set((ROOT / "kernels" / "cpu" / "src").rglob("*.[ch]*"))
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    if stage == "bench" and here.tuned.exists():
        digest.update(here.tuned.read_bytes())
    return digest.hexdigest()[:16]


def do(here: Here, wanted: Stage, seconds: float) -> tuple[bool, str]:
    """Do a stage that isn't done yet. Returns whether it succeeded, and a line to print."""
    done, code = here.state / f"{wanted.name}.json", key(here, wanted.name)
    if done.exists():
        before = json.loads(done.read_text())
        if before["code"] == code:
            return True, f"{before['line']} (before)"
    if seconds < 20:
        return False, "not begun, time is up: run it again to go on"
    start = time.monotonic()
    (here.state / f"{wanted.name}.log").unlink(missing_ok=True)
    try:
        line = wanted.work(here, min(seconds, wanted.seconds))
    except Skip as reason:
        return True, f"skipped: {reason}"
    except Failed as reason:
        return False, f"FAILED: {reason}"
    line = f"{line} ({time.monotonic() - start:.0f} s)"
    done.write_text(json.dumps({"code": code, "line": line}))
    return True, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--peers", type=Path, help="a folder of wheels")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", nargs="+", choices=[one.name for one in STAGES], help="these stages")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("no CUDA device here: `make gpu` needs one; `python -m csae.bench.gpu --rehearse` tries what it can")
        return 2
    slower = 6 if args.rehearse else 1  # the interpreter takes its time
    until = time.monotonic() + 60 * args.minutes * slower
    state = ROOT / "build" / ("rehearsal" if args.rehearse else "gpu")
    if args.fresh:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    device = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    if args.rehearse:
        outputs = (state / "results", state / "RESULTS.md", state / "tuned.json")
    else:
        outputs = (ROOT / "bench" / "results", ROOT / "bench" / "RESULTS.md", ROOT / "kernels/triton/tuned.json")
    here = Here(device, args.rehearse, args.peers and args.peers.resolve(), state, *outputs)
    lines, well = [], True
    print(f"{device}: logs in {state}", flush=True)
    for one in STAGES:
        if args.only and one.name not in args.only:
            continue
        fine, line = do(here, one._replace(seconds=one.seconds * slower), until - time.monotonic())
        well = well and fine
        lines.append(f"{one.name:<10} {line}")
        print(lines[-1], flush=True)
    file = here.results / f"{device.replace(' ', '-')}.json"
    if file.exists():
        from . import report, targets

        print("", targets.short(report.read(file)), "", *lines, sep="\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
