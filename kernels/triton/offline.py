"""Compile every kernel in every form that it can be launched in, without a GPU, and say what each costs.

`variants` lists what the launchers launch; `compile_for` builds one for an architecture with the ptxas of
triton's own wheel; `problems` says what is wrong with the result. Run as a module it prints a table:

    python -m csae.kernels.triton.offline [--arch 90] [words that must be in the variant's name]

Not under TRITON_INTERPRET=1: then triton makes no kernels to compile.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import lookback_attention, sparse_decode, topk_encode
from .variant import Variant

# Compute capability -> bytes of shared memory that one program may have.
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TARGETS = (80, 90, 100)
GATHERS = (
    sparse_decode._gather_sum,
    sparse_decode._gather_dot,
    sparse_decode._feature_pieces,
    sparse_decode._feature_sum,
)


class Compiled(NamedTuple):
    """What a variant became on one architecture."""

    variant: Variant
    arch: int
    registers: int  # a thread
    spills: int  # bytes a thread that ptxas keeps in local memory
    shared: int  # bytes a program
    ptx: str
    sass: str


def variants() -> list[Variant]:
    """Every form in which a launcher launches a kernel."""
    return [variant for module in (topk_encode, sparse_decode, lookback_attention) for variant in module.variants()]


def compile_for(variant: Variant, arch: int) -> Compiled:
    """Compile for compute capability arch / 10; the pointers are taken to be 16-byte aligned, as they always are."""
    signature = variant.signature()
    pointers = [position for position, type_ in enumerate(signature.values()) if type_.startswith("*")]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs=variant.constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in pointers},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "--print-code", file.name)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return Compiled(
        variant,
        arch,
        registers=int(found["REG"]),
        spills=int(found["STACK"]) + int(found["LOCAL"]),
        shared=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


def problems(compiled: Compiled) -> list[str]:
    """What keeps a compiled variant from being good enough to launch."""
    found = []
    if compiled.spills:
        found.append(f"spills {compiled.spills} bytes a thread")
    if compiled.shared > SHARED_MEMORY[compiled.arch]:
        found.append(f"needs {compiled.shared} bytes of shared memory of {SHARED_MEMORY[compiled.arch]}")
    constants = compiled.variant.constants
    # Only wgmma reaches the full rate of Hopper's tensor cores.
    to_tensor_cores = compiled.variant.kernel is topk_encode._pre_acts and constants["PRECISION"] != "ieee"
    if compiled.arch == 90 and to_tensor_cores and "wgmma.mma_async" not in compiled.ptx:
        found.append("multiplies without wgmma")
    if compiled.variant.kernel in GATHERS and constants["UNIT"] > 1:
        wide = len(re.findall(r"\bLDG\.E\.(?:[A-Z0-9]+\.)*128\b", compiled.sass))
        if wide < constants["ROWS"]:
            found.append(f"gathers {constants['ROWS']} rows with {wide} loads of 16 bytes")
    return found


def _run(tool: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the Triton kernels without a GPU")
    parser.add_argument("--arch", type=int, nargs="*", choices=sorted(SHARED_MEMORY), default=list(TARGETS))
    parser.add_argument("words", nargs="*", help="only variants with all of these in their name")
    arguments = parser.parse_args()
    failures = 0
    print("arch  registers  spills  shared  variant")
    for variant in variants():
        if not all(word in str(variant) for word in arguments.words):
            continue
        for arch in arguments.arch:
            compiled = compile_for(variant, arch)
            wrong = problems(compiled)
            failures += bool(wrong)
            numbers = f"{arch:4}  {compiled.registers:9}  {compiled.spills:6}  {compiled.shared:6}"
            print(f"{numbers}  {variant}", *wrong, sep="  ", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
