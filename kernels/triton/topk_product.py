"""The product of topk_encode: the pre-activations that can be among the k largest of their row, and group maxima.

topk_encode.py explains the algorithm, and defines A, B and C and the rates behind the predicted times.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .variant import FLOATS, Variant, dot_precision, dtypes_and_precisions, jit, max_or_nan, unit_of, vector_units

# Programs of a gated product for each multiprocessor, which holds one or two: mostly they find no flag set.
GATED_PROGRAMS = 2
# Columns of a group. A larger one makes fewer maxima, 1/GROUP of the pre-activations, and more candidates, k*GROUP.
GROUP = 32


@triton.jit
def blocks_of(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The row and column block of a tile, in grouped order, so that tiles in flight share x and W_enc in L2.

    Tiles cover GROUP_M row blocks of one column block before the next column block.
    """
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    band = tile // (GROUP_M * blocks_n)
    band_m = min(blocks_m - band * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * blocks_n)
    return band * GROUP_M + within % band_m, within // band_m


@triton.jit
def write_hits(
    b_acts,
    o_m,
    m_m,
    block_n,
    bound_ptr,
    acts_ptr,
    maxima_ptr,
    columns,
    stride,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    SUBTRACT: tl.constexpr,
):
    """The epilogue: write all group maxima of a tile, and the groups whose maximum is above their row's bound.

    Groups are a third axis of the tile, which costs a layout conversion: the whole tile passes through shared memory.
    `write_held` does without, for Hopper.
    """
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    o_g = block_n * GROUPS + tl.arange(0, GROUPS)
    o_n = (o_g * GROUP)[None, :, None] + tl.arange(0, GROUP)[None, None, :]
    m_tile = m_m[:, None] & (o_g * GROUP < columns)[None, :]
    o_row = o_m.to(tl.int64)
    p_acts = acts_ptr + o_row[:, None, None] * stride + o_n
    b_grouped = tl.reshape(b_acts, [BLOCK_M, GROUPS, GROUP])
    if SUBTRACT:
        # [BLOCK_M, GROUPS, GROUP]
        b_grouped = tl.load(p_acts, mask=m_tile[:, :, None] & (o_n < columns), other=0.0) - b_grouped
    if not WHOLE:
        b_grouped = tl.where(o_n < columns, b_grouped, float("-inf"))
    b_maxima = tl.reduce(b_grouped, 2, max_or_nan)
    tl.store(maxima_ptr + o_row[:, None] * groups + o_g[None, :], b_maxima, mask=m_tile)
    # [BLOCK_M]
    b_bound = tl.load(bound_ptr + o_m, mask=m_m, other=float("inf"))
    # Not `b_maxima > b_bound`: a NaN maximum must count as a hit, and so must everything if the bound is NaN.
    m_hit = (m_tile & ~(b_maxima <= b_bound[:, None]))[:, :, None]
    if not WHOLE:
        m_hit = m_hit & (o_n < columns)
    tl.store(p_acts, b_grouped, mask=m_hit)


@triton.jit
def multiply_tile(
    x_ptr,
    W_ptr,
    o_m,
    o_n,
    m_m,
    m_n,
    d_in,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32: x[o_m, :depth] W_enc[o_n, :depth]^T."""
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + o_m.to(tl.int64)[:, None] * d_in + o_k[None, :]
    p_W = W_ptr + o_n.to(tl.int64)[:, None] * d_in + o_k[None, :]
    b_acts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        m_k = o_k < depth - start
        # [BLOCK_M, BLOCK_K]
        b_x = tl.load(p_x + start, mask=m_m[:, None] & m_k[None, :], other=0.0)
        # [BLOCK_N, BLOCK_K]
        b_W = tl.load(p_W + start, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_acts = tl.dot(b_x, b_W.T, b_acts, input_precision=PRECISION)
    return b_acts


@triton.jit
def wanted_rows(only_ptr, o_m, m_m):
    """m_m [BLOCK_M] without rows that are zero in `only`, and whether any is left."""
    # [BLOCK_M]
    m_m = m_m & (tl.load(only_ptr + o_m, mask=m_m, other=0) != 0)
    return m_m, tl.max(m_m.to(tl.int32), 0) > 0


@triton.jit
def tiles_wanted(only_ptr, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles a gated product goes through: none where no row is wanted, which is known at once."""
    b_only = tl.zeros([4096], tl.int32)  # so many at once, because each turn waits for its flags
    for start in range(0, rows, 4096):
        o_m = start + tl.arange(0, 4096)
        # [4096]
        b_only |= tl.load(only_ptr + o_m, mask=o_m < rows, other=0)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    return tl.where(tl.max((b_only != 0).to(tl.int32), 0) > 0, tiles, 0)


@triton.jit
def _pre_acts_tile(
    tile, x_ptr, W_ptr, bias_ptr, bound_ptr, acts_ptr, maxima_ptr, only_ptr, first, rows, columns, d_in, stride, groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, SUBTRACT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """A tile of `_pre_acts`."""
    block_m, block_n = blocks_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    m_n = o_n < columns
    wanted = True
    if GATED:
        m_m, wanted = wanted_rows(only_ptr + first, o_m, m_m)
    if wanted:
        b_acts = multiply_tile(
            x_ptr, W_ptr, first + o_m, o_n, m_m, m_n, d_in, d_in, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if not SUBTRACT:
            # [BLOCK_N]
            b_acts += tl.load(bias_ptr + o_n, mask=m_n, other=0.0)[None, :]
        write_hits(
            b_acts, o_m, m_m, block_n, bound_ptr, acts_ptr, maxima_ptr, columns, stride, groups,
            BLOCK_M, BLOCK_N, GROUP, WHOLE, SUBTRACT,
        )  # fmt: skip


# acts[r, f] = <x[first + r], W_enc[f]> + b_enc[f], in groups of columns whose maximum is above bound[r]; other groups
# are not written. maxima[r, g] = the largest of columns g GROUP to (g + 1) GROUP - 1, NaN if one is NaN.
# SUBTRACT: acts[r, f] -= <x[first + r], W_enc[f]>, without bias. GATED: only rows that are set in `only`.
#
# A program: a tile [BLOCK_M, BLOCK_N]; GATED: every `programs`-th tile, or none where no row is set. Any width and
# stride will do; with UNIT > 1 (d_in a multiple of UNIT, columns of GROUP) it loads and stores 16 bytes at a time.
# Operations: 2 rows d_in columns. Bytes: x once; W_enc once for GROUP_M row blocks, from L2 if a range of it fits
# (A 10, B 34, C 61 MB); written 4 for each column of a group above the bound, and 4 a group.
# Floor: the operations, by tensor cores. Predicted (bench/predict): A 0.57, B 3.23, C 11.4 ms; the bytes
# alone take A 0.14, B 0.7, C 2.1 ms with GROUP_M = 16. Written are A 0.43, B 0.54, C 0.66 GB of 1.1, 2.1, 4.3 GB of
# pre-activations: all of the first range, k/q groups a row in the range after q others, and the maxima.
# Predicted for SUBTRACT with d_in = 512: by bytes (4 read a column, about a quarter written) A 0.45, B 0.89, C 1.79 ms;
# by operations A 0.34, B 0.69, C 1.38 ms. For GATED where no row is set: the launch.
@jit
def _pre_acts(
    x_ptr,
    W_ptr,
    bias_ptr,
    bound_ptr,
    acts_ptr,
    maxima_ptr,
    only_ptr,
    first: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    units: tl.int32,
    programs: tl.int32,
    stride: tl.int32,
    groups: tl.int32,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    SUBTRACT: tl.constexpr,
    GATED: tl.constexpr,
):
    WHOLE: tl.constexpr = UNIT > 1
    d_in = units * UNIT
    if WHOLE:
        stride = stride * GROUP
    if GATED:
        tiles = tiles_wanted(only_ptr + first, rows, columns, BLOCK_M, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, programs):
            _pre_acts_tile(
                tile, x_ptr, W_ptr, bias_ptr, bound_ptr, acts_ptr, maxima_ptr, only_ptr, first, rows, columns, d_in,
                stride, groups, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, GROUP, PRECISION, WHOLE, SUBTRACT, GATED,
            )  # fmt: skip
    if not GATED:
        _pre_acts_tile(
            tl.program_id(0), x_ptr, W_ptr, bias_ptr, bound_ptr, acts_ptr, maxima_ptr, only_ptr, first, rows, columns,
            d_in, stride, groups, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, GROUP, PRECISION, WHOLE, SUBTRACT, GATED,
        )  # fmt: skip


@triton.jit
def write_held(
    b_acts,
    first_m,
    block_n,
    b_bound,
    acts_ptr,
    maxima_ptr,
    rows,
    columns,
    stride,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What `write_hits` does, where columns are whole groups; on Hopper no pre-activation passes through shared memory.

    A wgmma leaves rows l and l + 8 of its 16, and columns 2 q and 2 q + 1 of each 8, in lane 4 l + q. Seen with an axis
    for each of these, lanes first, and what a thread holds last, the tile is laid out as the compiler lays out a tile
    that is stored. So a store writes whole sectors of 32 bytes from where the products lie, and a group's maximum takes
    two shuffles.
    """
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    WARPS: tl.constexpr = BLOCK_M // 16
    EIGHTS: tl.constexpr = GROUP // 8
    o_m = first_m + tl.arange(0, BLOCK_M)
    o_g = block_n * GROUPS + tl.arange(0, GROUPS)
    m_tile = (o_m < rows)[:, None] & (o_g * GROUP < columns)[None, :]
    # Axes: q, l, warp, eight columns, group, half of 16 rows, two columns. Only constants are added last, so that the
    # compiler keeps two addresses a thread.
    o_row = tl.arange(0, 8)[None, :, None, None, None, None, None]
    o_row += 16 * tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    o_row += 8 * tl.arange(0, 2)[None, None, None, None, None, :, None]
    o_q = 2 * tl.arange(0, 4)[:, None, None, None, None, None, None]
    o_held = 8 * tl.arange(0, EIGHTS)[None, None, None, :, None, None, None]
    o_held += GROUP * tl.arange(0, GROUPS)[None, None, None, None, :, None, None]
    o_held += tl.arange(0, 2)[None, None, None, None, None, None, :]
    p_acts = acts_ptr + block_n * BLOCK_N + (first_m + o_row).to(tl.int64) * stride + o_q + o_held
    b_maxima = tl.reduce(tl.reshape(b_acts, [BLOCK_M, GROUPS, GROUP]), 2, max_or_nan)
    tl.store(maxima_ptr + o_m.to(tl.int64)[:, None] * groups + o_g[None, :], b_maxima, mask=m_tile)
    # Not `b_maxima > b_bound`: a NaN maximum must count as a hit, and so must everything if the bound is NaN.
    m_hit = m_tile & ~(b_maxima <= b_bound[:, None])
    m_hit = tl.permute(tl.reshape(m_hit, [WARPS, 2, 8, GROUPS, 1, 1, 1]), (5, 2, 0, 4, 3, 1, 6))
    b_held = tl.permute(tl.reshape(b_acts, [WARPS, 2, 8, GROUPS, EIGHTS, 4, 2]), (5, 2, 0, 4, 3, 1, 6))
    tl.store(p_acts, b_held, mask=m_hit)


@triton.jit
def bias_of(block_n, bias_ptr, columns, BLOCK_N: tl.constexpr):
    """[BLOCK_N] the biases of a tile's columns."""
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(bias_ptr + o_n, mask=o_n < columns, other=0.0)


@triton.jit
def needed_at_the_end(
    tile, programs, tiles, bound_ptr, bias_ptr, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The row and column block of a tile, the bounds [BLOCK_M] of its rows, and the biases [BLOCK_N] of the next."""
    block_m, block_n = blocks_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    _, next_n = blocks_of(tl.minimum(tile + programs, tiles - 1), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_bound = tl.load(bound_ptr + o_m, mask=o_m < rows, other=float("inf"))
    return block_m, block_n, b_bound, bias_of(next_n, bias_ptr, columns, BLOCK_N)


# The same for Hopper and later, with TMA loads, in a persistent kernel. d_in must be a multiple of 16 bytes, and the
# columns whole groups.
#
# A program: every `programs`-th tile [BLOCK_M, BLOCK_N]; RESIDENT programs a multiprocessor. The loops over tiles and
# over d_in are one, so the first blocks of the next tile arrive while this one is written. Not by flatten=True of
# tl.range: with it loads are not pipelined where products start from the biases, which saves adding them, and zeros.
# GROUP_M = 16 makes the 132 tiles that an H100 has in flight a square: 16 blocks of 128 rows by 8 of 256 columns.
# Shared memory can feed tiles of 128 x 256: for 64 of d_in, the 16-bit products take 1024 cycles, and so do 48 KB into
# and 80 KB out of shared memory, at 128 bytes a cycle. For 128 x 128 it would be 512 cycles against 640: what two
# programs of such tiles hide (RESIDENT = 2), or two groups of warps that take turns, they lose there.
# EARLY: what a tile's end needs is loaded at every step, which takes nothing while a product is made; not from block_m
# and block_n, or loads of tiles would wait for that end. On Blackwell it spills.
# Bytes, operations and floor: as `_pre_acts`. Counted from SASS (sm_90), a tile's end has 468 instructions and 3
# barriers, and waits for no load; through shared memory it had 1,102, and 13, and waited for one. It takes about 1,200
# cycles, against 14,700 of products at A, 44,000 at B, 78,000 at C.
@jit
def _pre_acts_tma(
    x_desc,
    W_desc,
    bias_ptr,
    bound_ptr,
    acts_ptr,
    maxima_ptr,
    rows: tl.int32,
    columns: tl.int32,
    steps: tl.int32,
    stride: tl.int32,
    groups: tl.int32,
    programs: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
    EARLY: tl.constexpr,
):
    tl.assume(steps > 0)
    stride = stride * GROUP
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) - programs
    written = tl.program_id(0)
    step = -1
    block_m, block_n = blocks_of(written, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    b_acts = tl.broadcast_to(bias_of(block_n, bias_ptr, columns, BLOCK_N)[None, :], [BLOCK_M, BLOCK_N])
    for _ in range(tl.cdiv(tiles - written, programs) * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += programs
            block_m, block_n = blocks_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]; TMA fills in zeros outside the tensors
        b_x = x_desc.load([block_m * BLOCK_M, step * BLOCK_K])
        b_W = W_desc.load([block_n * BLOCK_N, step * BLOCK_K])
        if EARLY:
            this_m, this_n, b_bound, b_bias = needed_at_the_end(
                written, programs, tiles, bound_ptr, bias_ptr, rows, columns, BLOCK_M, BLOCK_N, GROUP_M
            )
        b_acts = tl.dot(b_x, b_W.T, b_acts, input_precision=PRECISION)
        if step == steps - 1:
            if not EARLY:
                this_m, this_n, b_bound, b_bias = needed_at_the_end(
                    written, programs, tiles, bound_ptr, bias_ptr, rows, columns, BLOCK_M, BLOCK_N, GROUP_M
                )
            write_held(
                b_acts, this_m * BLOCK_M, this_n, b_bound, acts_ptr, maxima_ptr, rows, columns, stride, groups,
                BLOCK_M, BLOCK_N, GROUP,
            )  # fmt: skip
            written += programs
            b_acts = tl.broadcast_to(b_bias[None, :], [BLOCK_M, BLOCK_N])


def product_variant(dtype: torch.dtype, precision: str, unit: int, subtract: bool = False) -> Variant:
    """`_pre_acts` for x and W_enc of `dtype`, in units of `unit`."""
    if precision == "ieee":
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
    else:
        # Loads of single elements go through registers (cp.async takes 4 bytes or more), so smaller blocks fit.
        bytes_k = 128 if unit > 1 or dtype == torch.float32 else 64
        block_n = 64 if subtract and unit == 1 else 128
        blocks = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": bytes_k // dtype.itemsize}
    floats = {name: torch.float32 for name in ("bias_ptr", "bound_ptr", "acts_ptr", "maxima_ptr")}
    return Variant(
        _pre_acts,
        {"x_ptr": dtype, "W_ptr": dtype, **floats, "only_ptr": torch.int32},
        {
            "UNIT": unit, **blocks, "GROUP_M": 8, "GROUP": GROUP, "PRECISION": precision,
            "SUBTRACT": subtract, "GATED": False,
        },
        num_warps=8,
        num_stages=3,
    )  # fmt: skip


# Tried for sm_90 with triton 3.6.0 and 3.9.0, compiled and never run: warps that multiply while others write, to hide a
# tile's end (A takes 0.571 ms, its products 0.522).
# - tl.range(warp_specialize=True), around the one loop or, of two, around either: with 8 warps the machine code is the
#   same as without; with 4 the compiler's pass fails, or the code spills.
# - Gluon, one warp that loads by TMA and two groups of 4 warps: it compiles, 168 registers a thread, no spill.
#   The groups take turns, each with its own tiles of 64 x 256 or 128 x 128: 64 of d_in take 640 cycles of shared memory
#   and 613 of products, so A 0.545 ms or more; and L2 would give 15.5 or 12.4 TB/s, where it gives 9.3 to 128 x 256.
#   Each group takes 64 rows of every tile of 128 x 256 and goes on as blocks come, in a ring of 8 blocks of 32 of d_in
#   (197 KB): loads are what they are now. An end has 671 instructions and takes about 1,950 cycles, while the other
#   group multiplies for 7,400: A 0.525 ms by the cost model, and topk_encode 0.67 where it takes 0.715.
# The last is not used, because the interpreter runs no Gluon, and a wrong barrier hangs: a GPU has to test it. 3.6 and
# 3.9 also name its loads differently.
def tma_variant(dtype: torch.dtype, early: bool = True) -> Variant:
    """`_pre_acts_tma` for x and W_enc of `dtype`; early: on Hopper."""
    block_n = 256 if dtype.itemsize == 2 else 128
    blocks = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 128 // dtype.itemsize}
    floats = {name: torch.float32 for name in ("bias_ptr", "bound_ptr", "acts_ptr", "maxima_ptr")}
    return Variant(
        _pre_acts_tma,
        {"x_desc": dtype, "W_desc": dtype, **floats},
        {
            **blocks,
            "GROUP_M": 16,
            "GROUP": GROUP,
            "PRECISION": "tf32",
            "RESIDENT": 1,
            "EARLY": early and block_n == 256,
        },
        num_warps=8,
        num_stages=3,
        descriptors={"x_desc": ("BLOCK_M", "BLOCK_K"), "W_desc": ("BLOCK_N", "BLOCK_K")},
    )


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel, unless another was tuned for a device."""
    products = [
        product_variant(dtype, precision, unit, subtract=subtract)
        for subtract in (False, True)
        for dtype, precision in dtypes_and_precisions()
        for unit in vector_units(dtype)
    ]
    tma = [tma_variant(dtype, early) for early in (True, False) for dtype in FLOATS]
    return [*products, *{str(variant): variant for variant in tma}.values()]


def only_on(variant: Variant) -> tuple[str, ...] | None:
    """The targets of `offline` that a variant is launched on; None if that is all that can launch it."""
    return ("sm_90",) if variant.constants.get("EARLY") else None


def candidates(variant: Variant) -> list[Variant]:
    """Other forms in which it can be launched, for `tuning` to choose from."""
    changes: list[dict[str, int]] = []
    if variant.kernel is _pre_acts_tma:
        changes = [{"num_stages": 4}, {"GROUP_M": 8}]
        if variant.tensors["x_desc"].itemsize == 2:
            # With two programs a multiprocessor, one multiplies while the other writes.
            changes.append({"BLOCK_N": 128, "num_warps": 4, "RESIDENT": 2})
    elif variant.kernel is _pre_acts and variant.constants["UNIT"] > 1 and variant.constants["PRECISION"] != "ieee":
        changes = [{"num_stages": 4}, {"GROUP_M": 16}]
    return [tuning.changed(variant, change) for change in changes]


def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _programs(device: torch.device) -> int:
    """The number of multiprocessors. 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def programs_of(product: Variant, device: torch.device) -> int:
    """How many programs run at a time, of a persistent kernel exactly: RESIDENT on each multiprocessor."""
    return _programs(device) * product.constants.get("RESIDENT", 1)


def best_product(x: Tensor, d_sae: int) -> Variant:
    """The fastest known form to multiply x [n, d_in] by W_enc [d_sae, d_in] on x's device."""
    unit = unit_of(x.dtype, x.shape[1]) if d_sae % GROUP == 0 and x.shape[1] else 1
    precision = dot_precision(x.dtype)
    if unit > 1 and precision != "ieee" and _has_tma(x.device):
        return tuning.best(tma_variant(x.dtype, _is_hopper(x.device)), x.device)
    return tuning.best(product_variant(x.dtype, precision, unit), x.device)


def launch_product(
    product: Variant,
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    bound: Tensor,
    acts: Tensor,
    stride: int,
    maxima: Tensor,
    first: int,
    chunk: int,
    only: Tensor | None = None,
) -> None:
    """Launch `product` for rows first .. first + chunk of x and all of W_enc. The result begins at acts[0, 0]."""
    grid, (x_given, W_given, *sizes) = product_grid(product, x, W_enc, first, chunk)
    tensors = (x_given, W_given, bias, bound, acts, maxima)
    groups = maxima.shape[1]
    if product.kernel is _pre_acts_tma:
        *sizes, programs = sizes
        product.launch(grid, *tensors, *sizes, stride // GROUP, groups, programs)
    else:
        gate, (programs,) = maxima.view(torch.int32), grid
        if only is not None:
            gate, programs = only, min(programs, GATED_PROGRAMS * _programs(x.device))
        stride = stride // GROUP if product.constants["UNIT"] > 1 else stride
        product.launch((programs,), *tensors, gate, *sizes, programs, stride, groups)


def product_grid(product: Variant, x: Tensor, W_enc: Tensor, first: int, chunk: int) -> tuple[tuple[int], list[Any]]:
    """The grid for rows first .. first + chunk of x and all of W_enc, and the arguments that stand for these."""
    (here, d_in), constants = W_enc.shape, product.constants
    tiles = triton.cdiv(chunk, constants["BLOCK_M"]) * triton.cdiv(here, constants["BLOCK_N"])
    if not product.descriptors:
        return (tiles,), [x, W_enc, first, chunk, here, d_in // constants["UNIT"]]
    programs = min(tiles, programs_of(product, x.device))
    # Not x.stride(): the stride of a single row may be any number, which TMA would refuse.
    x_desc = TensorDescriptor(x[first : first + chunk], [chunk, d_in], [d_in, 1], product.block("x_desc"))
    W_desc = TensorDescriptor(W_enc, [here, d_in], [d_in, 1], product.block("W_desc"))
    return (programs,), [x_desc, W_desc, chunk, here, triton.cdiv(d_in, constants["BLOCK_K"]), programs]
