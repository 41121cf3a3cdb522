"""RMSNorm of heads in Triton, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, DTYPES, eps, needs_triton, only_listed_variants, random_normal

from csae import reference

pytestmark = needs_triton

SHAPES = [(1, 1, 1), (3, 2, 7), (2, 5, 8, 32), (41, 3, 64), (301, 2, 33), (2, 3, 130), (2, 3, 300), (0, 4, 5)]


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import scaled_heads

    only_listed_variants(scaled_heads, monkeypatch)


def given(shape: tuple[int, ...], dtype: torch.dtype, with_gain: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """heads, grad, gain; heads of very different sizes."""
    heads, grad = random_normal(*shape), random_normal(*shape, dtype=dtype, seed=1)
    heads = (heads * 10 ** torch.linspace(-3, 2, shape[-2], device=DEVICE)[:, None]).to(dtype)
    return heads, grad, random_normal(shape[-2], seed=2) if with_gain else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_forward_and_every_gradient(
    shape: tuple[int, ...], with_gain: bool, dtype: torch.dtype
) -> None:
    from csae.kernels.triton.scaled_heads import SIZES, scale_heads, scale_heads_backward

    heads, grad, gain = given(shape, dtype, with_gain)
    wide = [of.double().requires_grad_() for of in (heads, gain) if of is not None]
    how = (1e-6, 1.0) if with_gain else (1.0, 1 / 16)
    want = reference.unit_heads(*wide) if with_gain else reference.bounded_heads(*wide)
    wanted = torch.autograd.grad(want, wide, grad.double())
    want = want.detach()
    want_scale = (how[0] + how[1] * heads.double().square().mean(dim=-1, keepdim=True)).rsqrt()
    out, scale = scale_heads(heads, gain, *how)
    found = scale_heads_backward(grad, heads, gain, scale, how[1])
    assert out.dtype == found[0].dtype == dtype
    assert scale.dtype == torch.float32
    rounding = 4 * max(eps(dtype) / 2, eps(torch.float32))
    torch.testing.assert_close(out.double(), want, rtol=rounding, atol=1e-7)
    torch.testing.assert_close(scale.double(), want_scale, rtol=1e-6, atol=0)
    # A gradient is a difference: it is as exact as what is subtracted.
    sizes = (grad.double() * want_scale * (1 if gain is None else gain.double()[:, None])).norm(dim=-1, keepdim=True)
    assert ((found[0].double() - wanted[0]).abs() <= rounding * (wanted[0].abs() + sizes)).all()
    if gain is not None:
        terms = ((grad.double() * heads.double()).abs().sum(-1, keepdim=True) * want_scale).flatten(0, -3).sum(0)[:, 0]
        assert found[1].dtype == gain.dtype
        summed_in = torch.float32 if shape[-1] <= SIZES[-1] else dtype  # wider heads take the PyTorch path
        assert ((found[1].double() - wanted[1]).abs() <= 64 * eps(summed_in) * terms).all()


def test_zero_stays_zero_and_nan_is_seen() -> None:
    from csae.kernels.triton.scaled_heads import scale_heads, scale_heads_backward

    heads, gain = random_normal(3, 2, 8), torch.ones(2, device=DEVICE)
    heads[1, 0], heads[2, 1, 3] = 0, torch.nan
    out, scale = scale_heads(heads, gain, 1e-6, 1.0)
    d_heads, d_gain = scale_heads_backward(torch.ones_like(heads), heads, gain, scale, 1.0)
    assert not out[1, 0].any()
    assert d_heads[1, 0].isfinite().all()
    assert out[2, 1].isnan().all()
    assert d_heads[2, 1].isnan().all()
    assert out[:2].isfinite().all()
    assert d_gain.isnan().tolist() == [False, True]


def test_any_strides_and_addresses() -> None:
    from csae.kernels.triton.scaled_heads import scale_heads, scale_heads_backward

    heads, grad, gain = random_normal(40, 3, 50), random_normal(40, 3, 50, seed=1), random_normal(6)[1::2]
    out, scale = scale_heads(heads, gain.contiguous(), 1e-6, 1.0)
    wanted = [out, scale, *scale_heads_backward(grad, heads, gain.contiguous(), scale, 1.0)]
    apart = heads.transpose(0, 1).contiguous().transpose(0, 1), grad.repeat(1, 1, 2)[..., :50]
    out, scale = scale_heads(apart[0], gain, 1e-6, 1.0)
    found = [out, scale, *scale_heads_backward(apart[1], apart[0], gain, scale, 1.0)]
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)
