"""Memory for results: in huge pages, and reused when a large result has been freed.

glibc returns freed blocks of 32 MB or more to the system, and the system clears each page before it gives it out again.
For the dense gradients of a wide table, allocated and freed in each step, that takes a quarter of the step's time or
more. So the last few freed blocks are kept here.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from .library import native

# glibc keeps smaller blocks; larger ones are too much memory to hold unused.
LEAST_BYTES, MOST_BYTES = 32 << 20, 256 << 20
# Bytes of a huge page; sizes are rounded up to it.
PAGE = 2 << 20

# Unused blocks, the last freed at the end. A result may be freed in any thread, and by the garbage collector in the
# middle of any line here, so a lock could deadlock. A deque needs none: its operations are atomic.
_free: deque[mmap.mmap] = deque(maxlen=4)


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new, uninitialised tensor for a result."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if not LEAST_BYTES <= size <= MOST_BYTES:
        tensor = torch.empty(shape, dtype=dtype)
        native().csae_use_huge_pages(tensor.data_ptr(), size)
        return tensor
    block = _block(-(-size // PAGE) * PAGE)
    # The tensor's storage holds a reference to this array. When the array is freed, so are all views of the tensor.
    array = np.frombuffer(block, dtype=np.uint8, count=size)
    weakref.finalize(array, _free.append, block).atexit = False
    return torch.from_numpy(array).view(dtype).view(shape)


def _block(size: int) -> mmap.mmap:
    """A kept block of exactly this size, or a new one."""
    for _ in range(_free.maxlen or 0):
        try:
            block = _free.pop()
        except IndexError:
            break
        if len(block) == size:
            return block
        _free.appendleft(block)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    native().csae_use_huge_pages(np.frombuffer(block, dtype=np.uint8).ctypes.data, size)
    return block


def release() -> None:
    """Return all unused blocks to the system, 1 GB at most."""
    _free.clear()
