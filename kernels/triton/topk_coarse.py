"""topk_encode of float32, exact, by one product of float16 and a few dot products of float32.

It is the method of kernels/cpu/topk_coarse.py, which has the proof. Products of rounded numbers bound every
pre-activation from above; the features with the largest bounds are multiplied again in float32, until the next bound is
below all of k of these. Then no other feature can be among the k largest.

With dx = x - float16(x), dw likewise and d = d_in, a pre-activation is at most

    <float16(x), float16(w)> + b + (|dx| + 2^-22 d |x|) |w| + |float16(x)| |dw|

a product of rows that are two numbers wider. 2^-22 d |x| |w| is more than what two sums may lose: one of float32 in any
order, d 2^-24, and one of the tensor cores, which cut off the 17 numbers that they add at a time: d 2^-23 at most. The
bias is raised by as much of itself.

1. `_scale` finds a power of two each for x and W_enc, from a sample of rows, that brings numbers near one, so that few
   are below what float16 rounds well. Whatever it finds, the bounds hold; where numbers overflow, nothing is proven.
2. `_round` writes both in float16, with the lengths beside them.
3. The kernels of topk_encode.py find the `n_kept(k)` largest bounds of each row.
4. `_settle_exact` multiplies candidates in float32, the largest bounds first.
5. Rows without a proof go through topk_encode.py with a product in float32, gated by a flag a row. The host does not
   read the flags.

float16 and not bfloat16: its error is an eighth. For random numbers the bounds are about 6e-4 (A), 1e-3 (B) and 1.4e-3
(C) of |x| |w| above the pre-activations, and k to 1.4 k features reach the k-th largest; in bfloat16 up to 2.1 k.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .topk_keys import to_float, to_pairs
from .topk_product import GROUP, best_product, product_variant
from .variant import Variant, jit, unit_of, vector_units

# With fewer rows or features, or narrower ones, rounding W_enc costs more than the product saves. In wider rows the
# error of a length, summed in float32, may exceed what the bound allows for.
LEAST_ROWS, LEAST_WIDTH, MOST_WIDTH = 256, 128, 1 << 16
LEAST_COLUMNS_PER_CANDIDATE = 16
MOST_K = 96
BESIDE = 8  # columns beside the numbers: two lengths and zeros, so that rows stay multiples of 16 bytes
_LEAST_PAIR = tl.constexpr(-(2**63))


def n_kept(k: int) -> int:
    """Features of a row whose bounds are kept: what a program sorts at once."""
    return 64 if k <= 32 else 128


def worthwhile(x: Tensor, W_enc: Tensor, k: int) -> bool:
    """Whether this is a gain for x [n, d_in] and W_enc [d_sae, d_in] in float32."""
    n, (d_sae, d_in) = x.shape[0], W_enc.shape
    wide = LEAST_WIDTH <= d_in <= MOST_WIDTH
    return n >= LEAST_ROWS and k <= MOST_K and wide and d_sae >= LEAST_COLUMNS_PER_CANDIDATE * n_kept(k)


# scales[0] and scales[1] = powers of two that bring SAMPLED rows of x and of W_enc to a root mean square between 1 and
# 2; 1 where that is zero or no number. Two programs. Floor: the launch.
@jit
def _scale(
    x_ptr,
    W_ptr,
    scales_ptr,
    rows: tl.int32,
    columns: tl.int32,
    d_in: tl.int32,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(0)
    height = tl.where(which == 0, rows, columns)
    o_r = (tl.arange(0, SAMPLED) * (height.to(tl.int64) - 1)) // (SAMPLED - 1)
    given = x_ptr
    if which == 1:
        given = W_ptr
    b_sum = tl.zeros([SAMPLED], tl.float32)
    for start in range(0, d_in, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        # [SAMPLED, BLOCK]
        b = tl.load(given + o_r[:, None] * d_in + o_d[None, :], mask=(o_d < d_in)[None, :], other=0.0)
        b_sum += tl.sum(b * b, 1)
    mean = tl.sqrt(tl.sum(b_sum, 0) / (SAMPLED * d_in))
    bits = mean.to(tl.int32, bitcast=True) & 0x7F800000
    # An exponent off by more than 30 is taken for 30, and so is that of zero.
    bits = tl.minimum(tl.maximum(bits, (127 - 30) << 23), (127 + 30) << 23)
    scale = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    usable = (mean > 0) & (mean < float("inf"))
    tl.store(scales_ptr + which, tl.where(usable, scale, 1.0))


# For row r of `given`, scaled: rounded[r] = the row in float16, then two lengths and zeros; for x: |dx| + s |x| and
# |x| + |dx|, and for W_enc: |w| and |dw|, none too small. raised[r] = the bias of feature r, scaled and raised by s of
# itself; infinite where it is too large to be bounded, or NaN. s is `loss`, what sums lose.
#
# A program: one row. Bytes: 4 d_in read and 2 d_in written. Floor: the bytes, A 0.04, B 0.23, C 0.8 ms for W_enc.
@jit
def _round(
    given_ptr,
    bias_ptr,
    scales_ptr,
    rounded_ptr,
    raised_ptr,
    d_in: tl.int32,
    loss: tl.float32,
    OF_W: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BESIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = d_in * UNIT
    wide = (width + 7) // 8 * 8 + BESIDE
    of_x = tl.load(scales_ptr)
    of_W = tl.load(scales_ptr + 1)
    scale = of_W if OF_W else of_x
    given_ptr += row * width
    rounded_ptr += row * wide
    b_length = tl.zeros([BLOCK], tl.float32)
    b_error = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        # [BLOCK] each
        b = tl.load(given_ptr + o_d, mask=o_d < width, other=0.0) * scale
        b_half = b.to(tl.float16)
        b_lost = b - b_half.to(tl.float32)
        b_length += b * b
        b_error += b_lost * b_lost
        tl.store(rounded_ptr + o_d, b_half, mask=o_d < width)
    # Squares below 2^-126 are lost. Lengths are exact to 2^-10, and rounded to 11 bits, or to a multiple of 2^-24.
    unseen = 2.0**-52
    above = 1 + 2.0**-8
    length = (tl.sqrt(tl.sum(b_length, 0)) + unseen) * above
    error = (tl.sqrt(tl.sum(b_error, 0)) + unseen) * above
    if OF_W:
        first = length
        second = error
        # [] each
        bias = tl.load(bias_ptr + row)
        raised = (bias + 2 * loss * tl.abs(bias)) * of_x * of_W
        bounded = (tl.abs(bias) < 2.0**60) | (bias == float("-inf"))
        tl.store(raised_ptr + row, tl.where(bounded, raised, float("inf")))
    else:
        first = error + loss * length
        second = length + error
    first = (first + 2.0**-22) * above
    second = (second + 2.0**-22) * above
    # From the last number on: zeros up to a multiple of 8, then what is beside.
    o_b = tl.arange(0, 2 * BESIDE)
    beside = wide - BESIDE
    b_beside = tl.where(width + o_b == beside, first, tl.where(width + o_b == beside + 1, second, 0.0))
    tl.store(rounded_ptr + width + o_b, b_beside.to(tl.float16), mask=width + o_b < wide)


@triton.jit
def _exact_at(start, x_ptr, W_ptr, bias_ptr, bounds_ptr, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pre-activations [ROWS] of candidates start .. start + ROWS in float32, and their features."""
    # [ROWS]
    b_pairs = tl.load(bounds_ptr + start + tl.arange(0, ROWS))
    o_f = 0x7FFFFFFF - (b_pairs & 0x7FFFFFFF)
    b_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        o_d = first + tl.arange(0, COLUMNS)
        # [COLUMNS]
        b_x = tl.load(x_ptr + o_d, mask=o_d < width, other=0.0)
        # [ROWS, COLUMNS]
        b_W = tl.load(W_ptr + o_f[:, None] * width + o_d[None, :], mask=(o_d < width)[None, :], other=0.0)
        b_sums += b_W * b_x[None, :]
    return tl.sum(b_sums, 1) + tl.load(bias_ptr + o_f), o_f.to(tl.int32)


# pairs[r] = the k largest pre-activations in float32 of row r among its candidates, in no order, and failed[r] = 0, if
# no other feature can be among them. Otherwise failed[r] = 1. bounds[r]: pairs of upper bounds, sorted here.
#
# The first k candidates, by their bounds, give a value that k features reach; candidates follow until a bound is below
# it. A program: one row, in one warp. Bytes: 4 d_in a candidate, of which random numbers have 34, 75 and 86 a row (A,
# B, C). Floor: these bytes, from L2 where W_enc fits. Predicted (bench/predict): A 0.17 ms.
@jit
def _settle_exact(
    x_ptr,
    W_ptr,
    bias_ptr,
    scales_ptr,
    bounds_ptr,
    exact_ptr,
    pairs_ptr,
    failed_ptr,
    d_in: tl.int32,
    k: tl.int32,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = d_in * UNIT
    x_ptr += row * width
    bounds_ptr += row * BLOCK
    exact_ptr += row * BLOCK
    o_b = tl.arange(0, BLOCK)
    # [BLOCK]; all are different
    b_bounds = tl.sort(tl.load(bounds_ptr + o_b), descending=True)
    tl.debug_barrier()  # all are loaded
    tl.store(bounds_ptr + o_b, b_bounds)
    tl.store(exact_ptr + o_b, tl.full([BLOCK], _LEAST_PAIR, tl.int64))
    tl.debug_barrier()  # other threads read them
    broken = (tl.max(b_bounds, 0) >> 32 == 0x7FFFFFFF).to(tl.int32)
    scale = tl.load(scales_ptr) * tl.load(scales_ptr + 1)

    first = tl.where(broken > 0, 0, (k + ROWS - 1) // ROWS * ROWS)
    least = tl.zeros([], tl.float32) + float("inf")
    for start in range(0, first, ROWS):
        b_acts, o_f = _exact_at(start, x_ptr, W_ptr, bias_ptr, bounds_ptr, width, ROWS, COLUMNS)
        tl.store(exact_ptr + start + tl.arange(0, ROWS), to_pairs(b_acts, o_f))
        least = tl.minimum(least, tl.min(b_acts, 0))
        broken += tl.sum((b_acts != b_acts).to(tl.int32), 0)
    # How many bounds are not below `least`. Scales are powers of two, so a product by one is exact.
    reached = tl.sum((~(to_float((b_bounds >> 32).to(tl.int32)) < least * scale)).to(tl.int32), 0)
    proved = (reached < BLOCK) & (broken == 0)
    for start in range(first, tl.where(proved, reached, 0), ROWS):
        b_acts, o_f = _exact_at(start, x_ptr, W_ptr, bias_ptr, bounds_ptr, width, ROWS, COLUMNS)
        tl.store(exact_ptr + start + tl.arange(0, ROWS), to_pairs(b_acts, o_f))
        broken += tl.sum((b_acts != b_acts).to(tl.int32), 0)
    tl.store(failed_ptr + row, tl.where(proved & (broken == 0), 0, 1))
    tl.debug_barrier()  # other threads read what was stored
    # [BLOCK]
    b_exact = tl.sort(tl.load(exact_ptr + o_b), descending=True)
    tl.store(pairs_ptr + row * k + o_b, b_exact, mask=o_b < k)


def _scale_variant() -> Variant:
    types = {name: torch.float32 for name in ("x_ptr", "W_ptr", "scales_ptr")}
    return Variant(_scale, types, {"SAMPLED": 32, "BLOCK": 128}, num_warps=8, num_stages=1)


def _round_variant(of_W: bool, unit: int) -> Variant:
    floats = {name: torch.float32 for name in ("given_ptr", "bias_ptr", "scales_ptr")}
    types = floats | {"rounded_ptr": torch.float16, "raised_ptr": torch.float32}
    constants = {"OF_W": of_W, "UNIT": unit, "BLOCK": 1024, "BESIDE": BESIDE}
    return Variant(_round, types, constants, num_warps=4, num_stages=1)


def _settle_variant(unit: int, block: int) -> Variant:
    floats = {name: torch.float32 for name in ("x_ptr", "W_ptr", "bias_ptr", "scales_ptr")}
    ints = {name: torch.int64 for name in ("bounds_ptr", "exact_ptr", "pairs_ptr")}
    constants = {"UNIT": unit, "BLOCK": block, "ROWS": 4, "COLUMNS": 128}
    return Variant(_settle_exact, {**floats, **ints, "failed_ptr": torch.int32}, constants, num_warps=1, num_stages=1)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel and no other does. topk_threshold.py lists the fallback's."""
    units = vector_units(torch.float32)
    rounds = [_round_variant(of_W, unit) for of_W in (False, True) for unit in units]
    return [_scale_variant(), *rounds, *(_settle_variant(unit, block) for unit in units for block in (64, 128))]


def search(x: Tensor, W_enc: Tensor, bias: Tensor, pairs: Tensor, by_ranges: Callable[..., None]) -> Tensor:
    """Write the pairs of the k largest pre-activations in float32 of each row to pairs [n, k], in no order.

    x [n, d_in], W_enc [d_sae, d_in], bias [d_sae] float32, `aligned` and `worthwhile`; by_ranges: topk_encode.py's
    `search`. -> [n] int32: 1 for rows that were multiplied in float32 as a whole.

    Memory: 2 bytes for each number of x and W_enc, 16 n_kept(k) bytes a row, and the workspace of topk_encode.py.
    """
    (n, d_in), d_sae, k = x.shape, W_enc.shape[0], pairs.shape[1]
    kept, unit = n_kept(k), unit_of(torch.float32, d_in)
    scales, raised = x.new_empty(4), torch.empty_like(bias)
    _scale_variant().launch((2,), x, W_enc, scales, n, d_sae, d_in)
    halves = []
    for of_W, given in ((False, x), (True, W_enc)):
        half = torch.empty(len(given), triton.cdiv(d_in, 8) * 8 + BESIDE, dtype=torch.float16, device=x.device)
        loss = 2.0**-22 * (d_in + BESIDE)
        _round_variant(of_W, unit).launch((len(given),), given, bias, scales, half, raised, d_in // unit, loss)
        halves.append(half)
    bounds, exact = pairs.new_empty(n, kept), pairs.new_empty(n, kept)
    by_ranges(*halves, raised, bounds, best_product(halves[0], d_sae))
    failed = torch.empty(n, dtype=torch.int32, device=x.device)
    settle = _settle_variant(unit, kept)
    settle.launch((n,), x, W_enc, bias, scales, bounds, exact, pairs, failed, d_in // unit, k)
    product = product_variant(torch.float32, "ieee", unit if d_sae % GROUP == 0 else 1)
    gated = product._replace(constants={**product.constants, "GATED": True})
    by_ranges(x, W_enc, bias, pairs, tuning.best(gated, x.device), only=failed)
    return failed
