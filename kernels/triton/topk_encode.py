"""topk_encode: the k largest pre-activations of each token, exactly, in a bounded workspace.

Tokens are split into chunks, and the features of a chunk into ranges; so many rows share each read of W_enc. All ranges
reuse one workspace [rows, width]. Each range runs two kernels:

1. A matrix product with bias (topk_product.py: `_pre_acts`, or `_pre_acts_tma` on Hopper and later). Its epilogue takes
   the maximum of each group of GROUP columns, and writes only groups whose maximum is above the row's `bound`. That is
   the k-th largest group maximum of earlier ranges, so other groups hold nothing of the top k. The first range is
   written in full; after that, each doubling of the columns seen writes about k groups a row.
2. `_keep_groups` (topk_groups.py). It reads the maxima only. Of all groups so far the k with the largest maxima contain
   all of the k largest: an element of any other group is behind k elements, the maxima of the k groups. Ties go to the
   lower group, so this also holds for "equal ones by lower index first". The groups that are new among the k are copied
   to the slots of those that go, because the next range overwrites the workspace. The least maximum of the k is the new
   bound.

At the end `_select` bisects the k largest from the k groups, and `_finish` sorts them (topk_select.py). The bound is
proven, not estimated, so nothing overflows and no fallback is needed, whatever the data. Launches and allocations
depend on shapes and the device alone.

topk_threshold.py has another algorithm: a threshold estimated from a sample of features, one product that appends what
exceeds it, a count as the proof, and a fallback. Both do the same operations. At the shapes below:

|                                          | a bound from ranges (here)  | a sampled threshold                   |
|------------------------------------------|-----------------------------|---------------------------------------|
| bytes written by the product, A, B, C    | 0.43, 0.54, 0.66 GB         | 0.14, 0.23, 0.36 GB                   |
| all pre-activations would be             | 1.07, 2.15, 4.29 GB         |                                       |
| in the epilogue                          | 32 shuffles a thread        | 256, and an atomic addition a hit     |
| computed twice                           | nothing                     | rows that the sample misleads         |

The bound from ranges is used: it can't fail, it does not depend on the order of features, and its epilogue is about
a third as long. A GPU has to confirm this.

The times beside the kernels are predictions, not measurements: the larger of operations and bytes at the rates that an
H100 was measured to reach, 798 TFLOP/s in bf16 and 3.0 TB/s. The shapes are those of the benchmark:
A n=8192, d_in=768, d_sae=32768, k=32; B 8192, 2304, 65536, 64; C 8192, 4096, 131072, 64.
"""

import functools

import torch
import triton
from torch import Tensor

from ..portable.topk_encode import round_table as round_table
from . import topk_coarse, tuning
from .topk_product import GROUP, best_product, launch_product, product_variant, programs_of
from .topk_select import ordered, select_ranges
from .variant import Variant, aligned, dot_precision, unit_of

# At least so many bytes; on a GPU a share of its memory, but no more than the last: fewer ranges are fewer launches.
WORKSPACE_BYTES, WORKSPACE_SHARE, MOST_WORKSPACE_BYTES = 384 * 2**20, 1 / 128, 2**30
LEAST_WIDTH = 4096  # columns of a range, at least: in a narrower one the selection would outweigh the product
RANGE_UNIT = 256  # a range's width is a multiple of this: the widest tile, so that no tile crosses two ranges


@functools.lru_cache(1024)
def _workspace(
    n: int, d_sae: int, k: int, tile: tuple[int, int] = (128, 256), programs: int = 132, most_bytes: int = 0
) -> tuple[int, int]:
    """Rows of a chunk and columns of a range that fit so many bytes. All rows are one chunk if ranges stay wide.

    most_bytes: WORKSPACE_BYTES if not given.

    Of the widths that fit, the one whose tiles fill the waves of `programs` best; a range more counts as a wave.
    """
    space = most_bytes or WORKSPACE_BYTES
    whole = triton.cdiv(d_sae, GROUP) * GROUP
    # A range has at least 2 k groups; k groups of fewer would be most of its columns.
    least = triton.cdiv(max(LEAST_WIDTH, 2 * k * GROUP), RANGE_UNIT) * RANGE_UNIT
    fitting = (space // n - bytes_a_row(0, k)) * 8 // 33 // RANGE_UNIT * RANGE_UNIT
    if max(least, fitting) >= d_sae:
        width = min(triton.cdiv(d_sae, RANGE_UNIT) * RANGE_UNIT, whole)
    else:
        most = max(least, fitting)

        def waves(width: int) -> int:
            full, last = divmod(d_sae, width)
            # Of many widths: triton.cdiv, which takes constants of kernels too, is slower than all the rest here.
            blocks = -(-n // tile[0])
            waves_of_full, waves_of_last = (-(-blocks * -(-here // tile[1]) // programs) for here in (width, last))
            return full + (last > 0) + full * waves_of_full + waves_of_last

        width = min(range(most, max(least, most // 2) - 1, -RANGE_UNIT), key=waves)
    rows = space // bytes_a_row(width, k)
    # Where possible a chunk is whole blocks of 128 rows, so that the next one starts at a 16-byte boundary.
    return min(n, rows - rows % 128 if rows >= 128 else max(rows, 1)), width


def workspace_bytes(device: torch.device) -> int:
    """How many bytes the workspace of an encode may take on a device."""
    if device.type != "cuda":
        return WORKSPACE_BYTES
    share = int(WORKSPACE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return max(WORKSPACE_BYTES, min(share, MOST_WORKSPACE_BYTES))


def bytes_a_row(width: int, k: int) -> int:
    """Workspace of a row: pre-activations, maxima, k groups with a key, a number and two moves each, the bound."""
    return 4 * width + 4 * triton.cdiv(width, GROUP) + (4 * GROUP + 16) * k + 4


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
    "highest" (of candidates only where topk_coarse.py is a gain; it needs memory of its own), and TF32 otherwise. A row
    with a NaN among its pre-activations gives k NaN at indices 0..k-1. Memory beside the result: 8 n k bytes, and
    `workspace_bytes` at most, or what one row needs if that is more.

    product: the form of the product kernel, one of topk_product.py's `variants` or `candidates`; by default the best
    for the device.
    """
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    n, d_sae = x.shape[0], W_enc.shape[0]
    pairs = torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0:
        return x.new_empty(0, k, dtype=dtype), pairs
    strict = x.dtype == torch.float32 and dot_precision(x.dtype) == "ieee"
    if product is None and strict and topk_coarse.worthwhile(x, W_enc, k):
        topk_coarse.search(x, W_enc, bias, pairs, search)
    else:
        search(x, W_enc, bias, pairs, product or best_product(x, d_sae))
    return ordered(pairs, dtype or x.dtype)


def search(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    pairs: Tensor,
    product: Variant,
    only: Tensor | None = None,
) -> None:
    """Write the pairs of the k largest pre-activations of each row to pairs [n, k] int64, in no order.

    only: [n] int32; rows where it is zero are left as they are. It needs a GATED `product`.
    """
    n, d_sae = x.shape[0], W_enc.shape[0]
    tile = product.constants["BLOCK_M"], product.constants["BLOCK_N"]
    programs, space = programs_of(product, x.device), workspace_bytes(x.device)
    rows, width = _workspace(n, d_sae, pairs.shape[1], tile, programs, space)
    acts = torch.empty(rows, width, dtype=torch.float32, device=x.device)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        W_here, bias_here = W_enc[start : start + here], bias[start:]
        launch_product(product, x, W_here, bias_here, bound, acts, width, maxima, first, chunk, only)
        return acts, width

    select_ranges(multiply, rows, width, d_sae, pairs, only=only)


# --- a second encode of the same tokens ------------------------------------------------------------------


def encode_and_keep(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """topk_encode that also returns the pre-activations, for `encode_again`.

    -> values [n, k] in `dtype` or x's, indices [n, k] int64, kept [n, d_sae] float32. The caller bounds n * d_sae.
    """
    x, W_enc, bias = aligned(x), aligned(W_enc), aligned(b_enc.float())
    n, d_sae = x.shape[0], W_enc.shape[0]
    kept = torch.empty(n, d_sae, dtype=torch.float32, device=x.device)
    pairs = torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0:
        return x.new_empty(0, k, dtype=dtype), pairs, kept
    product = best_product(x, d_sae)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        launch_product(product, x, W_enc, bias, bound, kept[first:], d_sae, maxima, first, chunk)
        return kept[first:], d_sae

    # With a single range the bound stays NaN, so all pre-activations are written.
    select_ranges(multiply, _rows_of_kept(n, d_sae, k), triton.cdiv(d_sae, GROUP) * GROUP, d_sae, pairs, stay=True)
    return *ordered(pairs, dtype or x.dtype), kept


def encode_again(
    kept: Tensor, a: Tensor, W_a: Tensor, k: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """relu(topk(kept - a W_a^T, k)): encodes x - c from the pre-activations of x, where W_enc c = W_a a.

    kept [n, d_sae] float32, as encode_and_keep returns it, overwritten; a [n, r], W_a [d_sae, r] in a's dtype
    -> values [n, k] in `dtype` or a's, indices [n, k] int64, with topk_encode's order, ties and NaN.

    Costs 2 n r d_sae operations and 4 to 8 n d_sae bytes; encoding x - c costs 2 n d_in d_sae operations. Largest error
    of a pre-activation against float64, measured in the interpreter with d_in = 768, r = 256 and pre-activations of rms
    1.4: in float32 1.1e-6, and 1.4e-6 by encoding x - c; in float16 2.5e-3 and 2.4e-3. If c cancels most of x, the
    absolute error stays, so the relative error of the small difference grows; encoding x - c has the same problem.
    """
    a, W_a, kept = aligned(a), aligned(W_a), aligned(kept)
    n, d_sae = kept.shape
    pairs = torch.empty(n, k, dtype=torch.int64, device=a.device)
    if n == 0:
        return a.new_empty(0, k, dtype=dtype), pairs
    unit = unit_of(a.dtype, a.shape[1]) if d_sae % GROUP == 0 and a.shape[1] else 1
    product = tuning.best(product_variant(a.dtype, dot_precision(a.dtype), unit, subtract=True), a.device)

    def multiply(first: int, chunk: int, start: int, here: int, bound: Tensor, maxima: Tensor) -> tuple[Tensor, int]:
        acts = kept[first:, start:]
        launch_product(product, a, W_a[start : start + here], bound, bound, acts, d_sae, maxima, first, chunk)
        return acts, d_sae

    select_ranges(multiply, _rows_of_kept(n, d_sae, k), _width_of_kept(d_sae, k), d_sae, pairs, stay=True)
    return ordered(pairs, dtype or a.dtype)


def _rows_of_kept(n: int, d_sae: int, k: int) -> int:
    """Rows of a chunk whose maxima fit the workspace. Each chunk starts at a 16-byte boundary of `kept`."""
    rows = WORKSPACE_BYTES // (bytes_a_row(d_sae, k) - 4 * d_sae)
    return min(n, rows - rows % 128 if rows >= 128 else max(rows - rows % 4, 4))


def _width_of_kept(d_sae: int, k: int) -> int:
    """Columns of a range: 4 ranges, if that is wide enough. The bound from a narrow first range saves later writes."""
    least = max(LEAST_WIDTH, 2 * k * GROUP, triton.cdiv(d_sae, 4))
    return min(triton.cdiv(least, RANGE_UNIT) * RANGE_UNIT, triton.cdiv(d_sae, GROUP) * GROUP)
