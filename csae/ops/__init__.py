"""The ops: differentiable, compilable, on CUDA (Triton) and CPU (native, or plain PyTorch).

`csae/reference.py` defines each in plain PyTorch. The gradients stand in the docstring of `_backward` of each op.

| formula                         | defined in                     | gradients                        |
|---------------------------------|--------------------------------|----------------------------------|
| relu(topk(W_enc x + b_enc, k))  | `reference.topk_encode`        | `csae/ops/topk_encode.py`        |
| what is above a threshold       | `reference.threshold_encode`   | `csae/ops/threshold_encode.py`   |
| a batch's n k largest           | `reference.batch_topk_encode`  | `csae/ops/batch_topk_encode.py`  |
| JumpReLU's d threshold          | `reference.threshold_gradient` | `csae/ops/straight_through.py`   |
| decode, d W_dec                 | `reference.sparse_decode`      | `csae/ops/sparse_decode.py`      |
| look-back attention, d slope    | `reference.lookback_attention` | `csae/ops/lookback_attention.py` |
| RMSNorm of a head               | `reference.unit_heads`         | `csae/ops/heads.py`              |
"""

# ruff: noqa: E402 - versions first: an older torch lacks names that the imports below need
from csae import versions

for _library in ("torch", "numpy", "safetensors", "huggingface-hub"):
    versions.check(_library)
versions.check_name()

from .batch_topk_encode import batch_topk_encode
from .lookback_attention import lookback_attention
from .sparse_decode import sparse_decode
from .threshold_encode import near_threshold, threshold_encode
from .topk_encode import topk_encode

__all__ = [
    "batch_topk_encode",
    "lookback_attention",
    "near_threshold",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
]
