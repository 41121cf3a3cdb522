"""`csae.kernels.portable.read_memory`, in float32 on the CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .arguments import check_strided
from .library import Memory, check_status, native


def read_memory(
    q: Tensor,
    memory: Tensor,
    takes_part: Tensor,
    slope: Tensor,
    null: Tensor,
    start: Tensor,
    looks: Tensor,
    t: int | Tensor,
) -> Tensor:
    """As `csae.kernels.portable.read_memory`, which explains the arguments.

    The result doesn't depend on the number of threads, which is torch.get_num_threads(). TypeError and ValueError
    name the argument that doesn't fit.
    """
    check_strided("q", q, torch.float32, (None, None, None))
    B, H, d_head = q.shape
    check_strided("memory", memory, torch.float32, (B, None, None))
    L, width = memory.shape[1:]
    check_strided("takes_part", takes_part, torch.bool, (B, L))
    check_strided("slope", slope, torch.float32, (H,))
    check_strided("null", null, torch.float32, (H,))
    check_strided("start", start, torch.int64, (B,))
    check_strided("looks", looks, torch.bool, (B,))
    if H == 0 or d_head == 0 or width % H or width < H * d_head:
        raise ValueError(f"memory: given rows of {width}; needed n_heads * (d_head + d_value) with q {list(q.shape)}")
    t = int(t)
    if t < 0:
        raise ValueError(f"t: given {t}; needed a position, 0 or more")
    d_value = width // H - d_head
    q, slope, null, start, looks = (tensor.contiguous() for tensor in (q, slope, null, start, looks))
    memory = memory if width <= 1 or memory.stride(2) == 1 else memory.contiguous()
    takes_part = takes_part if L <= 1 or takes_part.stride(1) == 1 else takes_part.contiguous()
    out = q.new_empty(B, H * d_value)
    given = Memory(
        *(q.data_ptr(), q.stride(0), memory.data_ptr(), memory.stride(0), memory.stride(1)),
        *(takes_part.data_ptr(), takes_part.stride(0), slope.data_ptr(), null.data_ptr()),
        *(start.data_ptr(), looks.data_ptr(), B, L, H, d_head, d_value, t),
    )
    status = native().csae_read_memory(ctypes.byref(given), out.data_ptr(), out.stride(0), torch.get_num_threads())
    check_status("read_memory", status)
    return out
