"""The three ops: differentiable, compilable, on CUDA (Triton) and CPU (native, or plain PyTorch)."""

from .lookback_attention import lookback_attention
from .sparse_decode import sparse_decode
from .topk_encode import topk_encode

__all__ = ["lookback_attention", "sparse_decode", "topk_encode"]
