"""The FVU by fewer passes is the FVU, with its gradient; and what a step casts and sorts, it does once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from csae import Adam, ContextualSAE, TopKSAE, reference
from csae.losses import unexplained


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unexplained_is_the_fraction_and_its_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    given = torch.randn(3, 7, 5, dtype=torch.float64).to(dtype)
    weight = (torch.rand(3, 7) > 0.3).double()
    x_hat, other = given.clone().requires_grad_(), given.double().requires_grad_()
    fvu, residual = unexplained(x.to(dtype), (x_hat,), weight.to(torch.promote_types(dtype, torch.float32)))
    expected = reference.fvu(x.to(dtype).double(), other, weight)
    exact = dtype == torch.float64
    tolerance = {} if exact else {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-3}
    torch.testing.assert_close(fvu.double(), expected, **tolerance)
    torch.testing.assert_close(residual, x.to(dtype) - given)
    assert not residual.requires_grad
    (3 * fvu).backward()
    (3 * expected).backward()
    assert x_hat.grad is not None
    assert x_hat.grad.dtype == dtype
    torch.testing.assert_close(x_hat.grad.double(), other.grad, **tolerance)


def test_unexplained_reaches_what_is_reconstructed() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    x_hat = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, x_hat: unexplained(x, (x_hat,), weight)[0], (x, x_hat))


def test_one_position_without_others_has_no_variance() -> None:
    """With a dimension for positions or without one."""
    x, x_hat = torch.ones(5), torch.zeros(5, requires_grad=True)
    for shape in ((5,), (1, 5), (1, 1, 5)):
        weight = torch.ones(shape[:-1])
        fvu, residual = unexplained(x.view(shape), (x_hat.view(shape),), weight)
        assert fvu == reference.fvu(x.view(shape), x_hat.view(shape), weight) == torch.inf
        assert torch.equal(residual, x.view(shape))


def sae_of(arch: str) -> TopKSAE | ContextualSAE:
    torch.manual_seed(0)
    if arch == "topk":
        return TopKSAE(d_in=64, d_sae=96, k=4)
    return ContextualSAE(d_in=64, d_sae=96, k=4, n_heads=2, d_head=3, d_value=5, d_memory=16, sweeps=3)


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the casts of tables: by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].shape[:1] == (96,):
            shape = tuple(args[0].shape)
            self.found[shape] = self.found.get(shape, 0) + 1
        return result


@pytest.mark.parametrize(("arch", "tables"), [("topk", {(96, 64): 2}), ("contextual", {(96, 64): 2, (96, 16): 1})])
def test_a_table_is_cast_once_a_step(arch: str, tables: dict[tuple[int, int], int]) -> None:
    """Whatever the number of sweeps, and for the backward pass too."""
    sae = sae_of(arch)
    acts = torch.randn(3, 8, 64)
    optimizer = Adam(sae)
    with Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients = sae.gradients(acts)
        optimizer.update(gradients)
    assert {shape: count for shape, count in casts.found.items() if len(shape) == 2} == tables


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_a_step_sorts_once(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    from csae import factors

    sort_codes = factors.sort_codes

    def counted(features: list[Tensor], *given: Any) -> Any:
        calls.append(features)
        return sort_codes(features, *given)

    monkeypatch.setattr(factors, "sort_codes", counted)
    _, gradients = sae_of(arch).gradients(torch.randn(3, 8, 64))
    assert len(calls) == 1
    assert gradients["W_enc"].pairs is gradients["b_enc"].pairs  # type: ignore[union-attr]
