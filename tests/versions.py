"""Runs the tests that touch other libraries at both ends of every supported range: `make test-versions`.

    python tests/versions.py              all environments below
    python tests/versions.py NAME ...     only these

Each environment is made afresh in .venv-versions/NAME, with csae installed from a wheel, as a user has it, so pip
itself checks that the versions go together. One that passes is deleted again. What was run, with which versions and
when is written into docs/versions.md; rows of environments that were not run stay as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-versions"
TABLE = ROOT / "docs" / "versions.md"
SHOWN = ("torch", "triton", "transformers", "datasets", "huggingface-hub", "numpy", "safetensors")
TOOLS = ["pytest>=8", "hypothesis>=6.100", "pytest-benchmark>=5", "pytest-xdist>=3.6"]

# The kernels in Triton's interpreter, language models, splice, data sets, the hub.
TESTS = ["tests/data", "tests/kernels/test_triton_*.py", "tests/test_saving*.py", "tests/splicing", "tests/pages"]
# What needs torch and numpy alone: `make test` runs it with the torch of constraints.txt.
OF_TORCH = ["tests/ops", "tests/test_sae*.py"]
PARALLEL = ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"]  # as in the Makefile


class Environment(NamedTuple):
    """One set of versions that the tests are run with."""

    end: str
    """which end of the ranges: "oldest" or "newest" """
    locked: tuple[str, ...] = ()
    """what has the version in constraints.txt instead"""
    python: str = "oldest"
    """which Python: "oldest" or "newest" """


ENVIRONMENTS = {
    "libraries-newest": Environment("newest", locked=("torch",)),  # CI runs this one
    "newest": Environment("newest", python="newest"),
    "oldest": Environment("oldest"),
}

TOP = """# Versions that csae was tested with

Written by `make test-versions`, which runs the tests that touch other libraries at both ends of the ranges in
`pyproject.toml`; `make test-versions ENVIRONMENTS=NAME` runs one row. CI runs `libraries-newest`, the newest of all but
torch, at every change. `make test` runs all tests with what is in `constraints.txt`. What happens with a version
outside is said in `csae/versions.py`.

"""


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"given {', '.join(unknown)}; needed some of {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    wheel, state, failed = build_wheel(), commit(), []  # before the table is written
    for name in names or ENVIRONMENTS:
        python = make(name, ENVIRONMENTS[name], wheel)
        counts = run_tests(python, TESTS if "torch" in ENVIRONMENTS[name].locked else TESTS + OF_TORCH)
        row = {"environment": name, "date": str(date.today()), "commit": state, **versions_in(python), **counts}
        write(row)
        print(*row.values(), sep="  ", flush=True)
        if counts["failed"] or not counts["passed"]:
            failed.append(name)
            print(f"{name} failed; it is kept in {FOLDER / name}", file=sys.stderr)
        else:
            shutil.rmtree(FOLDER / name)
    return 1 if failed else 0


def build_wheel() -> Path:
    folder = FOLDER / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.iterdir()
    return wheel


def make(name: str, environment: Environment, wheel: Path) -> Path:
    """Make the environment; returns its Python."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([find_python(environment.python), "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    lock = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    ends = [requirement_at(environment.end, requirement) for requirement in declared()]
    chosen = [line for line in lock if Requirement(line).name in environment.locked]
    chosen += [str(end) for end in ends if end.name not in environment.locked]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(chosen) + "\n")
    pip(python, "--upgrade", "pip")
    pip(python, "-c", constraints, f"{wheel}[cli,datasets]", *TOOLS)
    return python


def pip(python: Path, *arguments: str | Path) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True)


def declared() -> list[Requirement]:
    """What pyproject.toml declares for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras["cli"], *extras["datasets"])]


def requirement_at(end: str, requirement: Requirement) -> Requirement:
    """The requirement, narrowed to the first minor version of its range where end is "oldest"."""
    if end == "newest":
        return Requirement(f"{requirement.name}{requirement.specifier}")
    (oldest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    return Requirement(f"{requirement.name}=={oldest if '.' in oldest else oldest + '.0'}.*")


def find_python(which: str) -> str:
    """The oldest supported Python, or the newest that is here, on PATH or of pyenv."""
    for minor in [11] if which == "oldest" else range(20, 10, -1):
        of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
        found = [shutil.which(f"python3.{minor}"), *sorted(of_pyenv.glob(f"3.{minor}.*/bin/python"))]
        for python in filter(None, found):
            try:  # a shim of pyenv may lead nowhere
                subprocess.run([python, "-c", "import venv, ensurepip"], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            return str(python)
    sys.exit("no Python 3.11 is here")


def run_tests(python: Path, tests: list[str]) -> dict[str, int]:
    """How many tests passed, failed and were skipped."""
    report = python.parents[1] / "tests.xml"
    files = sorted(str(path.relative_to(ROOT)) for pattern in tests for path in ROOT.glob(pattern))
    # csae is what is installed, not what lies in the current folder.
    subprocess.run(
        [python, "-m", "pytest", *PARALLEL, "-p", "no:cacheprovider", f"--junitxml={report}", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
    )
    suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}


def versions_in(python: Path) -> dict[str, str]:
    program = (
        "import platform; from importlib.metadata import version\n"
        f"print(platform.python_version(), *(version(name) for name in {SHOWN}))"
    )
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return dict(zip(("Python", *SHOWN), done.stdout.split(), strict=True))


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "?"


def write(row: dict[str, object]) -> None:
    """Put the row into the table, in place of an older one of the same environment."""
    written = TABLE.read_text() if TABLE.exists() else ""
    rows = {name: line for line in written.splitlines() if (name := line.split("|")[1].strip() if "|" in line else "")}
    rows[str(row["environment"])] = "| " + " | ".join(map(str, row.values())) + " |"
    head = ["| " + " | ".join(row) + " |", "|" + " --- |" * len(row)]
    kept = [rows[name] for name in ENVIRONMENTS if name in rows]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(TOP + "\n".join([*head, *kept]) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
