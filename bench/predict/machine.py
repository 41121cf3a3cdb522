"""The machine that times are predicted for, in one place, with where each number comes from."""

from __future__ import annotations

from typing import NamedTuple

DEVICE = "NVIDIA H200"

OPERATIONS = 790e12  # a second, in products of bfloat16: torch.mm of large matrices, measured on an H200
FLOAT32_OPERATIONS = 60e12  # in products of float32 without tensor cores: nine tenths of the data sheet's 67
MEMORY = 4.3e12  # bytes a second: a copy, measured on an H200
L2 = 5.5e12  # bytes a second from the second-level cache: assumed, nearly twice what an H100's memory gives
L2_BYTES = 50 * 2**20  # data sheet
HALF_L2_BYTES = L2_BYTES // 2  # each half caches for its own multiprocessors: what is read by all lies in both

CAPACITY = 139 * 2**30  # bytes of memory that a program sees of an H200
MULTIPROCESSORS = 132  # data sheet (SXM)
CLOCK = 1.75e9  # Hz: assumed; an H200 boosts to 1.98 GHz, and slows down where power runs out
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of one warp a clock
REGISTERS = 65536  # of a multiprocessor
SHARED = (
    227 * 1024
)  # bytes of shared memory of a multiprocessor, of which each program takes 1 KB more than it asks for
WARPS = 64  # a multiprocessor can hold
PROGRAMS = 32  # a multiprocessor can hold

# Warps' instructions that a multiprocessor takes a clock: CUDA C++ Programming Guide, "throughput of native arithmetic
# instructions", compute capability 9.0, divided by 32. Load and store: one warp's request of 4 bytes a thread a clock
# (128 bytes); wider ones take as many times longer.
RATES = {
    "integer": 2.0,  # add, compare, logic, select, shift
    "multiply": 2.0,  # IMAD, which moves and shifts too
    "float": 4.0,
    "shuffle": 1.0,
    "load/store": 1.0,
    "special": 0.5,  # exp2, log2, reciprocals, conversions by the same unit
}

# What a program waits for when it has nothing else to do, in clocks: assumed, from published microbenchmarks of H100
# (Luo et al. 2024, arXiv 2402.13499: 260 clocks to L2, 480 to memory when nothing else runs).
LOAD = 600  # from memory or L2 under load
BARRIER = 40
DEPENDENT = 2.0  # clocks between a warp's instructions: 4 for one that needs the last result, and half do

KERNEL = 2e-6  # seconds: the least that a kernel takes on the device, with the gap before it: assumed
RADIX_PASS = 5e-6  # of cub's radix sort: tiles wait for the counts of those before them: assumed
LAUNCH = 6e-6  # seconds the host needs for a launch from PyTorch: assumed, as the review of the kernels did
WITHIN = 0.3  # how far off a prediction of a kernel is taken to be


class Busy(NamedTuple):
    """How busy a program keeps the units of a multiprocessor, in clocks; and its way through, alone, with waits."""

    issue: float
    units: dict[str, float]
    tensor: float
    alone: float
