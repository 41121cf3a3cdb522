"""The product of topk_encode: pre-activations that can be among the k largest of their row, and maxima of groups.

The scheme that it belongs to, and the shapes and rates that predicted times are for, are in topk_encode.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .variant import FLOATS, Variant, dot_precision, dtypes_and_precisions, jit, max_or_nan, unit_of, vector_units

GROUP = 32  # columns in a group: the maxima cost 1/GROUP of the pre-activations, the candidates up to k*GROUP


@triton.jit
def blocks_of(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tiles go down GROUP_M row blocks before the next column block: those in flight share x and W_enc in L2."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    band = tile // (GROUP_M * blocks_n)
    band_m = min(blocks_m - band * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * blocks_n)
    return band * GROUP_M + within % band_m, within // band_m


@triton.jit
def _write_hits(
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
    """The maxima of a tile's groups, and the groups whose maximum is above the bound of their row, to memory.

    Everything stays in the registers where the product left it, groups as a third axis: layouts are not converted.
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
    # Not "above": a NaN is above any bound, and everything is above a bound of NaN.
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
    """x[o_m, :depth] W_enc[o_n, :depth]^T, in float32."""
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


# acts[r, f] = <x_{first+r}, W_enc_f> + b_enc_f where its group of columns has a maximum above bound[r], and
# maxima[r, g] = the largest of columns g*GROUP : (g+1)*GROUP, NaN if one is NaN. With SUBTRACT, in place:
# acts[r, f] - <x_{first+r}, W_enc_f>. With GATED, only rows of `only`; a tile without one costs a load.
#
# A program makes a tile [BLOCK_M, BLOCK_N], for any width and stride: where they are multiples of UNIT > 1, and the
# columns of GROUP, it loads and stores 16 bytes at a time.
# Operations: 2 rows d_in columns. Bytes: x once; W_enc once for every GROUP_M row blocks, from L2 where a range of it
# fits (A 10, B 34, C 61 MB); written 4 bytes for each column of a group above the bound and 4 a group.
# Floor: the operations, at the rate of the tensor cores. Predicted for all ranges, A 0.52, B 3.10, C 11.0 ms; the
# bytes would take A 0.14, B 0.7, C 2.1 ms with GROUP_M = 16. Written are A 0.32, B 0.49, C 0.61 GB of
# 1.1, 2.1, 4.3 GB of pre-activations: one range, k/q groups a row in the range after q others, and the maxima.
# With SUBTRACT and d_in = 512, bytes and operations come close: 4 bytes read a column, and about a quarter of them
# written; A 0.45, B 0.89, C 1.79 ms by bytes, 0.34, 0.69, 1.38 ms by operations.
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
    block_m, block_n = blocks_of(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    m_n = o_n < columns
    depth = d_in
    if GATED:
        # [BLOCK_M]
        m_m = m_m & (tl.load(only_ptr + first + o_m, mask=m_m, other=0) != 0)
        depth = tl.where(tl.max(m_m.to(tl.int32), 0) > 0, d_in, 0)
    b_acts = multiply_tile(x_ptr, W_ptr, first + o_m, o_n, m_m, m_n, d_in, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if not SUBTRACT:
        # [BLOCK_N]
        b_acts += tl.load(bias_ptr + o_n, mask=m_n, other=0.0)[None, :]
    _write_hits(
        b_acts, o_m, m_m, block_n, bound_ptr, acts_ptr, maxima_ptr, columns, stride, groups,
        BLOCK_M, BLOCK_N, GROUP, WHOLE, SUBTRACT,
    )  # fmt: skip


# The same for widths that are multiples of 16 bytes and whole groups of columns, on Hopper and later.
#
# GROUP_M = 16 makes the 132 tiles that an H100 has in flight a square: 16 blocks of 128 rows, 8 of 256 columns.
# RESIDENT programs a multiprocessor walk over the tiles, and a TMA descriptor fetches the blocks of x and W_enc. With
# FLATTEN the loops are one: the first blocks of the next tile arrive while the last one is written. A tile of
# 128 x 256 is what shared memory can feed: per step of 64 it takes 1024 cycles to multiply in 16 bits, and 48 KB in
# and 80 KB out of shared memory at 128 bytes a cycle take 1024 as well; 128 x 128 takes 512 and 640. The epilogue is
# about 900 instructions a warp, 2000 cycles a tile: against 12,288 of products at A, 36,864 at B, 65,536 at C. The
# forms with two small programs a multiprocessor hide it behind the other's products; a GPU has to say which wins.
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
    FLATTEN: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    tl.assume(steps > 0)
    stride = stride * GROUP
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        block_m, block_n = blocks_of(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        b_acts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], zeros outside the tensors
            b_x = x_desc.load([block_m * BLOCK_M, step * BLOCK_K])
            b_W = W_desc.load([block_n * BLOCK_N, step * BLOCK_K])
            b_acts = tl.dot(b_x, b_W.T, b_acts, input_precision=PRECISION)
        o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # [BLOCK_N]
        b_acts += tl.load(bias_ptr + o_n, mask=o_n < columns, other=0.0)[None, :]
        _write_hits(
            b_acts, o_m, o_m < rows, block_n, bound_ptr, acts_ptr, maxima_ptr, columns, stride, groups,
            BLOCK_M, BLOCK_N, GROUP, True, False,
        )  # fmt: skip


def product_variant(dtype: torch.dtype, precision: str, unit: int, subtract: bool = False) -> Variant:
    """`_pre_acts` for x and W_enc of `dtype`, in units of `unit`."""
    if precision == "ieee":
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
    else:
        # Loads of single elements are not copied straight to shared memory: fewer of them fit the registers.
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


def tma_variant(dtype: torch.dtype) -> Variant:
    """`_pre_acts_tma` for x and W_enc of `dtype`."""
    block_n = 256 if dtype.itemsize == 2 else 128
    blocks = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 128 // dtype.itemsize}
    floats = {name: torch.float32 for name in ("bias_ptr", "bound_ptr", "acts_ptr", "maxima_ptr")}
    return Variant(
        _pre_acts_tma,
        {"x_desc": dtype, "W_desc": dtype, **floats},
        {**blocks, "GROUP_M": 16, "GROUP": GROUP, "PRECISION": "tf32", "FLATTEN": True, "RESIDENT": 1},
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
    return [*products, *(tma_variant(dtype) for dtype in FLOATS)]


def candidates(variant: Variant) -> list[Variant]:
    """Other forms of a product that its launcher may take: for `make gpu` to try and `tuned.json` to name."""
    changes: list[dict[str, int]] = []
    if variant.kernel is _pre_acts_tma:
        changes = [{"num_stages": 4}, {"FLATTEN": False, "num_stages": 4}, {"GROUP_M": 8}]
        if variant.tensors["x_desc"].itemsize == 2:
            # Two programs a multiprocessor: one multiplies while the other writes.
            twice = {"BLOCK_N": 128, "num_warps": 4, "RESIDENT": 2}
            changes += [twice, {**twice, "FLATTEN": False}]
    elif variant.kernel is _pre_acts and variant.constants["UNIT"] > 1 and variant.constants["PRECISION"] != "ieee":
        changes = [{"num_stages": 4}, {"GROUP_M": 16}]
    return [tuning.changed(variant, change) for change in changes]


def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def best_product(x: Tensor, d_sae: int) -> Variant:
    """The form in which x [n, d_in] is multiplied by W_enc [d_sae, d_in] on x's device."""
    unit = unit_of(x.dtype, x.shape[1]) if d_sae % GROUP == 0 and x.shape[1] else 1
    precision = dot_precision(x.dtype)
    if unit > 1 and precision != "ieee" and _has_tma(x.device):
        return tuning.best(tma_variant(x.dtype), x.device)
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
    """Launch `product` for rows first .. first + chunk of x and all of W_enc; acts starts where they are to go."""
    grid, (x_given, W_given, *sizes) = product_grid(product, x, W_enc, first, chunk)
    tensors = (x_given, W_given, bias, bound, acts, maxima)
    groups = maxima.shape[1]
    if product.kernel is _pre_acts_tma:
        *sizes, programs = sizes
        product.launch(grid, *tensors, *sizes, stride // GROUP, groups, programs)
    else:
        gate = maxima.view(torch.int32) if only is None else only
        stride = stride // GROUP if product.constants["UNIT"] > 1 else stride
        product.launch(grid, *tensors, gate, *sizes, stride, groups)


def product_grid(product: Variant, x: Tensor, W_enc: Tensor, first: int, chunk: int) -> tuple[tuple[int], list[Any]]:
    """The grid of a product of rows first .. first + chunk of x and all of W_enc, and what it is given of them."""
    (here, d_in), constants = W_enc.shape, product.constants
    tiles = triton.cdiv(chunk, constants["BLOCK_M"]) * triton.cdiv(here, constants["BLOCK_N"])
    if not product.descriptors:
        return (tiles,), [x, W_enc, first, chunk, here, d_in // constants["UNIT"]]
    programs = min(tiles, _programs(x.device) * constants["RESIDENT"])
    # The strides are named: that of a single row can be any number.
    x_desc = TensorDescriptor(x[first : first + chunk], [chunk, d_in], [d_in, 1], product.block("x_desc"))
    W_desc = TensorDescriptor(W_enc, [here, d_in], [d_in, 1], product.block("W_desc"))
    return (programs,), [x_desc, W_desc, chunk, here, triton.cdiv(d_in, constants["BLOCK_K"]), programs]
