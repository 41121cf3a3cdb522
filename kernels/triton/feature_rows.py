"""Gradients of the tables (W_enc, W_dec, W_mem), summed per feature, and Adam on them.

sort_pairs     sorts (feature, token) pairs by feature: CSR with the transposed code, one run of pairs per feature
sort_codes     the same of several codes and groups of codes, in one sort
feature_sums   gradient[f] = sum over the pairs p of feature f of weights[p] * rows[tokens[p]], written out (an SpMM)
adam_rows      Adam in place, fused with that sum: the gradient is never written

feature_sums.py has the first two, and the sum over a run that adam_rows.py shares.

Sums are in float32 and in a fixed order, without atomics: the same input gives the same bits. Launches depend on shapes
alone and nothing is read back from the device, so all of it can be captured in a CUDA graph.

Predicted times, here and in sparse_decode.py, are for an H200 (kernels/PREDICTED.md), with 4.3 TB/s from memory
(measured on one) and 5.5 TB/s from L2 (assumed). Nothing here has been timed on a GPU. Shapes:
A n=8192 d=768 d_sae=32768 k=32, B 8192 2304 65536 64, C 8192 4096 131072 64.
"""

from .adam_rows import adam_rows
from .feature_sums import feature_sums, sort_codes, sort_pairs

__all__ = ["adam_rows", "feature_sums", "sort_codes", "sort_pairs"]
