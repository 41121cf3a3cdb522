"""A kernel for the tests of bench.predict: a loop within a loop, called for from two places."""

import torch
import triton
import triton.language as tl

from csae.kernels.triton.variant import Variant, jit


@triton.jit
def _total(x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        o_x = start + tl.arange(0, BLOCK)
        b_sum += tl.load(x_ptr + o_x, mask=o_x < count, other=0.0)
    return tl.sum(b_sum, axis=0)


@jit
def halved(x_ptr, out_ptr, count: tl.int32, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x is halved until its sum is at most 1."""
    total = _total(x_ptr, count, BLOCK)
    while total > 1.0:
        for start in range(0, count, BLOCK):
            o_x = start + tl.arange(0, BLOCK)
            tl.store(x_ptr + o_x, 0.5 * tl.load(x_ptr + o_x, mask=o_x < count, other=0.0), mask=o_x < count)
        tl.debug_barrier()
        total = _total(x_ptr, count, BLOCK)
    tl.store(out_ptr, total)


VARIANT = Variant(halved, {"x_ptr": torch.float32, "out_ptr": torch.float32}, {"BLOCK": 128}, 4, 1)
