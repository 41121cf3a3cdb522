"""The native CPU library under the sanitizers: native/fuzz.cpp calls all of it and checks each result."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "cpu" / "src"
FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
SECONDS = 5

# Everything that is reported ends the run, with an exit status that isn't 0.
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "halt_on_error=1:exitcode=66",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}


def build(sources: list[Path], flags: list[str], program: Path) -> subprocess.CompletedProcess[str]:
    """The program, by the first compiler there is; skips where there is none."""
    compilers = [os.environ["CXX"].split()] if os.environ.get("CXX") else [["g++"], ["clang++"]]
    compiler = next((command for command in compilers if shutil.which(command[0])), None)
    if compiler is None:
        pytest.skip(f"no C++ compiler (looked for {', '.join(command[0] for command in compilers)})")
    command = [*compiler, *FLAGS, *flags, f"-I{SOURCES}", *map(str, sources), "-o", str(program), "-ldl"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def need_runtime(flags: list[str], folder: Path) -> None:
    """Skip where this machine can't build or start any program with these flags."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = build([source], flags, program)
    if built.returncode != 0:
        pytest.skip(f"can't build with {' '.join(flags)}: {built.stderr.strip()[-300:]}")
    started = subprocess.run([program], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    if started.returncode != 0:
        pytest.skip(f"an empty program with {' '.join(flags)} doesn't start here: {started.stderr.strip()[-300:]}")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["-O2"], id="plain"),
        pytest.param(["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], id="address-undefined"),
        pytest.param(["-O1", "-fsanitize=thread"], id="thread"),
    ],
)
def test_fuzz(tmp_path: Path, flags: list[str]) -> None:
    need_runtime(flags, tmp_path)
    program = tmp_path / "fuzz"
    built = build([*sorted(SOURCES.rglob("*.cpp")), *sorted((HERE / "native").glob("*.cpp"))], flags, program)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, str(SECONDS), "1"], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    # Each instruction set takes all eleven kinds of case in turn, so 44 are enough to have called everything.
    assert int(done.stdout.split()[0]) >= 44, done.stdout
