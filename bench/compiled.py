"""Kernels compiled without a GPU, and carried to a machine that has one.

    python -m csae.bench.compiled FOLDER [--target sm_90] [WORDS]     forms with all WORDS in their names; some minutes

`install` puts them where triton looks there. Triton finds a kernel by a hash of its source, the form's settings, the
target, and of triton itself: its version, its Python files and libtriton. libtriton differs by version of Python, even
in wheels of one release. So the version and the Python files have to be the same here and there, and libtriton need
not: then each kernel is put under the name that it has there, and one is compiled there and compared, byte for byte.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.compiler import make_backend
from triton.compiler.compiler import get_cache_key
from triton.runtime.cache import get_cache_manager, triton_key

from csae.errors import UserError
from csae.kernels.triton import offline
from csae.kernels.triton.variant import Variant

from . import tune

MADE_WITH = "made_with.json"


def forms(target: str) -> list[Variant]:
    """Every form that is launched on the target or tried by tune.py there."""
    found = {str(variant): variant for variant in offline.variants()}
    for variant in list(found.values()):
        found |= {str(other): other for other in tune.candidates(variant)}
    with_tma = target in offline.WITH_TMA
    return [variant for variant in found.values() if with_tma or not variant.descriptors]


def make(folder: Path, target: str, words: list[str], processes: int) -> str:
    """Compile into `folder`; what is there already is kept. Returns a line to print."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [(variant, target) for variant in forms(target) if all(word in str(variant) for word in words)]
    # Read by the processes that compile. Only what a launch needs: a tenth of the size.
    os.environ |= {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}
    errors = [found for _, _, found in offline.compile_all(chosen, processes) if isinstance(found, str)]
    made_with = {"triton": triton.__version__, "key": triton_key(), "target": target}
    (folder / MADE_WITH).write_text(json.dumps(made_with))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    return f"{len(chosen) - len(errors)} kernels for {target} in {folder}, {size:.1f} MiB; {len(errors)} don't compile"


def install(folder: Path) -> str:
    """Put the kernels of `folder` into triton's cache here, if what is compiled here is the same. Returns a line."""
    try:
        made_with = json.loads((folder / MADE_WITH).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"compiled: {folder} holds no kernels ({error}): fill it with csae.bench.compiled") from error
    if not _same_but_libtriton(made_with["key"]):
        return f"compiled kernels left out: made with triton {made_with['triton']}, not with the one here"
    installed = []
    for variant, rest in _keys(made_with["target"]):
        carried, here = folder / _name(made_with["key"] + rest), Path(get_cache_manager(_hash(rest)).cache_dir)
        if carried.is_dir():
            installed.append((variant, here))
            for file in carried.iterdir():
                _copy(file, here)
    if not installed:
        return f"compiled kernels left out: none in {folder} is of this code"
    variant, there = min(installed, key=lambda one: sum(file.stat().st_size for file in one[1].iterdir()))
    if made_with["key"] != triton_key() and not _compiles_to(variant, made_with["target"], there):
        for _, place in installed:
            shutil.rmtree(place)
        return f"compiled kernels left out: {variant} is compiled to other code here"
    return f"{len(installed)} compiled kernels carried along"


def _same_but_libtriton(key: str) -> bool:
    """Whether the other triton has this one's version and Python files."""
    ours, theirs = triton_key().split("-"), key.split("-")
    library = hashlib.sha256(next((Path(triton.__path__[0]) / "_C").glob("libtriton.*")).read_bytes()).hexdigest()
    return len(ours) == len(theirs) and all(a in (b, library) for a, b in zip(ours, theirs, strict=True))


def _keys(target: str) -> Iterator[tuple[Variant, str]]:
    """Each form with what its key in triton's cache has beside triton's own."""
    backend = make_backend(offline.TARGETS[target][0])
    own = triton_key()
    for variant in forms(target):
        source, options = offline.source_of(variant)
        key = get_cache_key(source, backend, backend.parse_options(options), env_vars=_environment())
        yield variant, key.removeprefix(own)


def _environment() -> dict[str, str]:
    """What of the environment triton's key depends on."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return get_cache_invalidating_env_vars()


def _hash(rest: str) -> str:
    return hashlib.sha256((triton_key() + rest).encode()).hexdigest()


def _name(key: str) -> str:
    """The name of a kernel's folder in triton's cache."""
    digest = hashlib.sha256(key.encode()).digest()
    return base64.b32encode(digest).decode().rstrip("=")


def _copy(file: Path, folder: Path) -> None:
    """A file of a kernel's folder. One that names the others by their paths gets the new paths."""
    if not file.name.startswith("__grp__"):
        shutil.copy2(file, folder / file.name)
        return
    group = json.loads(file.read_text())
    group["child_paths"] = {name: str(folder / name) for name in group["child_paths"]}
    (folder / file.name).write_text(json.dumps(group))


def _compiles_to(variant: Variant, target: str, folder: Path) -> bool:
    """Whether compiling it here gives the machine code in `folder`."""
    source, options = offline.source_of(variant)
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        try:
            compiled = triton.compile(source, target=offline.TARGETS[target][0], options=options)
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
    return compiled.asm["cubin"] == next(folder.glob("*.cubin")).read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument(
        "--target", choices=[name for name in offline.TARGETS if name.startswith("sm_")], default="sm_90"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    print(make(args.folder, args.target, args.words, args.processes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
