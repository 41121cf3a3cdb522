"""Values of pre-activations as integers that sort like them, for the selections."""

import triton
import triton.language as tl

NAN_KEY = 2**31 - 1  # above the key of +inf
NO_KEY = tl.constexpr(-(2**31))  # below the key of -inf
LEAST_KEY = tl.constexpr(-0x7F800001)  # the key of -inf
LAST = tl.constexpr(2**31 - 1)  # behind all columns


@triton.jit
def to_key(b_acts):
    """float32 -> int32 keys that sort like the floats; -0.0 as +0.0, every NaN as NAN_KEY."""
    b_bits = (b_acts + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return tl.where(b_acts == b_acts, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def to_float(b_keys):
    """The inverse of `to_key`."""
    return tl.where(b_keys < 0, b_keys ^ 0x7FFFFFFF, b_keys).to(tl.float32, bitcast=True)


@triton.jit
def to_pairs(b_acts, o_c):
    """float32 and int32 columns -> int64 that sort by value, then by lower column. All of a row are different."""
    return (to_key(b_acts).to(tl.int64) << 32) | (0x7FFFFFFF - o_c).to(tl.int64)
