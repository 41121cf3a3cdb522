"""Finding and loading the native library.

It is called through ctypes, which releases the GIL during a call. Import never fails: if the library can't be loaded,
`why_not` gives the reason.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import warnings
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch

from csae.versions import DISTRIBUTION

ABI_VERSION = 11
PATH = Path(__file__).with_name("libcsae_cpu.so")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

# csae_type in src/csae_cpu.h
TYPES = {torch.float32: 0, torch.bfloat16: 1}

# csae_status in src/csae_cpu.h
OUT_OF_MEMORY, BAD_INDEX, OUT_OF_RANGE = 2, 3, 4

HOW_TO_GET_IT = (
    "install a C++17 compiler (g++ or clang++) and run "
    f"`pip install --force-reinstall --no-deps --no-cache-dir {DISTRIBUTION}` (with -v to see its build)"
)


class Topk(ctypes.Structure):
    """csae_topk in src/csae_cpu.h"""

    _fields_ = (
        *((name, c_void_p) for name in ("order", "columns", "threshold", "count")),
        *((name, c_int64) for name in ("n", "k", "capacity")),
    )


class Band(ctypes.Structure):
    """csae_band in src/csae_cpu.h"""

    _fields_ = (("floor", c_void_p), ("ceiling", c_void_p))


class Heads(ctypes.Structure):
    """csae_heads in src/csae_cpu.h"""

    _fields_ = (("x", c_void_p), ("stride_b", c_int64), ("stride_t", c_int64), ("stride_h", c_int64))


class Attention(ctypes.Structure):
    """csae_attention in src/csae_cpu.h"""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v")),
        *((name, c_void_p) for name in ("slope", "null", "mask", "starts")),
        *((name, c_int64) for name in ("B", "T", "H", "d_head", "d_value")),
    )


class Memory(ctypes.Structure):
    """csae_memory in src/csae_cpu.h"""

    _fields_ = (
        *(("q", c_void_p), ("q_stride", c_int64)),
        *(("memory", c_void_p), ("memory_stride_b", c_int64), ("memory_stride_l", c_int64)),
        *(("takes_part", c_void_p), ("takes_part_stride", c_int64)),
        *((name, c_void_p) for name in ("slope", "null", "start", "looks")),
        *((name, c_int64) for name in ("B", "L", "H", "d_head", "d_value", "t")),
    )


class SortedPairs(ctypes.Structure):
    """csae_pairs in src/csae_cpu.h"""

    _fields_ = (
        *((name, c_void_p) for name in ("order", "tokens", "ends")),
        *((name, c_int64) for name in ("n_pairs", "d_sae")),
    )


class Gradient(ctypes.Structure):
    """csae_gradient in src/csae_cpu.h"""

    _fields_ = (
        *((name, c_void_p) for name in ("weights", "rows")),
        *((name, c_int64) for name in ("rows_stride", "n", "d")),
        ("type", c_int),
    )


class DenseGradient(ctypes.Structure):
    """csae_dense_gradient in src/csae_cpu.h"""

    _fields_ = (("gradient", Gradient), ("out", c_void_p), ("out_stride", c_int64))


class AdamTable(ctypes.Structure):
    """csae_table in src/csae_cpu.h"""

    _fields_ = (
        ("gradient", Gradient),
        *((name, c_void_p) for name in ("param", "exp_avg", "exp_avg_sq")),
        *((name, c_int64) for name in ("param_stride", "exp_avg_stride", "exp_avg_sq_stride")),
        *((name, c_int) for name in ("moments_type", "unit_rows")),
    )


class AdamStep(ctypes.Structure):
    """csae_adam in src/csae_cpu.h"""

    _fields_ = (
        *((name, c_float) for name in ("step_size", "correction", "eps")),
        *((name, c_float) for name in ("one_minus_beta1", "beta2", "one_minus_beta2")),
        ("seed", c_uint32),
        ("lazy", c_int),
        ("first_row", c_uint32),
    )


# A code's values and indices, their strides, n and k; the table with stride, d_sae, d and type; the result; threads.
_GATHER = [
    *(c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64),
    *(c_void_p, c_int64, c_int64, c_int64, c_int),
    *(c_void_p, c_int64, c_int),
]

_SIGNATURES = {
    "csae_isa": (c_int, []),
    "csae_use_isa": (c_int, [c_int]),
    "csae_use_openmp": (None, [c_void_p]),
    "csae_openmp_file": (c_char_p, []),
    "csae_topk_add": (c_int, [POINTER(Topk), c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int]),
    "csae_topk_add_products": (
        c_int,
        [POINTER(Topk), c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int],
    ),
    "csae_round_pairs": (
        c_int,
        [
            *(c_void_p, c_int64, c_int64, c_int64, c_int),
            *(c_void_p, c_float, c_float, c_int64, c_void_p, c_void_p, c_int),
        ],
    ),
    "csae_topk_finish": (c_int, [POINTER(Topk), c_void_p, c_int64, c_void_p, c_int64, c_int]),
    "csae_topk_settle": (
        c_int,
        [
            *(POINTER(Topk), c_int64, c_void_p, c_int64),
            *(c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p),
            *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int),
        ],
    ),
    "csae_above_add": (
        c_int,
        [POINTER(Topk), POINTER(Band), c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int],
    ),
    "csae_above_finish": (c_int, [POINTER(Topk), c_void_p, c_int64, c_void_p, c_int64, c_int]),
    "csae_above_settle": (
        c_int,
        [
            *(POINTER(Topk), POINTER(Band), c_int64, c_float, c_int, c_void_p, c_int64),
            *(c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p),
            *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int),
        ],
    ),
    "csae_cut": (c_int, [c_void_p, c_int64, c_void_p, *(c_int64,) * 4, c_void_p]),
    "csae_round_rows": (c_int, [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int]),
    "csae_use_huge_pages": (None, [c_void_p, c_int64]),
    "csae_gather_sum": (c_int, _GATHER),
    "csae_gather_dot": (c_int, [c_void_p, c_int64, *_GATHER]),
    "csae_sort_pairs": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int]),
    "csae_feature_sums": (c_int, [POINTER(SortedPairs), POINTER(DenseGradient), c_int, c_int]),
    "csae_adam_rows": (c_int, [POINTER(SortedPairs), POINTER(AdamTable), c_int, POINTER(AdamStep), c_int]),
    "csae_multiply": (
        c_int,
        [
            *(c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64),
            *(c_int64, c_int64, c_int64, c_void_p, c_int64, c_int),
        ],
    ),
    "csae_read_memory": (c_int, [POINTER(Memory), c_void_p, c_int64, c_int]),
    "csae_lookback_forward": (c_int, [POINTER(Attention), c_void_p, c_void_p, c_int]),
    "csae_lookback_backward": (
        c_int,
        [POINTER(Attention), POINTER(Heads), POINTER(Heads), *(c_void_p,) * 6, c_int],
    ),
    "csae_scale_heads": (
        c_int,
        [c_void_p, *(c_int64,) * 3, c_float, c_float, *(c_void_p,) * 3, c_int],
    ),
    "csae_scale_heads_backward": (
        c_int,
        [*(c_void_p,) * 3, *(c_int64,) * 3, c_float, *(c_void_p,) * 3, c_int],
    ),
}


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and why there is none."""
    if not PATH.exists():
        return None, (
            f"the native library was not built: no C++ compiler at install, or its build failed; {HOW_TO_GET_IT}"
        )
    try:
        library = ctypes.CDLL(str(PATH))
        version = c_int.in_dll(library, "csae_abi_version").value
        if version != ABI_VERSION:
            return None, (
                f"the native library {PATH} has ABI version {version}, this package needs {ABI_VERSION}: "
                f"it is left from another install; {HOW_TO_GET_IT}"
            )
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, ValueError, AttributeError) as error:
        return None, f"the native library can't be loaded ({error}); {HOW_TO_GET_IT}"
    library.csae_use_openmp(_parallel_of_torch())
    _keep_freed_memory()
    return library, None


def _keep_freed_memory() -> None:
    """Make glibc keep up to 62 MB of freed memory for the next step.

    By default glibc returns large freed blocks to the system, and their next use costs a page fault a page: 10% of a
    TopK step. But glibc keeps blocks as large as any block freed before, up to 32 MB. So a large block is freed here.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _parallel_of_torch() -> int | None:
    """The address of the GOMP_parallel that torch itself calls, or None if torch has no OpenMP.

    With it the library and torch share one pool of threads, and no second OpenMP runtime is loaded, whatever file this
    torch was linked with. The search is in the dynamic linker's order: libraries preloaded for the whole process, then
    the dependencies of torch.
    """
    for handle in (ctypes.CDLL(None), ctypes.CDLL(torch._C.__file__)):
        try:
            return ctypes.cast(handle.GOMP_parallel, c_void_p).value
        except AttributeError:
            continue
    return None


def available() -> bool:
    """Whether the native library is loaded and can be called."""
    return load()[0] is not None


def why_not() -> str | None:
    """Why the native library can't be called and how to get it, or None if it can."""
    return load()[1]


@functools.cache
def warn_once() -> None:
    """Warn, the first time only, if the native library can't be called, and say why."""
    reason = why_not()
    if reason is not None:
        logging.getLogger("csae").info("PyTorch path on the CPU: %s", reason)
        warnings.warn(f"csae runs on its slower PyTorch path on the CPU: {reason}", RuntimeWarning, stacklevel=3)


def describe() -> dict[str, str | int | None]:
    """What is in use: `library` (path), `isa`, `openmp` (path of the runtime; None if threads are the library's own),
    `threads`. Without the native library all but `threads` are None."""
    library = load()[0]
    openmp = library.csae_openmp_file() if library else None
    return {
        "library": str(PATH) if library else None,
        "isa": ISAS[library.csae_isa()] if library else None,
        "openmp": openmp.decode() if openmp else None,
        "threads": torch.get_num_threads(),
    }


def multiplies_bfloat16() -> bool:
    """Whether the library is loaded and multiplies bfloat16 matrices faster than float32 ones."""
    return available() and ISAS[native().csae_isa()] in ("avx512_bf16", "amx")


def has_matrix_units() -> bool:
    """Whether the library is loaded and multiplies bfloat16 matrices with AMX."""
    return available() and ISAS[native().csae_isa()] == "amx"


def use_isa(isa: str) -> None:
    """Use the instructions of `isa`, one of ISAS. For tests, since the best are chosen at load.

    Raises ValueError if this CPU doesn't have them.
    """
    if isa not in ISAS or native().csae_use_isa(ISAS.index(isa)) != 0:
        raise ValueError(f"isa: given {isa!r}; needed one of {', '.join(ISAS)} that this CPU has")


def native() -> ctypes.CDLL:
    """The library. Raises RuntimeError if it can't be called."""
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    return library


def check_status(function: str, status: int) -> None:
    """Raise an error if a native function's status is not ok."""
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"{function}: no memory for the workspace of its threads")
    if status != 0:
        raise ValueError(f"{function}: the native library refused an argument (status {status})")
