"""What `make` installs, and what `make test-versions` runs with."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import versions
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "constraints.txt").read_text()
PINS = [Requirement(line) for line in LOCK.splitlines() if not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(python: str) -> dict[str, Version]:
    """The version of each package for a Python, such as "3.13.0"."""
    minor = ".".join(python.split(".")[:2])
    here = {**default_environment(), "python_version": minor, "python_full_version": python}
    chosen = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(here)]
    found = {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in chosen}
    assert len(found) == len(chosen), "a package has two versions"
    return found


def test_lock_says_how_it_is_renewed() -> None:
    assert "`make lock`" in LOCK.splitlines()[0]


def test_lock_names_no_build_and_no_host() -> None:
    assert not re.search(r"\+|://|--", LOCK)


def test_lock_leaves_triton_to_torch() -> None:
    assert not re.search(r"^triton\b", LOCK, re.MULTILINE)


@pytest.mark.parametrize("python", ["3.11.0", "3.11.14", "3.12.0", "3.13.0", "3.14.0"])
def test_lock_holds_what_the_project_asks_for(python: str) -> None:
    project, pins = PROJECT["project"], pinned(python)
    lines = [*project["dependencies"], *(line for of in project["optional-dependencies"].values() for line in of)]
    # Torch with CUDA brings its own triton; beside a CPU build it is the Makefile's.
    (triton,) = re.findall(r"^TRITON = triton==(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pins["triton"] = Version(triton)
    for requirement in map(Requirement, [*lines, *PROJECT["build-system"]["requires"]]):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment of `make`")
def test_what_make_installed_is_what_is_locked() -> None:
    pins = pinned(platform.python_version())
    installed = {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}
    shared = pins.keys() & installed.keys()
    assert {name: installed[name] for name in shared if Version(installed[name]).public != str(pins[name])} == {}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_ci_runs_an_environment_that_is_there() -> None:
    command = re.search(r"^make test-versions ENVIRONMENTS=(\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert command[1] in versions.ENVIRONMENTS
    plan = subprocess.run([*command[0].split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert f"tests/versions.py {command[1]}\n" in plan.stdout


@pytest.mark.parametrize(
    ("declared", "end", "narrowed"),
    [
        ("torch>=2.11,<2.16", "oldest", "torch==2.11.*"),
        ("datasets>=3,<6", "oldest", "datasets==3.0.*"),
        ("triton>=3.6,<3.10; platform_system == 'Linux'", "newest", "triton<3.10,>=3.6"),
    ],
)
def test_ends_of_a_range(declared: str, end: str, narrowed: str) -> None:
    assert str(versions.requirement_at(end, Requirement(declared))) == narrowed


def test_every_declared_range_has_an_oldest_end() -> None:
    assert len([versions.requirement_at("oldest", requirement) for requirement in versions.declared()]) > 10


def test_a_row_replaces_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TABLE", tmp_path / "docs" / "versions.md")
    for name, passed in (("oldest", 1), ("newest", 2), ("oldest", 3), ("gone", 4)):
        versions.write({"environment": name, "date": "2026-11-29", "passed": passed})
    table = versions.TABLE.read_text().splitlines()[-4:]
    assert table == [
        "| environment | date | passed |",
        "| --- | --- | --- |",
        "| newest | 2026-11-29 | 2 |",
        "| oldest | 2026-11-29 | 3 |",
    ]


def test_every_environment_was_run_within_the_ranges() -> None:
    head, _, *rows = [line.strip("| ").split(" | ") for line in versions.TABLE.read_text().splitlines() if "|" in line]
    run = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert run.keys() >= {"oldest", "newest"}  # by hand; CI runs the third
    for name, row in run.items():
        assert int(row["passed"]) > 1000
        assert row["failed"] == "0", name
        for requirement in versions.declared():
            if requirement.name in row:
                assert Version(row[requirement.name]).base_version in requirement.specifier, (name, requirement)
    for requirement in versions.declared():
        if requirement.name in run["oldest"]:
            narrowed = versions.requirement_at("oldest", requirement)
            assert Version(run["oldest"][requirement.name]).public in narrowed.specifier, narrowed
