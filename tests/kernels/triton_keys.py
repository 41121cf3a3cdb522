"""A kernel for the tests: topk_encode's keys, without its product."""

import triton
import triton.language as tl

from csae.kernels.triton.topk_keys import to_key


@triton.jit
def keys_of(numbers_ptr, keys_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o_x = tl.arange(0, BLOCK)
    # [BLOCK]
    tl.store(keys_ptr + o_x, to_key(tl.load(numbers_ptr + o_x)))
