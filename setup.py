"""What pyproject.toml can't say: which packages there are, and the native library that CMake and ninja build.

The library is called through ctypes and includes no header of Python or torch, so the wheel is tagged
py3-none-<platform>: one file serves every supported Python and torch. Without a compiler the install goes on
without the library, says so in one line, and the wheel is a plain py3-none-any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

LIBRARY = "libcsae_cpu.so"
HOW_TO_GET_IT = (
    "the package works without it, slower; to get it, install a C++17 compiler (g++ or clang++) "
    "and run `pip install --force-reinstall --no-deps --no-cache-dir {}` again"
)


def find_tool(*names: str) -> str | None:
    """The first of these programs that is beside this Python or on PATH."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def say(line: str) -> None:
    """Print a line in the build's log and at the terminal."""
    print(line, file=sys.stderr, flush=True)
    # pip shows nothing of a build that succeeds. The person at the terminal is to know all the same.
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(f"\n{line}\n")
        except OSError:
            pass  # no terminal: the log has it, and the package says it once when it is used


def compile_library(target: Path) -> str | None:
    """Build the library and put it at `target`. Returns why it could not be done, or None."""
    if sys.platform == "win32":
        return "it isn't written for Windows"
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if cmake is None or ninja is None:
        return f"{'cmake' if cmake is None else 'ninja'} was not found"
    if find_tool(*compilers) is None:
        return f"no C++ compiler was found (looked for {', '.join(compilers)})"
    # Always a fresh folder: a kept one remembers the path of a ninja that lived in an earlier build environment.
    with tempfile.TemporaryDirectory(prefix="csae-build-") as folder:
        configure = [cmake, "-S", ".", "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        try:
            subprocess.run([*configure, "-DCMAKE_BUILD_TYPE=Release"], check=True, stdout=sys.stderr)
            subprocess.run([cmake, "--build", folder], check=True, stdout=sys.stderr)
        except (subprocess.CalledProcessError, OSError) as error:
            return f"its build failed: {error}"
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old library mapped keeps its own copy.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(Path(folder, LIBRARY), fresh)
        fresh.replace(target)
    return None


class BuildNative(Command):
    """Compile the native library into the build folder, or beside its sources for an editable install."""

    user_options: list[tuple[str, str, str]] = []  # noqa: RUF012 (the way of setuptools)

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        target = self.in_sources if self.editable_mode else self.in_build
        target.unlink(missing_ok=True)
        reason = compile_library(target)
        if reason is not None:
            how = HOW_TO_GET_IT.format(self.distribution.get_name())
            say(f"csae: the native CPU library was left out, since {reason}: {how}.")

    @property
    def in_sources(self) -> Path:
        return Path("kernels", "cpu", LIBRARY)

    @property
    def in_build(self) -> Path:
        assert self.build_lib is not None
        return Path(self.build_lib, "csae", "kernels", "cpu", LIBRARY)

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *sorted(str(path) for path in Path("kernels/cpu/src").rglob("*.[ch]*"))]

    def get_outputs(self) -> list[str]:
        built = self.in_sources if self.editable_mode else self.in_build
        return [str(self.in_build)] if built.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {str(self.in_build): str(self.in_sources)} if self.editable_mode and self.in_sources.exists() else {}


class Build(build):
    """The usual build, then the native library."""

    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012 (the way of setuptools)

    def run(self) -> None:
        # setuptools packs whatever lies in build/lib: a module that was renamed since the last build, too.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NativeDistribution(Distribution):
    """Files for one platform, though setuptools compiles none of them."""

    def has_ext_modules(self) -> bool:
        return True


class BdistWheel(bdist_wheel):
    """A wheel for one platform and any Python 3, or for any platform where the library was left out."""

    def get_tag(self) -> tuple[str, str, str]:
        native = self.get_finalized_command("build_native").get_outputs()
        return ("py3", "none", super().get_tag()[2] if native else "any")


# A checkout has csae/bench and csae/kernels as links, so that csae is imported from it as it lies. What is packed is
# found at the top level: a link is a plain file where git can't make links.
elsewhere = [f"csae.{name}" for name in find_packages(include=["bench*", "kernels*"], exclude=["bench.evidence"])]
setup(
    packages=[
        *find_packages(include=["csae*"], exclude=["csae.bench*", "csae.kernels*"]),
        *elsewhere,
    ],
    package_dir={"csae.bench": "bench", "csae.kernels": "kernels"},
    package_data={
        "csae": ["py.typed"],
        "csae.pages": ["templates/*"],
        "csae.bench": ["predictions.json"],
        "csae.bench.predict": ["counted.json"],
        "csae.kernels.triton": ["tuned.json"],
    },
    include_package_data=False,
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
)
