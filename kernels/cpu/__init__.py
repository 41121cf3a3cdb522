"""The native CPU kernels: C++ in src/, built into one shared library and called through ctypes.

One file per op, with the same functions as `csae.kernels.portable`, for fewer dtypes. Ask `available()` first. If it is
False, `why_not()` says why, and all functions raise RuntimeError.

topk_encode          the encoder: torch's product and a streaming top-k (topk_rows), or a product on matrix units
                     (topk_coarse, round_rows)
threshold_encode     what is above a threshold, and a batch's budget: the same searches against a known threshold
                     (above_rows)
sparse_decode        the decoder: an embedding bag, and its gradients
feature_rows         gradients summed per feature, and Adam fused with that sum
lookback_attention   causal attention with a log-distance bias and a null score
read_memory          the same for one position, over a key-value cache
scaled_heads         RMSNorm of heads
float_products       a bf16x3 GEMM
"""

from .library import available, describe, warn_once, why_not
from .memory import release

__all__ = ["available", "describe", "release", "warn_once", "why_not"]
