"""topk_encode: the k largest pre-activations of each token, exactly, in a bounded workspace.

Rows are taken in chunks. For a chunk, three kernels:

1. `_pre_acts`: the product, with its bias, written as sortable integer keys; and the largest key of each group
   of GROUP columns, from the same registers.
2. `_select` on the maxima: the k groups with the largest maxima. They hold the k largest elements: an element
   of another group has k elements before it, the maxima of those k groups. Ties go to lower groups, so this
   also holds for the order "equal ones by lower index first".
3. `_select` on the k * GROUP keys of those groups. So selection reads 2 / GROUP to k * GROUP / d_sae of the
   keys, not all of them several times.

What is left is a stable sort of [n, k].

Cost for n tokens, on paper: 2 n d_in d_sae operations. Bytes: W_enc once a chunk, the keys written once
(4 n d_sae), and n (4 d_sae / GROUP + 4 k GROUP) for selection. The floor is the product; see the kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant, aligned, dot_precision, dtypes_and_precisions, jit, unit_of, vector_units

WORKSPACE_BYTES = 256 * 2**20
GROUP = 32  # columns in a group: the maxima cost 1/GROUP of the keys to write, the candidates k*GROUP to read
NAN_KEY = 2**31 - 1  # above the key of +inf
_NO_KEY = tl.constexpr(-(2**31))  # below the key of -inf


@triton.jit
def _to_key(b_acts):
    """float32 -> int32 of the same order; -0.0 as +0.0; every NaN as NAN_KEY."""
    b_bits = tl.where(b_acts == 0.0, 0.0, b_acts).to(tl.int32, bitcast=True)
    b_keys = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_acts == b_acts, b_keys, 0x7FFFFFFF)


# keys[r, f] = key(<x_{first+r}, W_enc_f> + b_enc_f), and maxima[r, g] = max of keys[r, g*GROUP : (g+1)*GROUP].
#
# A program makes a tile [BLOCK_M, BLOCK_N]. Programs go down GROUP_M row blocks before the next column block,
# so that those in flight share tiles of W_enc and x in L2.
# Operations: 2 rows d_in d_sae. Bytes from memory: W_enc once for every GROUP_M row blocks (d_sae d_in e), x
# once (rows d_in e), keys and maxima written (4 rows d_sae (1 + 1/GROUP)).
# Floor: the operations, at the rate of the tensor cores, for the d_in of language models: per key 2 d_in
# operations against 4 bytes written. On an H100 (798 TFLOP/s, 3.0 TB/s) the two meet at d_in = 532.
@jit
def _pre_acts(
    x_ptr,
    W_ptr,
    bias_ptr,
    keys_ptr,
    maxima_ptr,
    first: tl.int32,
    rows: tl.int32,
    d_sae: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d_in = units * UNIT
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(d_sae, BLOCK_N)
    band = tl.program_id(0) // (GROUP_M * blocks_n)
    band_m = min(blocks_m - band * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    block_m = band * GROUP_M + within % band_m
    block_n = within // band_m

    o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < rows
    m_n = o_n < d_sae
    p_x = x_ptr + (first + o_m).to(tl.int64)[:, None] * d_in + o_k[None, :]
    p_W = W_ptr + o_n.to(tl.int64)[:, None] * d_in + o_k[None, :]
    b_acts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        m_k = o_k < d_in - start
        # [BLOCK_M, BLOCK_K]
        b_x = tl.load(p_x + start, mask=m_m[:, None] & m_k[None, :], other=0.0)
        # [BLOCK_N, BLOCK_K]
        b_W = tl.load(p_W + start, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_acts = tl.dot(b_x, b_W.T, b_acts, input_precision=PRECISION)
    # [BLOCK_N]
    b_bias = tl.load(bias_ptr + o_n, mask=m_n, other=0.0)
    b_keys = tl.where(m_n[None, :], _to_key(b_acts + b_bias[None, :]), _NO_KEY)
    o_row = o_m.to(tl.int64)[:, None]
    tl.store(keys_ptr + o_row * d_sae + o_n[None, :], b_keys, mask=m_m[:, None] & m_n[None, :])
    # [BLOCK_M, BLOCK_N / GROUP]
    b_maxima = tl.max(tl.reshape(b_keys, [BLOCK_M, BLOCK_N // GROUP, GROUP]), axis=2)
    n_groups = tl.cdiv(d_sae, GROUP)
    o_g = block_n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    tl.store(maxima_ptr + o_row * n_groups + o_g[None, :], b_maxima, mask=m_m[:, None] & (o_g < n_groups)[None, :])


@triton.jit
def _candidates(keys_ptr, groups_ptr, row, start, count, columns, k, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Candidates start .. start + BLOCK of a row: their columns, keys, and which of them exist."""
    o_c = start + tl.arange(0, BLOCK)
    m_c = o_c < count
    if GROUP > 1:
        # [BLOCK]: GROUP neighbours read the same word
        b_groups = tl.load(groups_ptr + row * k + o_c // GROUP, mask=m_c, other=0)
        o_c = (b_groups * GROUP + o_c % GROUP).to(tl.int32)
        m_c = m_c & (o_c < columns)
    # [BLOCK]
    b_keys = tl.load(keys_ptr + row * columns + o_c, mask=m_c, other=_NO_KEY)
    return o_c, b_keys, m_c


# chosen[first+r] = the columns of the k largest of keys[r], lowest columns first; equal keys at the edge by lower
# column. With GROUP > 1 only the columns of the groups in groups[r] (k of them, ascending) are candidates.
#
# A program takes one row: a radix select finds the k-th largest key, 8 bits a pass, by a histogram of the
# candidates that share the bits found so far; a last pass writes the columns of larger keys, and of as many
# equal ones as are missing, to the places that a running count gives.
# Bytes from memory: 4 for each candidate, once: the other four passes find them in L1 or L2 (16 KB for
# k = 128 and GROUP = 32). About 20 integer operations for each candidate and pass. Floor: reading the
# candidates; what it costs in practice is latency, five dependent passes over few candidates, hidden by the
# many rows in flight.
@jit
def _select(
    keys_ptr,
    groups_ptr,
    chosen_ptr,
    first: tl.int32,
    count: tl.int32,
    columns: tl.int32,
    k: tl.int32,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_digit = tl.arange(0, 256)
    found = tl.zeros([], tl.uint32)
    missing = k
    for digits in range(4):
        shift = 24 - 8 * digits
        b_counts = tl.zeros([256], tl.int32)
        for start in range(0, count, BLOCK):
            _, b_keys, m_c = _candidates(keys_ptr, groups_ptr, row, start, count, columns, k, BLOCK, GROUP)
            # Flipping the sign bit gives unsigned integers of the same order, whose digits can be compared.
            b_digits = (b_keys ^ _NO_KEY).to(tl.uint32, bitcast=True) >> shift
            m_c = m_c & ((b_digits >> 8) == found)
            b_counts += tl.histogram((b_digits & 255).to(tl.int32), 256, mask=m_c)
        b_reached = tl.cumsum(b_counts, 0, reverse=True)  # keys with this digit or a larger one
        digit = tl.sum((b_reached >= missing).to(tl.int32), 0) - 1
        missing -= tl.sum(tl.where(o_digit > digit, b_counts, 0), 0)
        found = (found << 8) | digit.to(tl.uint32)
    edge = found.to(tl.int32, bitcast=True) ^ _NO_KEY

    written = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        o_c, b_keys, m_c = _candidates(keys_ptr, groups_ptr, row, start, count, columns, k, BLOCK, GROUP)
        m_equal = m_c & (b_keys == edge)
        b_equal = m_equal.to(tl.int32)
        m_take = (m_c & (b_keys > edge)) | (m_equal & (tl.cumsum(b_equal, 0) <= missing))
        b_take = m_take.to(tl.int32)
        o_place = written + tl.cumsum(b_take, 0) - 1
        tl.store(chosen_ptr + (first + row) * k + o_place, o_c.to(tl.int64), mask=m_take)
        missing -= tl.sum(b_equal, 0)
        written += tl.sum(b_take, 0)


def _pre_acts_variant(dtype: torch.dtype, precision: str, unit: int) -> Variant:
    if precision == "ieee":
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
    else:
        # Loads of single elements are not copied straight to shared memory: fewer of them fit the registers.
        bytes_k = 128 if unit > 1 or dtype == torch.float32 else 64
        blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": bytes_k // dtype.itemsize}
    return Variant(
        _pre_acts,
        {"x_ptr": dtype, "W_ptr": dtype, "bias_ptr": torch.float32, "keys_ptr": torch.int32, "maxima_ptr": torch.int32},
        {"UNIT": unit, **blocks, "GROUP_M": 8, "GROUP": GROUP, "PRECISION": precision},
        num_warps=8,
        num_stages=3,
    )


def _select_variant(group: int) -> Variant:
    return Variant(
        _select,
        {"keys_ptr": torch.int32, "groups_ptr": torch.int64, "chosen_ptr": torch.int64},
        {"BLOCK": 1024, "GROUP": group},
        num_warps=4,
        num_stages=1,
    )


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    products = [
        _pre_acts_variant(dtype, precision, unit)
        for dtype, precision in dtypes_and_precisions()
        for unit in vector_units(dtype)
    ]
    return [*products, _select_variant(1), _select_variant(GROUP)]


def _rows_at_a_time(n: int, d_sae: int, block: int) -> int:
    """How many rows of keys, maxima and chosen groups fit the workspace: a multiple of the block if one fits."""
    rows = WORKSPACE_BYTES // (4 * (d_sae + 2 * triton.cdiv(d_sae, GROUP)))
    return min(n, rows - rows % block if rows >= block else max(rows, 1))


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(x W_enc^T + b_enc) of each row, largest first, equal ones by lower index first.

    x [n, d_in], W_enc [d_sae, d_in] in the dtype of x (float32, bfloat16 or float16), b_enc [d_sae], 1 <= k <= d_sae
    -> values [n, k] in the dtype of x, indices [n, k] int64.

    Selection is on the float32 accumulator. float32 products are exact to float32 where
    torch.get_float32_matmul_precision() is "highest", and TF32 otherwise. A row with a NaN among its
    pre-activations gives k NaN at indices 0..k-1. Besides the result, about WORKSPACE_BYTES of memory.
    """
    n, d_in = x.shape
    d_sae = W_enc.shape[0]
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    keys = torch.empty(n, k, dtype=torch.int32, device=x.device)
    if n == 0:
        return x.new_empty(0, k), indices

    unit = unit_of(x.dtype, d_in)
    product = _pre_acts_variant(x.dtype, dot_precision(x.dtype), unit)
    block_m, block_n = product.constants["BLOCK_M"], product.constants["BLOCK_N"]
    n_groups = triton.cdiv(d_sae, GROUP)
    rows = _rows_at_a_time(n, d_sae, block_m)
    chunk_keys = torch.empty(rows, d_sae, dtype=torch.int32, device=x.device)
    chunk_maxima = torch.empty(rows, n_groups, dtype=torch.int32, device=x.device)
    grouped = 2 * k <= n_groups  # otherwise the groups would hold most of the keys
    chunk_groups = torch.empty(rows, k if grouped else 0, dtype=torch.int64, device=x.device)
    of_all, of_groups = _select_variant(1), _select_variant(GROUP)
    for first in range(0, n, rows):
        chunk = min(rows, n - first)
        grid = (triton.cdiv(chunk, block_m) * triton.cdiv(d_sae, block_n),)
        product.launch(grid, x, W_enc, bias, chunk_keys, chunk_maxima, first, chunk, d_sae, d_in // unit)
        if grouped:
            of_all.launch((chunk,), chunk_maxima, chunk_groups, chunk_groups, 0, n_groups, n_groups, k)
            of_groups.launch((chunk,), chunk_keys, chunk_groups, indices, first, k * GROUP, d_sae, k)
        else:
            of_all.launch((chunk,), chunk_keys, chunk_groups, indices, first, d_sae, d_sae, k)
        torch.gather(chunk_keys[:chunk], 1, indices[first : first + chunk], out=keys[first : first + chunk])
    return _ordered(keys, indices, x.dtype)


def _ordered(keys: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From the chosen keys [n, k] int32, lowest index first, to the values and indices, largest first."""
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    # A key of zero or above is the bit pattern of its float, so clamping the key is the relu.
    values = keys.clamp(min=0).view(torch.float32)
    broken = keys[:, :1] == NAN_KEY
    values = torch.where(broken, torch.nan, values).to(dtype)
    indices = torch.where(broken, torch.arange(keys.shape[1], device=keys.device), indices)
    return values, indices
