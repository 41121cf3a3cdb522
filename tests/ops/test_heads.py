"""RMSNorm of heads in every dtype, against the reference and its gradients in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from csae import reference
from csae.ops import heads as ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 2, 7), (2, 5, 8, 32), (41, 3, 65), (2, 1, 300), (3, 5), (0, 4, 5)]


def u(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["bounded", "unit", "gain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference_forward_and_every_gradient(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    heads, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    # Heads of very different sizes; in float16 of such that no product with a gradient is denormal.
    sizes = (-1, 1) if dtype == torch.float16 else (-3, 3)
    heads, grad = (heads * 10 ** torch.linspace(*sizes, shape[-2])[:, None]).to(dtype), grad.to(dtype)
    inputs = [heads]
    if form == "gain":
        inputs.append(torch.randn(shape[-2], generator=generator).to(dtype))
    name = "bounded_heads" if form == "bounded" else "unit_heads"
    found, wanted = (outcomes(getattr(by, name), of, grad) for by, of in ((ops, inputs), (reference, widened(inputs))))
    for got, of in zip(found, (heads, *inputs), strict=True):
        assert got.dtype == of.dtype

    with torch.no_grad():
        terms = magnitudes(form, *widened(inputs), grad=grad.double())
    d, n = shape[-1], heads.shape[:-2].numel()
    wide = u(torch.promote_types(dtype, torch.float32))
    # A sum of m terms has m - 1 roundings. `scale` is the root of a mean of d squares, by five more; it is in out once,
    # and in the second term of a gradient three times. There the product with grad is summed too, in 16 bits by two
    # roundings of their own. Each result is rounded once.
    of_scale = (d / 2 + 5) * wide
    dot = (d + 1) * wide + (2 * u(dtype) if wide < u(dtype) else 0)
    out_error = (of_scale + 3 * wide) * terms["out"]
    first, second = (of_scale + 3 * wide) * terms["first"], (3 * of_scale + dot + 6 * wide) * terms["second"]
    errors = [out_error, first + second]
    if form == "gain":
        errors.append((of_scale + dot + (n + 2) * wide) * terms["gain"])
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for got, want, error in zip(found, wanted, errors, strict=True):
        assert got.shape == want.shape
        assert ((got.double() - want).abs() <= error + u(dtype) * (want.abs() + error) + smallest).all()


def outcomes(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [of.detach().requires_grad_() for of in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def widened(inputs: list[Tensor]) -> list[Tensor]:
    return [of.double() for of in inputs]


def magnitudes(form: str, heads: Tensor, gain: Tensor | None = None, *, grad: Tensor) -> dict[str, Tensor]:
    """The sums of the magnitudes of the terms that out, the gradient of heads (in two) and that of gain are."""
    least, weight = (1.0, reference.VALUE_BOUND**-2) if form == "bounded" else (1e-6, 1.0)
    d = heads.shape[-1]
    scale = (least + weight * heads.square().sum(-1, keepdim=True) / d).rsqrt()
    by = scale if gain is None else scale * gain.abs()[:, None]
    dots = (grad * heads).abs().sum(-1, keepdim=True)
    return {
        "out": heads.abs() * by,
        "first": grad.abs() * by,
        "second": heads.abs() * dots * by * scale.square() * weight / d,
        "gain": (dots * scale).view(-1, heads.shape[-2]).sum(0),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_where_the_reference_has_it(value: float, dtype: torch.dtype) -> None:
    heads = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    heads[1, 2, 4] = value
    heads[2, 0] = 0
    for by in ("unit_heads", "bounded_heads"):
        found, wanted = getattr(ops, by)(heads), getattr(reference, by)(heads.double())
        torch.testing.assert_close(found.double(), wanted, rtol=8 * u(dtype), atol=1e-7, equal_nan=True)
