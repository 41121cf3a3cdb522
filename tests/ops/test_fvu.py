"""The fraction of variance unexplained as an op, against the reference and its gradients in float64."""

from __future__ import annotations

import pytest
import torch

from csae import reference
from csae.ops.fvu import fvu

U = 2.0**-24  # one rounding of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("shape", [(2, 1), (5, 7), (3, 4, 9), (131, 33)])
def test_matches_reference_forward_and_every_gradient(
    shape: tuple[int, ...], mean: float, with_c: bool, dtype: torch.dtype
) -> None:
    """Also where the mean is hundreds of times what x varies by."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, noise, c = (torch.randn(shape, generator=generator) for _ in range(3))
    weight = 2 * torch.rand(shape[:-1], generator=generator) - 0.5
    weight = weight.clamp(min=0)
    weight.view(-1)[0] = 1
    decoded, bias = (x + 0.1 * noise).to(dtype), torch.full(shape[-1:], mean)
    x = x + mean
    parts = decoded, *((0.1 * c.to(dtype),) if with_c else ()), bias
    given, wide = (tuple(of.to(to or of.dtype).requires_grad_() for of in parts) for to in (None, torch.float64))
    found, residual = fvu(x, given, weight)
    x_hat = sum(wide)
    wanted = reference.fvu(x.double(), x_hat, weight.double())
    assert not residual.requires_grad
    got, want = torch.autograd.grad(3 * found, given), torch.autograd.grad(3 * wanted, wide)
    with torch.no_grad():
        n, d = weight.numel(), shape[-1]
        missed = x.double() - x_hat
        # Three roundings, each of a number that is no larger than all of them together.
        off = 3 * U * (x.double().abs() + sum(of.abs() for of in wide))
        assert ((residual.double() - missed).abs() <= off).all()
        # A sum of m terms has m - 1 roundings. Where the mean is off, the spread is larger by the square of that.
        w = weight.double()
        spread = float((w[..., None] * missed.square()).sum() / wanted)
        summed, off_mean = (n * d + 4) * U, (n + 2) * U * float(x.abs().max())
        of_spread = summed + d * float(w.sum()) * off_mean**2 / spread
        of_missed = summed + float((w[..., None] * off * (2 * missed.abs() + off)).sum()) / float(wanted * spread)
        assert abs(found.double() - wanted) <= (of_spread + of_missed) * wanted
        # Its gradient is -2 weight residual / spread, and that of bias the sum of it over positions.
        error = 6 * w[..., None] / spread * off + (of_spread + 4 * U) * want[0].abs()
        for ours, theirs in zip(got[:-1], want[:-1], strict=True):
            assert ours.dtype == dtype
            rounding = torch.finfo(dtype).eps / 2
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert ((ours.double() - theirs).abs() <= error + rounding * (theirs.abs() + error) + smallest).all()
        of_bias = (error + n * U * want[0].abs()).flatten(0, -2).sum(0)
        assert got[-1].dtype == torch.float32
        assert ((got[-1].double() - want[-1]).abs() <= of_bias).all()


def test_no_spread_no_weight_and_nan_are_seen() -> None:
    one = torch.ones(1, 3)
    cases = {
        "one position": (one, one * 2, torch.ones(1)),
        "nothing counts": (torch.randn(4, 3), torch.zeros(4, 3), torch.zeros(4)),
        "a NaN": (torch.tensor([[1.0], [2.0], [torch.nan]]), torch.zeros(3, 1), torch.ones(3)),
        "an infinite part": (torch.tensor([[1.0], [2.0]]), torch.tensor([[torch.inf], [0.0]]), torch.ones(2)),
    }
    for name, (x, decoded, weight) in cases.items():
        found, _ = fvu(x, (decoded, torch.zeros(x.shape[1])), weight)
        wanted = reference.fvu(x.double(), decoded.double(), weight.double())
        assert not wanted.isfinite(), name
        torch.testing.assert_close(found.double(), wanted, equal_nan=True, msg=name)
