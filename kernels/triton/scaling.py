"""Activations over their scale, zero where they take no part, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feature_sums import widen
from .variant import FLOATS, Variant, aligned, jit, unit_of, vector_units

ROWS, COLUMNS = 8, 512


# out = acts / scale in rows of the mask, and zero elsewhere, whatever the activations and the scale are
#
# A program: ROWS rows of COLUMNS columns. Bytes: n d (e + 4). Floor: the bytes; of float32: A 0.01, B 0.04, C 0.06 ms.
@jit
def _over_scale(
    acts_ptr,
    scale_ptr,
    mask_ptr,
    out_ptr,
    n: tl.int32,
    units: tl.int32,
    has_mask: tl.int32,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * UNIT
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_e = (o_t < n)[:, None] & (o_c < d)[None, :]
    # [ROWS]
    m_part = tl.load(mask_ptr + o_t, mask=tl.where(o_t < n, has_mask, 0) != 0, other=1) != 0
    o_e = o_t.to(tl.int64)[:, None] * d + o_c[None, :]
    # [ROWS, COLUMNS]
    b_acts = widen(tl.load(acts_ptr + o_e, mask=m_e & m_part[:, None], other=0.0))
    b_units = tl.div_rn(b_acts, tl.broadcast_to(tl.load(scale_ptr), [ROWS, COLUMNS]))
    tl.store(out_ptr + o_e, tl.where(m_part[:, None], b_units, 0.0), mask=m_e)


def _variant(dtype: torch.dtype, unit: int) -> Variant:
    tensors = {"acts_ptr": dtype, "scale_ptr": torch.float32, "mask_ptr": torch.uint8, "out_ptr": torch.float32}
    constants = {"UNIT": unit, "ROWS": ROWS, "COLUMNS": COLUMNS}
    return Variant(_over_scale, tensors, constants, num_warps=4, num_stages=1)


def variants() -> list[Variant]:
    """Every form in which this module launches a kernel."""
    return [_variant(dtype, unit) for dtype in FLOATS for unit in vector_units(dtype)]


def over_scale(acts: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    """acts [n, d], scale a scalar float32, mask [n] bool -> acts / scale float32, zero where the mask is False."""
    n, d = acts.shape
    out = acts.new_empty(n, d, dtype=torch.float32)
    if out.numel() > 0:
        acts, unit = aligned(acts), unit_of(acts.dtype, d)
        given = out.view(torch.uint8) if mask is None else aligned(mask).view(torch.uint8)
        grid = triton.cdiv(n, ROWS), triton.cdiv(d, COLUMNS)
        numbers = n, d // unit, int(mask is not None)
        _variant(acts.dtype, unit).launch(grid, acts, aligned(scale), given, out, *numbers)
    return out
