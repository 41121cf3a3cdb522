"""The three ops composed of plain PyTorch, for any device and dtype, float64 included.

Same functions as `kernels/triton`. On a CPU the inner loops go to the native library of `kernels/cpu`
where it is loaded and knows the dtype. No [n, d_sae], no [n, k, d] and no [T, T] is ever formed whole:
each function works through its rows in chunks of bounded size.
"""

import torch
from torch import Tensor

from .. import cpu


def on_native(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the native library works on tensors like this one: of these dtypes, or else float32."""
    return tensor.device.type == "cpu" and tensor.dtype in (dtypes or (torch.float32,)) and cpu.available()


def with_rows(tensor: Tensor) -> Tensor:
    """The matrix, its rows contiguous, as native code takes it; copied only where they are not."""
    if tensor.shape[1] <= 1 or tensor.stride(1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps any strides where it is empty
