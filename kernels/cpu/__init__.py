"""The native CPU kernels: C++ in src/, built into one shared library and called through ctypes.

Ask `available()` first. If it is False, `why_not()` says why, and all functions here raise RuntimeError. The same
functions in `csae.kernels.portable` then do the work in PyTorch.
"""

from .feature_rows import adam_rows, feature_sums, sort_pairs
from .float_products import multiply
from .library import available, describe, has_matrix_units, warn_once, why_not
from .lookback_attention import lookback_backward, lookback_forward
from .memory import fresh, release
from .read_memory import read_memory
from .round_rows import BESIDE, BLOCK, PairedRows, paired_room, round_pairs, round_rows
from .scaled_heads import scale_heads, scale_heads_backward
from .sparse_sums import feature_sum, gather_dot, gather_sum
from .topk_rows import topk_add, topk_add_products, topk_capacity, topk_finish, topk_settle, topk_start

__all__ = [
    "BESIDE",
    "BLOCK",
    "PairedRows",
    "adam_rows",
    "available",
    "describe",
    "feature_sum",
    "feature_sums",
    "fresh",
    "gather_dot",
    "gather_sum",
    "has_matrix_units",
    "lookback_backward",
    "lookback_forward",
    "multiply",
    "paired_room",
    "read_memory",
    "release",
    "round_pairs",
    "round_rows",
    "scale_heads",
    "scale_heads_backward",
    "sort_pairs",
    "topk_add",
    "topk_add_products",
    "topk_capacity",
    "topk_finish",
    "topk_settle",
    "topk_start",
    "warn_once",
    "why_not",
]
