"""Memory for results: in huge pages, and given out again when a large result is gone.

glibc gives blocks of 32 MB and more back to the system when they are freed, and the system clears every page before it
gives it out again. For the dense gradients of a wide table, which come and go with each step, that takes a quarter of
the step's time and more. So the blocks that were freed last are kept.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from .library import native

# Smaller blocks are kept by glibc; larger ones are too much to hold while nothing uses them.
LEAST_BYTES, MOST_BYTES = 32 << 20, 256 << 20
# A huge page: sizes are rounded up to it.
PAGE = 2 << 20

# The blocks that nothing uses, the last freed at the end. Results come and go in any thread, also while another line of
# this file runs: each of its operations is atomic, and none holds a lock.
_free: deque[mmap.mmap] = deque(maxlen=4)


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor for a result, nothing written yet."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if not LEAST_BYTES <= size <= MOST_BYTES:
        tensor = torch.empty(shape, dtype=dtype)
        native().csae_use_huge_pages(tensor.data_ptr(), size)
        return tensor
    block = _block(-(-size // PAGE) * PAGE)
    # This array, and no other object, is what the tensor's storage holds on to: when it is gone, so are all views.
    array = np.frombuffer(block, dtype=np.uint8, count=size)
    weakref.finalize(array, _free.append, block).atexit = False
    return torch.from_numpy(array).view(dtype).view(shape)


def _block(size: int) -> mmap.mmap:
    """Memory of this size: what was freed, or new."""
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
    """Give back to the system what is kept and not used, 1 GB at most."""
    _free.clear()
