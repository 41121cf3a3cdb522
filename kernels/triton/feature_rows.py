"""Gradients of tables of rows, in factors, and Adam on them: the transposed side of a sparse code, a run a feature.

sort_pairs     (feature, token) pairs by feature: a run of pairs for each feature
feature_sums   gradient[f] = sum over the pairs p of feature f of weights[p] * rows[tokens[p]], written out
adam_rows      Adam on tables with such gradients, in place: a gradient is consumed where it is summed

The first two are in feature_sums.py, with the sum over a run; adam_rows.py takes that from there.

Sums are in float32 and in a fixed order: the same input gives the same bits, without atomics. No launch depends on
what is in a tensor, and nothing is read from the device: all of it can be in a CUDA graph.

Predicted times, beside the kernels and in `sparse_decode`, are for an H100 with 3.0 TB/s from memory, as measured on
one, and 5.5 TB/s from L2, as assumed; nothing here has been timed on a GPU. Shapes:
A n=8192 d=768 d_sae=32768 k=32, B 8192 2304 65536 64, C 8192 4096 131072 64.
"""

from .adam_rows import adam_rows
from .feature_sums import feature_sums, sort_pairs

__all__ = ["adam_rows", "feature_sums", "sort_pairs"]
