"""The fraction of variance unexplained in Triton, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, INTERPRETED, eps, needs_triton, only_listed_variants, random_normal

from csae import reference

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import fvu

    only_listed_variants(fvu, monkeypatch)


def given(
    n: int, d: int, mean: float, with_c: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """x about `mean`, what is made of it, and weights of zero and one."""
    x = random_normal(n, d) + mean
    c = random_normal(n, d, dtype=dtype, seed=2) if with_c else None
    weight = (random_normal(n, seed=3) > -1).float()
    weight[0] = 1
    decoded = (x - mean + 0.1 * random_normal(n, d, seed=1)).to(dtype)
    return x, decoded, c, torch.full((d,), mean, device=DEVICE), weight


# 9000 rows are more blocks than are merged at once.
CASES = [(n, d, with_c, torch.float32) for n, d in ((2, 1), (5, 7), (300, 40), (140, 200)) for with_c in (False, True)]
CASES += [(9000, 3, True, torch.float32), (5, 7, True, torch.bfloat16), (150, 24, False, torch.bfloat16)]


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(("n", "d", "with_c", "dtype"), CASES)
def test_matches_reference_forward_and_every_gradient(
    n: int, d: int, with_c: bool, dtype: torch.dtype, mean: float
) -> None:
    """Also where the mean is hundreds of times what x varies by."""
    from csae.kernels.triton.fvu import fvu, fvu_backward

    x, decoded, c, bias, weight = given(n, d, mean, with_c, dtype)
    x_hat = sum(of.double() for of in (decoded, c, bias) if of is not None)
    want, want_residual = reference.fvu(x.double(), x_hat, weight.double()), x.double() - x_hat
    want_of_x = (want_residual.square().sum(dim=1) * weight).sum() / want
    share, of_x, residual = fvu(x, decoded, c, bias, weight)
    rounding = 4 * eps(torch.float32) * max(1.0, mean)
    torch.testing.assert_close(residual.double(), want_residual, rtol=0, atol=2 * rounding)
    torch.testing.assert_close(of_x.double(), want_of_x, rtol=1e-5, atol=0)
    torch.testing.assert_close(share.double(), want, rtol=1e-4 if mean else 1e-5, atol=0)
    d_fvu = torch.tensor(3.0, device=DEVICE)
    # The gradients by themselves: where the residual and the spread are those that were found.
    at = (x - residual.double()).requires_grad_(), torch.zeros_like(bias, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(reference.fvu(x.double(), at[0] + at[1], weight.double()), at, d_fvu.double())
    wanted = [of * (want_of_x / of_x.double()) for of in wanted]
    found = fvu_backward(d_fvu, of_x, residual, weight, dtype)
    assert found[0].dtype == dtype
    rounding = 0 if dtype == torch.float32 else eps(dtype) / (1 if INTERPRETED else 2)  # the interpreter cuts
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6 + rounding, atol=0)
    terms = wanted[0].abs().sum(0)
    assert ((found[1].double() - wanted[1]).abs() <= 64 * eps(torch.float32) * terms).all()


def test_what_has_no_weight_takes_no_part() -> None:
    from csae.kernels.triton.fvu import fvu

    x, decoded, c, bias, weight = given(300, 40, 5.0, True)
    kept = weight > 0
    parts = [of if of is None or of is bias else of[kept] for of in (x, decoded, c, bias, weight)]
    for found, wanted in zip(fvu(x, decoded, c, bias, weight)[:2], fvu(*parts)[:2], strict=True):
        torch.testing.assert_close(found, wanted)
    nothing = fvu(x, decoded, c, bias, torch.zeros_like(weight))
    assert nothing[0].isnan()
    assert nothing[1] == 0


def test_a_nan_is_seen() -> None:
    from csae.kernels.triton.fvu import fvu

    x, decoded, c, bias, weight = given(300, 40, 0.0, True)
    decoded[0, 3] = torch.nan
    share, of_x, _ = fvu(x, decoded, c, bias, weight)
    assert share.isnan()
    assert of_x.isfinite()
    x[0, 3] = torch.nan
    assert fvu(x, decoded, c, bias, weight)[1].isnan()


def test_a_loss_by_it_and_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradient of all parts; both of them are those of the reference."""
    from csae import losses
    from csae.ops import backend
    from csae.ops import fvu as op

    x, decoded, c, bias, weight = given(60, 24, 2.0, True)
    wide = [of.double().requires_grad_() for of in (decoded, c, bias)]
    of_wide = reference.fvu(x.double(), sum(wide), weight.double())
    wanted = [of_wide.detach(), x.double() - sum(wide).detach(), *torch.autograd.grad(3 * of_wide, wide)]
    for place in ("triton", "portable"):
        for module in (backend, op):
            monkeypatch.setattr(module, "place", lambda *_, place=place: place)
        assert op.fused(x, (decoded, c, bias), weight) == (place == "triton")
        parts = tuple(of.clone().requires_grad_() for of in (decoded, c, bias))
        share, residual = losses.unexplained(
            x.view(3, 20, 24), tuple(of if of.dim() == 1 else of.view(3, 20, 24) for of in parts), weight.view(3, 20)
        )
        assert not residual.requires_grad
        found = share.detach(), residual, *torch.autograd.grad(3 * share, parts)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.double(), want.view(got.shape), rtol=1e-4, atol=1e-6)
