"""The dense products of the look-back, with and without matrix units, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from csae import ContextualSAE
from csae.kernels import cpu
from csae.kernels.cpu import float_products, library
from csae.ops import linear


@pytest.fixture
def by_units(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Any product is made as on matrix units, whether or not this CPU has them. Gives the shapes of those that were."""
    if not cpu.available():
        pytest.skip(str(cpu.why_not()))
    found: list[tuple[int, ...]] = []
    multiply = float_products.multiply

    def noted(a: Tensor, b: Tensor) -> Tensor:
        found.append((*a.shape, b.shape[1]))
        return multiply(a, b)

    monkeypatch.setattr(linear, "_worthwhile", lambda *_: True)
    monkeypatch.setattr(float_products, "multiply", noted)
    return found


def operands(*shape: int, out: int) -> list[Tensor]:
    """x, weight and the gradient of the result."""
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = shape, (out, shape[-1]), (*shape[:-1], out)
    return [torch.randn(of, generator=generator) for of in shapes]


def outcomes(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear.linear(x, weight)
    return [out, *torch.autograd.grad(out, (x, weight), grad)]


@pytest.mark.parametrize(
    ("shape", "out"), [((3, 50, 130), 77), ((40, 33), 1), ((1, 9), 64), ((2, 3, 4, 1), 5), ((700, 40), 3), ((0, 4), 7)]
)
def test_the_product_and_its_gradients(shape: tuple[int, ...], out: int, by_units: list[tuple[int, ...]]) -> None:
    given = operands(*shape, out=out)
    wanted = outcomes(*(tensor.double() for tensor in given))
    assert by_units == []
    for found, right in zip(outcomes(*given), wanted, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    n, d = given[0].shape[:-1].numel(), shape[-1]
    assert by_units == [(n, d, out), (n, out, d), (out, n, d)]


def test_matrices_that_lie_otherwise(by_units: list[tuple[int, ...]]) -> None:
    x, weight, grad = operands(20, 30, out=40)
    wanted = outcomes(x, weight, grad)
    apart = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (weight, grad)]
    for found, right in zip(outcomes(x.T.contiguous().T, *apart), wanted, strict=True):
        torch.testing.assert_close(found, right)
    total = outcomes(x, weight, torch.ones(()).expand(20, 40))
    for found, right in zip(total, outcomes(x, weight, torch.ones(20, 40)), strict=True):
        assert torch.equal(found, right)
    assert len(by_units) == 12


def test_numbers_out_of_the_range_of_the_units(by_units: list[tuple[int, ...]]) -> None:
    x, weight, grad = operands(20, 30, out=40)
    x[3, 4], x[5, 6] = torch.inf, torch.nan
    torch.testing.assert_close(linear.linear(x, weight), functional.linear(x, weight), equal_nan=True)
    torch.testing.assert_close(outcomes(x, weight, grad)[2], grad.T @ x, equal_nan=True)
    torch.testing.assert_close(outcomes(x, weight, grad)[1], grad @ weight)


def test_no_gradient_where_none_is_needed(by_units: list[tuple[int, ...]]) -> None:
    x, weight, grad = operands(20, 30, out=40)
    linear.linear(x, weight.requires_grad_()).backward(grad)
    assert by_units == [(20, 30, 40), (40, 20, 30)]


def test_other_dtypes_and_autocast_and_the_compiler_take_torchs(by_units: list[tuple[int, ...]]) -> None:
    x, weight, _ = operands(20, 30, out=40)
    assert torch.equal(linear.linear(x.double(), weight.double()), functional.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(x, weight).dtype == torch.bfloat16
    assert linear.linear(x.to("meta"), weight.to("meta")).shape == (20, 40)
    compiled = torch.compile(linear.linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), functional.linear(x, weight))
    assert by_units == []


def test_small_products_take_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "has_matrix_units", lambda: True)
    assert linear._worthwhile(2048, 256, 256)
    assert not linear._worthwhile(64, 512, 2048)
    assert not linear._worthwhile(128, 256, 256)
    monkeypatch.setattr(library, "has_matrix_units", lambda: False)
    assert not linear._worthwhile(2048, 256, 256)


@pytest.mark.parametrize("query", ["current", "past"])
def test_a_contextual_sae_by_them(query: str, by_units: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    sae = ContextualSAE(20, 90, 3, n_heads=2, d_head=6, d_value=7, d_memory=12, query=query, sweeps=2)
    acts = torch.randn(2, 30, 20)
    wide = ContextualSAE(20, 90, 3, n_heads=2, d_head=6, d_value=7, d_memory=12, query=query, sweeps=2).double()
    wide.load_state_dict(sae.state_dict())
    _, wanted = wide.gradients(acts.double())
    assert by_units == []
    _, found = sae.gradients(acts)
    assert len(by_units) > 12
    for name, right in wanted.items():
        got = found[name]
        got, right = (of if isinstance(of, Tensor) else of.dense() for of in (got, right))
        torch.testing.assert_close(
            got.double(), right.double(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
