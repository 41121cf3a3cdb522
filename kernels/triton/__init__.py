"""CUDA kernels in Triton. Importing this package needs neither triton nor a GPU; its modules need triton.

topk_encode, sparse_decode, feature_rows, lookback_attention: one op a file, the kernels and their launchers; but those
of topk_encode are in topk_product and topk_merge, and those of feature_rows in feature_sums and adam_rows. Launchers
take plain tensors and know nothing of autograd. topk_threshold: another way to do topk_encode, to be measured against
it. variant: one compiled form of a kernel. tuning: which form is fastest on a device. offline: compiles every variant
without a GPU and reports what it costs.

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
