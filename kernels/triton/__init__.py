"""CUDA kernels in Triton. Importing this package needs neither triton nor a GPU; its modules need triton.

One file per op, with its kernels and their launchers. Launchers take plain tensors and know nothing of autograd.

topk_encode          the encoder: a matrix product (topk_product) and an exact top-k selection (topk_select)
threshold_encode     what is above a threshold: the product of topk_threshold, the choice of topk_select
sparse_decode        the decoder: an embedding bag, and its gradients
feature_rows         gradients summed per feature (feature_sums), and Adam fused with that sum (adam_rows)
activity             which features of a code are active, and since when they were not
scaling              activations in normalised units
adam_numbers         the bias corrections of a step of Adam
fvu                  the fraction of variance unexplained, and its gradient
scaled_heads         RMSNorm of the look-back's heads, and its gradients
lookback_attention   causal attention with a log-distance bias and a null score, computed as FlashAttention does
topk_threshold       a second algorithm for topk_encode; no op uses it until a GPU has measured both

Tools:

variant   one compiled form of a kernel
tuning    which form is fastest on a device
offline   compiles every variant without a GPU and reports what it costs

Under TRITON_INTERPRET=1, set before triton is first imported, the launchers run on CPU tensors.
"""

import importlib.util

import torch

__all__ = ["available", "why_not"]


def available() -> bool:
    """Whether the kernels can run on a CUDA device here."""
    return why_not() is None


def why_not() -> str | None:
    """Why the kernels can't run on a CUDA device here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None
