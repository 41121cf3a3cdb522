"""Which features of a code are active, and which tokens they last fired at; each in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import FLOATS, Variant, aligned, jit

BLOCK = 1024


@triton.jit
def _is_off(values_ptr, mask_ptr, o_p, m_p, k, has_mask):
    """Which pairs are not active: their value is not positive, or the mask is False. NaN is active, so it is seen."""
    b_off = tl.load(values_ptr + o_p, mask=m_p, other=0.0) <= 0
    # [BLOCK]
    b_mask = tl.load(mask_ptr + o_p // k, mask=tl.where(m_p, has_mask, 0) != 0, other=1)
    return b_off | (b_mask == 0)


# features[p] = indices[p], or d_sae where pair p is not active
#
# A program: BLOCK pairs. Bytes: 16 + e a pair. Floor: the bytes; A 1, B and C 2 us.
@jit
def _active(
    values_ptr,
    indices_ptr,
    mask_ptr,
    features_ptr,
    pairs: tl.int64,
    k: tl.int32,
    d_sae: tl.int32,
    has_mask: tl.int32,
    BLOCK: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < pairs
    b_off = _is_off(values_ptr, mask_ptr, o_p, m_p, k, has_mask)
    # [BLOCK]
    b_indices = tl.load(indices_ptr + o_p, mask=m_p, other=0)
    tl.store(features_ptr + o_p, tl.where(b_off, d_sae, b_indices), mask=m_p)


# since[f] = 0 for the features of active pairs; whoever writes, it is zero
#
# A program: BLOCK pairs. Bytes: 8 + e a pair, and 8 for an active one. Floor: the bytes; A 1, B and C 2 us.
@jit
def _fired(
    values_ptr,
    indices_ptr,
    mask_ptr,
    since_ptr,
    pairs: tl.int64,
    k: tl.int32,
    d_sae: tl.int32,
    has_mask: tl.int32,
    BLOCK: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < pairs
    b_off = _is_off(values_ptr, mask_ptr, o_p, m_p, k, has_mask)
    # [BLOCK]
    b_indices = tl.load(indices_ptr + o_p, mask=m_p, other=0)
    m_write = m_p & (b_off == 0) & (b_indices >= 0) & (b_indices < d_sae)
    tl.store(since_ptr + b_indices, tl.zeros([BLOCK], tl.int64), mask=m_write)


def _variant(fired: bool, dtype: torch.dtype) -> Variant:
    out = {"since_ptr" if fired else "features_ptr": torch.int64}
    tensors = {"values_ptr": dtype, "indices_ptr": torch.int64, "mask_ptr": torch.uint8, **out}
    return Variant(_fired if fired else _active, tensors, {"BLOCK": BLOCK}, num_warps=4, num_stages=1)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    return [_variant(fired, dtype) for fired in (False, True) for dtype in FLOATS]


def active_features(values: Tensor, indices: Tensor, mask: Tensor | None, d_sae: int) -> Tensor:
    """values [n, k], indices [n, k] int64, mask [n] bool -> indices, d_sae where a pair is not active: [n, k] int64."""
    features = torch.empty_like(indices, memory_format=torch.contiguous_format)
    _launch(False, values, indices, mask, features, d_sae)
    return features


def fired(since: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None) -> None:
    """Set since [d_sae] int64, contiguous, to zero where a pair of values, indices [n, k] and mask [n] is active."""
    _launch(True, values, indices, mask, since, since.shape[0])


def _launch(fired: bool, values: Tensor, indices: Tensor, mask: Tensor | None, out: Tensor, d_sae: int) -> None:
    if indices.numel() == 0:
        return
    values, indices = aligned(values), aligned(indices)
    given = out.view(torch.uint8) if mask is None else aligned(mask).view(torch.uint8)
    numbers = indices.numel(), indices.shape[1], d_sae, int(mask is not None)
    grid = (triton.cdiv(indices.numel(), BLOCK),)
    _variant(fired, values.dtype).launch(grid, values, indices, given, out, *numbers)
