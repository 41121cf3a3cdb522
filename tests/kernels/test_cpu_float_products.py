"""Native float32 products (bf16x3 GEMM: each number as three bfloat16 numbers), against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csae.kernels import cpu
from csae.kernels.cpu.float_products import multiply

needs_library = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))


def operands(m: int, k: int, n: int, form: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """a [m, k], b [k, n] as a linear layer has them: forward, for the gradient of its input, for that of its weight."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    if form == "forward":
        b = b.T.contiguous().T
    if form == "weight":
        a = a.T.contiguous().T
    return a, b


def errors(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """As parts of the product of the lengths of a's row and b's column."""
    a, b = a.double(), b.double()
    return (product - a @ b) / (a.norm(dim=1)[:, None] * b.norm(dim=0) + 1e-30)


@needs_library
@settings(deadline=None)
@given(
    st.integers(0, 70),
    st.integers(0, 70),
    st.integers(0, 70),
    st.sampled_from(["forward", "input", "weight"]),
    st.integers(0, 2**32),
)
def test_any_shape(m: int, k: int, n: int, form: str, seed: int) -> None:
    a, b = operands(m, k, n, form, seed)
    assert (errors(a, b, multiply(a, b)).abs() < 3e-7).all()


@pytest.mark.parametrize("form", ["forward", "input", "weight"])
def test_many_blocks_with_any_instructions(form: str, isa: str) -> None:
    a, b = operands(100, 1300, 40, form)
    found = []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        found.append(multiply(a, b))
    assert all(torch.equal(product, found[0]) for product in found)
    assert errors(a, b, found[0]).pow(2).mean().sqrt() < 2e-8


@needs_library
@pytest.mark.parametrize("kind", ["normal", "magnitudes", "positive", "cancelling", "full"])
def test_as_exact_as_float32(kind: str) -> None:
    a, b = operands(320, 576, 256, "input")
    if kind == "magnitudes":
        scale = torch.logspace(-10, 10, a.shape[1])
        a, b = a * scale, b / scale[:, None]
    elif kind == "positive":
        a, b = a.abs(), b.abs()
    elif kind == "cancelling":
        a, b = torch.cat([a, -a], 1), torch.cat([b, b * (1 + 1e-4 * b)])
    elif kind == "full":  # bits in all three parts, and each sum with the same sign
        a, b = a.sign().abs() * (1 + 0x7F7F / 2**23), b.sign().abs() * (1 + 0x7F7F / 2**23)
    ours = multiply(a, b)
    found, wanted = errors(a, b, ours), errors(a, b, a @ b)
    assert found.pow(2).mean().sqrt() <= 2 * wanted.pow(2).mean().sqrt() + 1e-8
    assert found.abs().max() <= 3 * wanted.abs().max() + 1e-7


@needs_library
def test_three_parts_are_exact() -> None:
    a = 1 + torch.rand(64, 64)
    for scale in (1.0, -1.0, 2.0**120, 2.0**-103):
        assert torch.equal(multiply(scale * a, torch.eye(64)), scale * a)
        assert torch.equal(multiply(torch.eye(64), scale * a), scale * a)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2.0**127, 3e38])
@pytest.mark.parametrize("of", [0, 1])
def test_out_of_range(value: float, of: int, isa: str) -> None:
    for form in ("forward", "input", "weight"):
        pair = operands(45, 33, 50, form)
        pair[of][20, 30] = value
        torch.testing.assert_close(multiply(*pair), torch.mm(*pair), rtol=0, atol=0, equal_nan=True)


@needs_library
def test_sums_that_might_overflow() -> None:
    a = torch.full((4, 32), 2.0**60)
    assert torch.equal(multiply(a, a.T.contiguous()), torch.full((4, 4), 2.0**125))
    assert torch.equal(multiply(4 * a, a.T.contiguous()), torch.full((4, 4), 2.0**127))


@needs_library
def test_small_numbers_count_as_zero_at_most() -> None:
    a, b = operands(40, 64, 40, "input")
    for exponent in (-100, -110, -126, -140):
        small = a * 2.0**exponent
        product = multiply(small, b)
        lost = 2.0**-125 * (b.double().abs().sum(0) + small.double().abs().sum(1)[:, None]) + 64 * 2.0**-122
        wrong = (product - small.double() @ b.double()).abs()
        assert (wrong <= 3e-7 * (small.double().abs() @ b.double().abs()) + lost).all()


@needs_library
def test_refuses() -> None:
    a = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="b: given shape"):
        multiply(a, torch.zeros(3, 4))
    with pytest.raises(TypeError, match="float64"):
        multiply(a, a.double())
