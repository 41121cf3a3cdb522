"""What gets built and installed: the wheel, the sdist, an editable install, and an install without a compiler.

Each works on a copy of the checkout, in an empty environment that borrows torch and the other dependencies.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import csae

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "csae/kernels/cpu/libcsae_cpu.so"
LEFT_OUT = "csae: the native CPU library was left out, since no C++ compiler was found"

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as a developer may have it: with left-overs of a build."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "demo", "runs", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    for left in ("lib", f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"):
        (copy / "build" / left / "csae").mkdir(parents=True)
        (copy / "build" / left / "csae" / "renamed_away.py").touch()
    return copy


def run(*command: str | Path, **options) -> str:
    """What the command printed; its output in the error where it fails."""
    environment = {**os.environ, **options.pop("env", {})}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def environment_with_torch(folder: Path) -> Path:
    """The Python of a new environment that has what this one has installed, but for csae."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Plain paths, not addsitedir: an editable install of csae here must not be seen there.
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return python


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def modules_of_checkout() -> set[str]:
    """Where every module of the checkout is to be found once it is installed: all but the evidence."""
    of_csae = (path.relative_to(ROOT) for path in (ROOT / "csae").rglob("*.py"))
    elsewhere = (path.relative_to(ROOT) for folder in ("bench", "kernels") for path in (ROOT / folder).rglob("*.py"))
    kept = {path.as_posix() for path in (*of_csae, *("csae" / path for path in elsewhere))}
    return {path for path in kept if not path.startswith("csae/bench/evidence/")}


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, checkout)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, checkout)
    (built,) = folder.iterdir()
    return built


USE_IT = """
import torch, csae.kernels.cpu as cpu
from csae.ops import topk_encode
values, indices = topk_encode(torch.eye(4), torch.arange(24.0).reshape(6, 4), torch.zeros(6), 2)
assert indices.tolist() == [[5, 4]] * 4 and values[0].tolist() == [20.0, 16.0], (values, indices)
print(cpu.__file__)
print(cpu.available(), cpu.why_not())
"""


@needs_compiler
def test_wheel_holds_what_it_must(wheel: Path) -> None:
    here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"contextual_sae-{csae.__version__}-py3-none-{here}.whl"
    names = names_in(wheel)
    assert LIBRARY in names
    assert {name for name in names if name.endswith(".py")} == modules_of_checkout()
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csae" / "pages" / "templates").glob("*")}
    assert templates <= names
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2, f"besides csae and its dist-info: {top}"


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux")
def test_wheel_for_others_names_the_systems_that_it_runs_on(wheel: Path, tmp_path: Path) -> None:
    # As `make wheel` makes it: auditwheel looks at every symbol that the library needs of the system's.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, wheel, env={"PATH": path})
    (repaired,) = tmp_path.iterdir()
    tag = re.search(rf"-py3-none-.*(manylinux_2_\d+_{platform.machine()})\.whl$", repaired.name)
    assert tag is not None, repaired.name
    files = {name for name in names_in(repaired) if not name.endswith("/")}
    assert files == names_in(wheel), "no library of the system is packed"
    shown = run(sys.executable, "-m", "auditwheel", "show", repaired)
    assert f'consistent with the following platform tag: "{tag[1]}"' in " ".join(shown.split())


@needs_compiler
def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    python = environment_with_torch(tmp_path / "env")
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    file, available = run(python, "-c", USE_IT, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert available == "True None"


def test_install_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    python = environment_with_torch(tmp_path / "env")
    install = [python, "-m", "pip", "install", "--no-deps", "-v", checkout]
    log = run(*install, env={"CXX": "/no/such/compiler"}, start_new_session=True)
    assert log.count(LEFT_OUT) == 1
    assert "install a C++17 compiler" in log
    printed = run(python, "-c", USE_IT, cwd=tmp_path)
    assert "False the native library was not built" in printed
    assert printed.count("RuntimeWarning") == 1


def test_without_a_compiler_a_person_at_a_terminal_is_told(checkout: Path, tmp_path: Path) -> None:
    # A plain `pip wheel`, which keeps the log of a build that succeeds to itself.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(checkout)]
    at_a_terminal = f"import pty; pty.spawn({command})"
    printed = run(sys.executable, "-c", at_a_terminal, env={"CXX": "/no/such/compiler"}, stdin=subprocess.DEVNULL)
    assert printed.count(LEFT_OUT) == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in names_in(wheel)


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [ROOT / name for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")]
    needed += [path for folder in ("bench", "csae", "kernels") for path in (ROOT / folder).rglob("*.py")]
    needed += (ROOT / "kernels" / "cpu" / "src").rglob("*.[ch]*")
    relative = {path.relative_to(ROOT).as_posix() for path in needed}
    linked = ("csae/bench/", "csae/kernels/", "bench/evidence/")
    assert {name for name in relative - names if not name.startswith(linked)} == set()
    unwanted = [name for name in names if name.startswith(("csae/bench", "csae/kernels", "tests", "build"))]
    assert unwanted == []
    assert not any(name.endswith(".so") for name in names)


@needs_compiler
def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sdist)
    (built,) = tmp_path.iterdir()
    assert built.name == wheel.name
    assert names_in(built) == names_in(wheel)


@needs_compiler
@pytest.mark.parametrize("linked", [True, False], ids=["links", "no links"])
def test_editable_install(checkout: Path, tmp_path: Path, linked: bool) -> None:
    copy = shutil.copytree(checkout, tmp_path / "checkout", symlinks=True)
    if not linked:  # as git leaves them on a system without links
        (copy / "csae" / "kernels").unlink()
        (copy / "csae" / "bench").unlink()
    python = environment_with_torch(tmp_path / "env")
    run(python, "-m", "pip", "install", "--no-deps", "-e", copy)
    file, available = run(python, "-c", USE_IT, cwd=tmp_path).splitlines()
    assert Path(file).resolve() == copy / "kernels" / "cpu" / "__init__.py"
    assert available == "True None"
