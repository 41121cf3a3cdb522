"""The three ops: differentiable, compilable, on CUDA (Triton) and CPU (native, or plain PyTorch)."""

# ruff: noqa: E402 - versions first: an older torch lacks names that the imports below need
from csae import versions

for _library in ("torch", "numpy", "safetensors", "huggingface-hub"):
    versions.check(_library)
versions.check_name()

from .lookback_attention import lookback_attention
from .sparse_decode import sparse_decode
from .topk_encode import topk_encode

__all__ = ["lookback_attention", "sparse_decode", "topk_encode"]
