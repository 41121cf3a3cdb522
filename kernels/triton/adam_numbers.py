"""The numbers of a step of Adam, made on the device in one launch."""

import torch
import triton.language as tl
from torch import Tensor

from .variant import Variant, aligned, jit


# hyper[i] = factor_i (1 - base_i^step)^power_i, the first also times lr; seed = step
#
# A program: all of it, in float64: 1 - beta^step loses its digits in float32. Floor: the launch.
@jit
def _numbers(
    constants_ptr,
    step_ptr,
    lr_ptr,
    hyper_ptr,
    seed_ptr,
    lr_number: tl.float32,
    has_lr: tl.int32,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_i = tl.arange(0, BLOCK)
    m_i = o_i < COUNT
    # [BLOCK] each: the bits of float64, which no other kernel takes
    b_factors = tl.load(constants_ptr + o_i, mask=m_i, other=0).to(tl.float64, bitcast=True)
    b_bases = tl.load(constants_ptr + COUNT + o_i, mask=m_i, other=0).to(tl.float64, bitcast=True)
    b_powers = tl.load(constants_ptr + 2 * COUNT + o_i, mask=m_i, other=0).to(tl.float64, bitcast=True)
    step = tl.load(step_ptr)
    # Where a base is zero, nothing is left of it.
    b_kept = tl.where(b_bases > 0, tl.exp(step.to(tl.float64) * tl.log(tl.where(b_bases > 0, b_bases, 1.0))), 0.0)
    b_hyper = b_factors * tl.exp(b_powers * tl.log(1.0 - b_kept))
    lr = tl.load(lr_ptr, mask=has_lr != 0, other=0.0) + tl.where(has_lr != 0, 0.0, lr_number)
    b_hyper = tl.where(o_i == 0, b_hyper * lr.to(tl.float64), b_hyper)
    tl.store(hyper_ptr + o_i, b_hyper.to(tl.float32), mask=m_i)
    tl.store(seed_ptr, step.to(tl.int64))


_COUNT = 6
_VARIANT = Variant(
    _numbers,
    {
        "constants_ptr": torch.int64,
        "step_ptr": torch.float32,
        "lr_ptr": torch.float32,
        "hyper_ptr": torch.float32,
        "seed_ptr": torch.int64,
    },
    {"COUNT": _COUNT, "BLOCK": 8},
    num_warps=1,
    num_stages=1,
)


def variants() -> list[Variant]:
    """The form in which this module launches a kernel."""
    return [_VARIANT]


def adam_numbers(constants: Tensor, step: Tensor, lr: Tensor | None, lr_number: float) -> tuple[Tensor, Tensor]:
    """constants [3, 6] float64, step and lr scalars -> hyper [6] float32, and seed [1] int64, for `adam_rows`.

    lr: None where the number is given instead.
    """
    hyper, seed = step.new_empty(_COUNT, dtype=torch.float32), step.new_empty(1, dtype=torch.int64)
    step = aligned(step.float())
    given = aligned(constants).view(torch.int64), step, step if lr is None else aligned(lr.float()), hyper, seed
    _VARIANT.launch((1,), *given, float(lr_number), int(lr is not None))
    return hyper, seed
