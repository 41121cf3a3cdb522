"""Activations in normalised units: the reference's quotient, rounded, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from csae import reference
from csae.ops.scaling import over_scale

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "mask"),
    [((1, 1), "none"), ((13, 7), "some"), ((2, 3, 33), "none"), ((5,), "some"), ((0, 4), "some"), ((3, 6), "nothing")],
)
def test_matches_reference_forward_and_gradient(
    shape: tuple[int, ...], mask: str, dtype: torch.dtype, out: torch.dtype
) -> None:
    """In float64 a quotient of two float32 is exact enough that its rounding is that of the true one."""
    generator = torch.Generator().manual_seed(sum(shape))
    where = {"none": None, "some": torch.rand(shape[:-1], generator=generator) > 0.4}
    given = where.get(mask, torch.zeros(shape[:-1], dtype=torch.bool))
    acts, scale = torch.randn(shape, generator=generator).to(dtype), torch.tensor(3.7)
    flat = acts.view(-1)
    for place, value in enumerate((math.inf, torch.finfo(dtype).max, math.nan)):
        flat[place::17] = value
    wide = torch.promote_types(torch.promote_types(dtype, out), torch.float32)
    grad = torch.randn(shape, generator=generator).to(out)

    def rounded(x: Tensor, to: torch.dtype) -> Tensor:
        """By way of the dtype that is divided in."""
        return x.to(wide).to(to)

    at = acts.double().requires_grad_()
    wanted = reference.over_scale(at, scale.double(), given)
    acts.requires_grad_()
    found = over_scale(acts, scale, given, out)
    assert found.dtype == out
    torch.testing.assert_close(found, rounded(wanted.detach(), out), rtol=0, atol=0, equal_nan=True)
    of_acts, of_at = torch.autograd.grad(found, acts, grad), torch.autograd.grad(wanted, at, grad.double())
    torch.testing.assert_close(of_acts[0], rounded(of_at[0], dtype), rtol=0, atol=0)
