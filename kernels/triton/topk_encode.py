"""topk_encode: the k largest pre-activations of each token, exactly, in a bounded workspace.

Tokens are split into chunks, and the features of a chunk into ranges; so many rows share each read of W_enc. All ranges
reuse one workspace [rows, width]. Each range runs two kernels:

1. A matrix product with bias (topk_product.py: `_pre_acts`, or `_pre_acts_tma` on Hopper and later). Its epilogue takes
   the maximum of each group of GROUP columns, and writes only groups whose maximum is above the row's `bound`. That is
   the k-th largest pre-activation of earlier ranges, so other groups hold nothing of the top k. The first range is
   written in full; after that, each doubling of the columns seen writes about k groups a row.
2. A selection (topk_merge.py: `_merge`). Of the groups above the bound it keeps the k with the largest maxima. These
   contain all of the k largest: an element of any other group is behind k elements, the maxima of the k groups. Ties go
   to the lower group, so this also holds for "equal ones by lower index first". From those groups and the k entries
   found so far it bisects the k largest; the k-th is the new bound.

Last `_finish` (topk_merge.py) sorts the k entries of a row. The bound is proven, not estimated, so nothing overflows
and no fallback is needed, whatever the data. Launches and allocations depend on shapes alone.

topk_threshold.py has another algorithm: a threshold estimated from a sample of features, one product that appends what
exceeds it, a count as the proof, and a fallback. Both do the same operations. At the shapes below:

|                                          | a bound from ranges (here)  | a sampled threshold                   |
|------------------------------------------|-----------------------------|---------------------------------------|
| bytes written by the product, A, B, C    | 0.32, 0.49, 0.61 GB         | 0.14, 0.23, 0.36 GB                   |
| all pre-activations would be             | 1.07, 2.15, 4.29 GB         |                                       |
| launches, A, B, C                        | 12, 20, 38                  | 24, 32, 56, half of them for fallback |
| sm_90, 128 x 256, bf16: registers, spill | 244, 0                      | 252, 0 (on sm_100 64 bytes)           |
| shared memory, instructions in all       | 176 KB, 1712                | 160 KB, 2544                          |
| in the epilogue                          | 32 shuffles a thread        | 256, and an atomic addition a hit     |
| computed twice                           | nothing                     | rows that the sample misleads         |

The bound from ranges is used: it can't fail, it does not depend on the order of features, and its epilogue is about
half as long. At A that outweighs the 0.18 GB more that it writes (0.06 ms, mostly hidden by the product). A GPU has to
confirm this; C may differ, where the product is 95% of either and there are 18 ranges.

The times beside the kernels are predictions, not measurements: the larger of operations and bytes at the rates that an
H100 was measured to reach, 798 TFLOP/s in bf16 and 3.0 TB/s. The shapes are those of the benchmark:
A n=8192, d_in=768, d_sae=32768, k=32; B 8192, 2304, 65536, 64; C 8192, 4096, 131072, 64.
"""

import torch
import triton
from torch import Tensor

from ..portable.topk_encode import round_table as round_table
from . import tuning
from .topk_merge import merge_ranges, ordered
from .topk_product import GROUP, best_product, launch_product, product_variant
from .variant import Variant, aligned, dot_precision, unit_of

WORKSPACE_BYTES = 256 * 2**20
LEAST_WIDTH = 4096  # columns of a range, at least: in a narrower one the selection would outweigh the product
RANGE_UNIT = 256  # a range's width is a multiple of this: the widest tile, so that no tile crosses two ranges


def _workspace(n: int, d_sae: int, k: int) -> tuple[int, int]:
    """Rows of a chunk and columns of a range that fit WORKSPACE_BYTES. All rows are one chunk if ranges stay wide."""
    whole = triton.cdiv(d_sae, GROUP) * GROUP
    # A range has at least 2 k groups; k groups of fewer would be most of its columns.
    least = triton.cdiv(max(LEAST_WIDTH, 2 * k * GROUP), RANGE_UNIT) * RANGE_UNIT
    fitting = (WORKSPACE_BYTES // n - bytes_a_row(0, k)) * 8 // 34 // RANGE_UNIT * RANGE_UNIT
    ranges = triton.cdiv(d_sae, max(least, fitting))
    width = min(triton.cdiv(triton.cdiv(d_sae, ranges), RANGE_UNIT) * RANGE_UNIT, whole)
    rows = WORKSPACE_BYTES // bytes_a_row(width, k)
    # Where possible a chunk is whole blocks of 128 rows, so that the next one starts at a 16-byte boundary.
    return min(n, rows - rows % 128 if rows >= 128 else max(rows, 1)), width


def bytes_a_row(width: int, k: int) -> int:
    """Workspace of a row: pre-activations, group maxima, listed groups, twice k keys and columns, the bound."""
    groups = triton.cdiv(width, GROUP)
    return 4 * width + 8 * groups + 16 * k + 4


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    product: Variant | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of relu(x W_enc^T + b_enc) of each row, largest first, equal ones by lower index first.

    x [n, d_in], W_enc [d_sae, d_in] in the dtype of x (float32, bfloat16 or float16), b_enc [d_sae], 1 <= k <= d_sae
    -> values [n, k] in `dtype` or that of x, indices [n, k] int64.

    Selection is on the float32 accumulator. Products of float32 are float32 if torch.get_float32_matmul_precision() is
    "highest", and TF32 otherwise. A row with a NaN among its pre-activations gives k NaN at indices 0..k-1. Memory
    beside the result: 8 n k bytes, and WORKSPACE_BYTES at most, or what one row needs if that is more.

    product: the form of the product kernel, one of topk_product.py's `variants` or `candidates`; by default the best
    for the device.
    """
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    n, d_sae = x.shape[0], W_enc.shape[0]
    keys = torch.empty(n, k, dtype=torch.int32, device=x.device)
    columns = torch.empty_like(keys)
    if n == 0:
        return x.new_empty(0, k, dtype=dtype), columns.long()
    search(x, W_enc, bias, keys, columns, product or best_product(x, d_sae))
    return ordered(keys, columns, dtype or x.dtype)


def search(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    keys: Tensor,
    columns: Tensor,
    product: Variant,
    only: Tensor | None = None,
) -> None:
    """The keys and columns of the k largest pre-activations of each row, lowest column first.

    keys, columns: [n, k] int32, written. only: [n] int32; rows where it is zero are left as they are. It needs a
    GATED `product`.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    rows, width = _workspace(n, d_sae, keys.shape[1])
    acts = torch.empty(rows, width, dtype=torch.float32, device=x.device)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        W_here, bias_here = W_enc[start : start + here], bias[start:]
        launch_product(product, x, W_here, bias_here, bound, acts, width, maxima, first, chunk, only)
        return acts, width

    merge_ranges(multiply, rows, width, d_sae, keys, columns, only)


# --- a second encode of the same tokens ------------------------------------------------------------------


def encode_and_keep(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_encode that also returns the pre-activations, for `encode_again`.

    -> values [n, k], indices [n, k] int64, kept [n, d_sae] float32. The caller bounds n * d_sae.
    """
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    n, d_sae = x.shape[0], W_enc.shape[0]
    kept = torch.empty(n, d_sae, dtype=torch.float32, device=x.device)
    keys = torch.empty(n, k, dtype=torch.int32, device=x.device)
    columns = torch.empty_like(keys)
    if n == 0:
        return x.new_empty(0, k), columns.long(), kept
    product = best_product(x, d_sae)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        launch_product(product, x, W_enc, bias, bound, kept[first:], d_sae, maxima, first, chunk)
        return kept[first:], d_sae

    # With a single range the bound stays NaN, so all pre-activations are written.
    merge_ranges(multiply, _rows_of_kept(n, d_sae, k), triton.cdiv(d_sae, GROUP) * GROUP, d_sae, keys, columns)
    return *ordered(keys, columns, x.dtype), kept


def encode_again(kept: Tensor, a: Tensor, W_a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """relu(topk(kept - a W_a^T, k)): encodes x - c from the pre-activations of x, where W_enc c = W_a a.

    kept [n, d_sae] float32, as encode_and_keep returns it, overwritten; a [n, r], W_a [d_sae, r] in a's dtype
    -> values [n, k] in a's dtype, indices [n, k] int64, with topk_encode's order, ties and NaN.

    Costs 2 n r d_sae operations and 4 to 8 n d_sae bytes; encoding x - c costs 2 n d_in d_sae operations. Largest error
    of a pre-activation against float64, measured in the interpreter with d_in = 768, r = 256 and pre-activations of rms
    1.4: in float32 1.1e-6, and 1.4e-6 by encoding x - c; in float16 2.5e-3 and 2.4e-3. If c cancels most of x, the
    absolute error stays, so the relative error of the small difference grows; encoding x - c has the same problem.
    """
    a, W_a, kept = aligned(a), aligned(W_a), aligned(kept)
    n, d_sae = kept.shape
    keys = torch.empty(n, k, dtype=torch.int32, device=a.device)
    columns = torch.empty_like(keys)
    if n == 0:
        return a.new_empty(0, k), columns.long()
    unit = unit_of(a.dtype, a.shape[1]) if d_sae % GROUP == 0 and a.shape[1] else 1
    product = tuning.best(product_variant(a.dtype, dot_precision(a.dtype), unit, subtract=True), a.device)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        acts = kept[first:, start:]
        launch_product(product, a, W_a[start : start + here], bound, bound, acts, d_sae, maxima, first, chunk)
        return acts, d_sae

    merge_ranges(multiply, _rows_of_kept(n, d_sae, k), _width_of_kept(d_sae, k), d_sae, keys, columns)
    return ordered(keys, columns, a.dtype)


def _rows_of_kept(n: int, d_sae: int, k: int) -> int:
    """Rows of a chunk whose maxima fit the workspace. Each chunk starts at a 16-byte boundary of `kept`."""
    rows = WORKSPACE_BYTES // (bytes_a_row(d_sae, k) - 4 * d_sae)
    return min(n, rows - rows % 128 if rows >= 128 else max(rows - rows % 4, 4))


def _width_of_kept(d_sae: int, k: int) -> int:
    """Columns of a range: 4 ranges, if that is wide enough. The bound from a narrow first range saves later writes."""
    least = max(LEAST_WIDTH, 2 * k * GROUP, triton.cdiv(d_sae, 4))
    return min(triton.cdiv(least, RANGE_UNIT) * RANGE_UNIT, triton.cdiv(d_sae, GROUP) * GROUP)
