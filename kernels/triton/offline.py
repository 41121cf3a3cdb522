"""Compile every form in which a kernel can be launched, without a GPU, and report what each costs.

`variants` lists the forms; `compile_for` compiles one, with the tools in triton's own wheel; `problems` checks the
result; `report` makes kernels/RESOURCES.md. What was compiled is kept in kernels/compiled.json, by a hash of all that
the machine code depends on. So only forms that changed are compiled again.

    python -m csae.kernels.triton.offline --write [--afresh]       compile, write RESOURCES.md and compiled.json
    python -m csae.kernels.triton.offline [--target sm_90] WORDS   compile and list those with all WORDS in their name

Not under TRITON_INTERPRET=1, where triton has no kernels to compile.
"""

import argparse
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import tuning
from .variant import Variant

RESOURCES = Path(__file__).resolve().parents[1] / "RESOURCES.md"
KEPT = RESOURCES.with_name("compiled.json")
# A GPU's name: triton's target, and the bytes of shared memory that one program may use.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
WITH_TMA = ("sm_90", "sm_100")
# A launch lists the attributes of constants too, of which there are none: of strings only before triton 3.7.
_LISTS_CONSTANTS = Version(triton.__version__) >= Version("3.7")


class Compiled(NamedTuple):
    """What a variant costs on one target. Instruction counts are static: of the code, not of a run."""

    registers: int  # a thread
    spills: int  # bytes a thread, spilled from registers or on the stack
    shared: int  # bytes a program
    matrix: dict[str, int]  # matrix instructions, by name: wgmma, tcgen05, mma or mfma
    wide_loads: int  # loads of 16 bytes a thread from global memory, to registers or to shared memory
    other_loads: int  # narrower loads from global memory
    shared_loads: int
    local: int  # loads and stores of spilled registers
    bulk_loads: int = 0  # loads of whole tiles, by the tensor memory accelerator (TMA)


def modules() -> dict[str, list[Variant]]:
    """Every form in which a launcher launches a kernel, tuned forms included, by module."""
    found = {}
    for name, defaults in _defaults().items():
        tuned = [variant for variant, _ in tuning.tuned_variants(defaults)]
        found[name] = list({str(variant): variant for variant in [*defaults, *tuned]}.values())
    return found


def _defaults() -> dict[str, list[Variant]]:
    """The forms that launchers make without tuned.json, by module."""
    found = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f".{info.name}", __package__)
        if module.__name__ != f"{__package__}.offline" and hasattr(module, "variants"):
            found[info.name] = module.variants()
    return found


def variants() -> list[Variant]:
    """The forms of all modules."""
    return [variant for of_module in modules().values() for variant in of_module]


@functools.cache
def _only_on() -> dict[str, set[str]]:
    """The targets of each form that only tuned.json names, by the form's name."""
    found: dict[str, set[str]] = {}
    for defaults in _defaults().values():
        known = {str(variant) for variant in defaults}
        for variant, target in tuning.tuned_variants(defaults):
            if str(variant) not in known:
                found.setdefault(str(variant), set()).add(target)
    return found


def launched_on(variant: Variant, target: str) -> Variant | None:
    """The form in which a variant is launched on one of TARGETS.

    None if it isn't: it was tuned for other GPUs, it takes TMA descriptors and the GPU has no TMA, or the module's
    `only_on` names others, or its `on_amd`, which gives the form for an AMD GPU, gives none.
    """
    gpu, _ = TARGETS[target]
    if target not in _only_on().get(str(variant), [target]) or (variant.descriptors and target not in WITH_TMA):
        return None
    module = importlib.import_module(variant.kernel.fn.__module__)
    if hasattr(module, "only_on") and target not in (module.only_on(variant) or (target,)):
        return None
    if gpu.backend == "hip" and hasattr(module, "on_amd"):
        return module.on_amd(variant)
    return variant


def compile_for(variant: Variant, target: str) -> Compiled | None:
    """Compile for one of TARGETS. None if the variant is not launched on that GPU."""
    launched = launched_on(variant, target)
    if launched is None:
        return None
    gpu, _ = TARGETS[target]
    source, options = source_of(launched)
    kernel = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "hip":
        return _of_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        return _of_sass(_run("nvdisasm", "--print-code", file.name), usage, kernel.metadata.shared)


def key(variant: Variant, target: str) -> str | None:
    """A hash of all that the machine code depends on but triton; None if the variant is not launched on that GPU.

    The source of the kernel and of what it calls, with its line in the file; types, constants, options, the target.
    """
    launched = launched_on(variant, target)
    if launched is None:
        return None
    source, options = source_of(launched)
    return hashlib.sha256(f"{source.hash()} {sorted(options.items())} {target}".encode()).hexdigest()


def kept() -> dict[str, Compiled]:
    """What is in compiled.json, by `key`; nothing if it was made with another triton."""
    written: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {"triton": None}
    if written["triton"] != triton.__version__:
        return {}
    return {of: Compiled(*counts) for of, counts in written["forms"].items()}


def source_of(variant: Variant) -> tuple[ASTSource, dict[str, int | bool]]:
    """A variant's source and options as a launch gives them to the compiler, so that triton's cache has it for both.

    Pointers are aligned to 16 bytes, as `Variant.launch` demands.
    """
    signature = variant.signature()
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, (name, type_) in enumerate(signature.items()):
        if type_.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif type_ == "constexpr" and (_LISTS_CONSTANTS or isinstance(variant.constants[name], str)):
            attributes[(position,)] = []
    source = ASTSource(variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    return source, variant.options()


def _run(tool: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _of_sass(sass: str, usage: str, shared: int) -> Compiled:
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    count = _counter(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z0-9_.]+)", sass))
    wide = count(r"LDG(STS)?\.(.*\.)?128(\..*)?")
    return Compiled(
        registers=int(found["REG"]),
        spills=int(found["STACK"]) + int(found["LOCAL"]),
        shared=shared,
        matrix=_named(wgmma=count(r"[HIQ]GMMA.*"), tcgen05=count(r"UTC\w*MMA.*"), mma=count(r"[HI]MMA.*")),
        wide_loads=wide,
        other_loads=count(r"LDG(STS)?\..*") - wide,
        shared_loads=count(r"LDSM?(\..*)?"),
        local=count(r"(LDL|STL)(\..*)?"),
        bulk_loads=count(r"UTMALDG(\..*)?"),
    )


def _of_amdgcn(assembly: str, shared: int) -> Compiled:
    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    count = _counter(re.findall(r"^\s+([a-z]\w+)", assembly, flags=re.MULTILINE))
    wide = count(r"(global|buffer)_load_dwordx4")
    return Compiled(
        # vgpr_count includes the accumulation registers. Spilled scalar registers go to lanes of vector registers.
        registers=metadata("vgpr_count"),
        spills=metadata("private_segment_fixed_size"),
        shared=shared,
        matrix=_named(mfma=count(r"v_mfma_.*")),
        wide_loads=wide,
        other_loads=count(r"(global|buffer)_load_.*") - wide,
        shared_loads=count(r"ds_(read|load)\w*"),
        local=count(r"scratch_(load|store)\w*"),
    )


def _counter(instructions: list[str]):
    counts = Counter(instructions)
    return lambda pattern: sum(number for name, number in counts.items() if re.fullmatch(pattern, name))


def _named(**counts: int) -> dict[str, int]:
    return {name: number for name, number in counts.items() if number}


def problems(variant: Variant, target: str, compiled: Compiled | str | None) -> list[str]:
    """Why a variant should not be launched, given what `compile_all` yielded for it; empty if nothing is wrong."""
    if compiled is None:
        return []
    if isinstance(compiled, str):
        return [f"can't be compiled: {compiled}"]
    gpu, shared_limit = TARGETS[target]
    found = []
    if compiled.spills or compiled.local:
        found.append(f"spills {compiled.spills} bytes a thread, {compiled.local} loads and stores")
    if compiled.shared > shared_limit:
        found.append(f"needs {compiled.shared} bytes of shared memory of {shared_limit}")
    # Only wgmma reaches the full rate of Hopper's tensor cores. Kernels with matrix products have a PRECISION.
    to_tensor_cores = variant.constants.get("PRECISION", "ieee") != "ieee"
    if target == "sm_90" and to_tensor_cores and "wgmma" not in compiled.matrix:
        found.append("multiplies without wgmma")
    # Kernels that gather have ROWS, and each of their threads should load a whole unit of 16 bytes at once.
    if "ROWS" in variant.constants and variant.constants["UNIT"] > 1:
        tile, threads = variant.constants["ROWS"] * variant.constants["COLUMNS"], variant.num_warps * gpu.warp_size
        needed = tile // (variant.constants["UNIT"] * threads)
        if compiled.wide_loads < needed:
            found.append(f"gathers with {compiled.wide_loads} loads of 16 bytes for {needed}")
    return found


def compile_all(
    chosen: Iterable[tuple[Variant, str]], processes: int = 2, known: Mapping[str, Compiled] = MappingProxyType({})
) -> Iterator[tuple[Variant, str, Compiled | str | None]]:
    """Compile each variant for its target, in order, unless `known` has it by its `key`.

    Yields an error text for a variant that can't be compiled.
    """
    chosen = list(chosen)
    keys = [key(variant, target) for variant, target in chosen]
    # A kernel can't be pickled; its module and name can.
    places = [
        (v.kernel.fn.__module__, v.kernel.__name__, v._replace(kernel=None, descriptors=dict(v.descriptors)), target)
        for (v, target), of in zip(chosen, keys, strict=True)
        if of is not None and of not in known
    ]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        compiled = iter(pool.map(_compile_named, places) if places else ())
        for (variant, target), of in zip(chosen, keys, strict=True):
            yield variant, target, None if of is None else known[of] if of in known else next(compiled)


def _compile_named(place: tuple[str, str, Variant, str]) -> Compiled | str | None:
    module, kernel, variant, target = place
    try:
        return compile_for(variant._replace(kernel=getattr(importlib.import_module(module), kernel)), target)
    except Exception as error:  # the compiler's errors have no common base class
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def report(compiled: dict[tuple[str, str], Compiled | str | None]) -> str:
    """The text of RESOURCES.md, from the result for each (variant's name, target)."""
    lines = [_TOP.format(triton=triton.__version__)]
    for module, of_module in modules().items():
        lines.append(f"## {module}\n")
        for kernel in dict.fromkeys(variant.kernel for variant in of_module):
            of_kernel = [variant for variant in of_module if variant.kernel is kernel]
            common = _common(of_kernel)
            lines += [f"### `{kernel.__name__}`", f"\n{common}\n" if common else ""]
            lines.append("| form | " + " | ".join(TARGETS) + " |\n|" + " --- |" * (len(TARGETS) + 1))
            for variant in of_kernel:
                cells = (_cell(compiled[str(variant), target]) for target in TARGETS)
                lines.append(f"| {_form(variant, of_kernel)} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def kept_text(chosen: Iterable[tuple[Variant, str]], found: Mapping[tuple[str, str], Compiled | str | None]) -> str:
    """The text of compiled.json: what was found for each variant and target, a line each."""
    forms = {key(variant, target): found[str(variant), target] for variant, target in chosen}
    lines = [
        f'"{of}": {json.dumps(counts)}' for of, counts in sorted(forms.items(), key=str) if isinstance(counts, Compiled)
    ]
    return f'{{"triton": "{triton.__version__}", "forms": {{\n' + ",\n".join(lines) + "\n}}\n"


_TOP = """# What the Triton kernels cost

Made by `python -m csae.kernels.triton.offline --write` with triton {triton}; no GPU is needed. Every form in which a
launcher launches a kernel is here, compiled for an A100 (sm_80), an H100 (sm_90), a B200 (sm_100) and an MI300
(gfx942). A test fails on a spill, on more shared memory than the GPU has, on a product of tiles without wgmma on
sm_90, and on a gather of rows without loads of 16 bytes.

A cell: registers a thread / KiB of shared memory / matrix instructions / global loads of 16 bytes + narrower ones /
loads from shared memory; then the bytes that are spilled, if any. Instructions are counted as they stand in the code,
a loop's once for each time that it is unrolled. `w` is wgmma, `t` tcgen05, `m` mma or mfma; `b` counts loads of whole
tiles by the tensor memory accelerator.
"""


def _settings(variant: Variant) -> dict[str, int | str]:
    return {**variant.constants, "warps": variant.num_warps, "stages": variant.num_stages}


def _common(of_kernel: list[Variant]) -> str:
    """The settings that all variants of a kernel have in common."""
    first, *others = map(_settings, of_kernel)
    return ", ".join(f"{name}={value}" for name, value in first.items() if all(o[name] == value for o in others))


def _form(variant: Variant, of_kernel: list[Variant]) -> str:
    """The types and settings by which a variant differs from the others of its kernel."""
    types: dict[str, list[str]] = {}
    for name, dtype in variant.tensors.items():
        if any(other.tensors[name] != dtype for other in of_kernel):
            types.setdefault(str(dtype).removeprefix("torch."), []).append(name.removesuffix("_ptr"))
    parts = list(types) if len(types) == 1 else [f"{' '.join(names)}: {dtype}" for dtype, names in types.items()]
    others = [_settings(other) for other in of_kernel]
    parts += [f"{n}={value}" for n, value in _settings(variant).items() if any(o[n] != value for o in others)]
    return ", ".join(parts) or "the only one"


def _cell(compiled: Compiled | str | None) -> str:
    if compiled is None or isinstance(compiled, str):
        return compiled or "not launched"
    matrix = " ".join(f"{number}{name[0]}" for name, number in compiled.matrix.items()) or "0"
    bulk = f"{compiled.bulk_loads}b+" if compiled.bulk_loads else ""
    loads = f"{bulk}{compiled.wide_loads}+{compiled.other_loads}"
    cell = f"{compiled.registers} / {math.ceil(compiled.shared / 1024)} / {matrix} / {loads} / {compiled.shared_loads}"
    return f"{cell}, **spills {compiled.spills}**" if compiled.spills else cell


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the Triton kernels without a GPU")
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="all variants for all targets, into RESOURCES.md")
    parser.add_argument("--afresh", action="store_true", help="compile what is kept in compiled.json too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("words", nargs="*", help="only variants with all of these in their name")
    arguments = parser.parse_args()
    if arguments.write and (arguments.words or arguments.target != list(TARGETS)):
        parser.error("--write: given a choice of variants or targets; needed all of them")
    named = [variant for variant in variants() if all(word in str(variant) for word in arguments.words)]
    chosen = [(variant, target) for variant in named for target in arguments.target]
    found, failures = {}, 0
    known = {} if arguments.afresh or not arguments.write else kept()
    for variant, target, compiled in compile_all(chosen, arguments.processes, known):
        found[str(variant), target] = compiled
        wrong = problems(variant, target, compiled)
        failures += bool(wrong)
        if wrong or not arguments.write:
            print(f"{target:7} {_cell(compiled):40} {variant}", *wrong, sep="  ", flush=True)
    if arguments.write:
        RESOURCES.write_text(report(found))
        KEPT.write_text(kept_text(chosen, found))
    print(f"{len(chosen)} compiled, {failures} with problems")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
