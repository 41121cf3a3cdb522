"""What a training step launches beside products, sums and attention: scaling, activity, numbers of Adam, runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, DTYPES, needs_triton, only_listed_variants, random_normal

from csae import reference

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def listed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import activity, adam_numbers, feature_sums, scaling

    modules = {"scale": scaling, "active": activity, "adam": adam_numbers, "sort": feature_sums}
    word = next(word for word in modules if word in request.node.name)
    only_listed_variants(modules[word], monkeypatch)


def some_mask(n: int) -> Tensor:
    return random_normal(n, seed=9) > -0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (13, 40), (9, 520), (0, 4), (3, 33)])
def test_over_scale_to_the_bit(n: int, d: int, masked: bool, dtype: torch.dtype) -> None:
    from csae.kernels.triton.scaling import over_scale

    acts, mask = random_normal(n, d, dtype=dtype), some_mask(n) if masked else None
    acts.view(-1)[3::7], acts.view(-1)[5::11] = torch.inf, torch.finfo(dtype).max
    if mask is not None:
        acts[~mask] = torch.nan
    scale = torch.tensor(3.7, device=DEVICE)
    # In float64 the quotient of two float32 is exact enough that its rounding is that of the true one.
    wanted = reference.over_scale(acts.double(), scale.double(), mask).float()
    assert torch.equal(over_scale(acts, scale, mask), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.0, torch.nan, torch.inf, -3.7])
def test_over_scale_is_zero_under_the_mask_whatever_the_scale(scale: float, dtype: torch.dtype) -> None:
    """Signs of zeros too. Elsewhere it is the quotient: of a scale of zero it is infinite, or NaN."""
    from csae.kernels.portable import scaling as portable
    from csae.kernels.triton.scaling import over_scale

    acts, mask = random_normal(13, 40, dtype=dtype), some_mask(13)
    acts[:, :4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    by = torch.tensor(scale, device=DEVICE)
    wanted = reference.over_scale(acts.double(), by.double(), mask).float()
    assert (wanted[~mask] == 0).all()
    for found in (over_scale(acts, by, mask), portable.over_scale(acts, by, mask)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit()[~found.isnan()], wanted.signbit()[~wanted.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (400, 5), (3, 32), (0, 4)])
def test_which_are_active(n: int, k: int, masked: bool, dtype: torch.dtype) -> None:
    from csae.kernels.triton.activity import active_features, fired

    d_sae = 50
    values, mask = random_normal(n, k, dtype=dtype), some_mask(n) if masked else None
    values[: n // 10] = torch.nan
    values.view(-1)[3::7], values.view(-1)[5::7], values.view(-1)[6::7] = 0.0, -0.0, torch.inf
    indices = torch.randint(0, d_sae, (n, k), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = active_features(values, indices, mask, d_sae)
    assert torch.equal(found, reference.active_features(values, indices, mask, d_sae))
    since = torch.arange(100, 100 + d_sae, device=DEVICE)
    wanted = reference.fired(since, values, indices, mask)
    fired(since, values, indices, mask)
    assert torch.equal(since, wanted)


@pytest.mark.parametrize(("of_tensor", "lazy"), [(False, False), (True, True)])
@pytest.mark.parametrize("step", [1, 2, 77, 3_000_000])
def test_numbers_of_adam(step: int, of_tensor: bool, lazy: bool) -> None:
    """Within one rounding of float32, and two where lr is rounded itself: 1 - beta^t is made in float64."""
    from csae.kernels.triton.adam_numbers import adam_numbers

    constants = torch.tensor(
        [
            [1, 1, 6.25e-10, 1 - 0.9, 0.999, 1 - 0.999],
            [0.9, 0.999, 0.999 if lazy else 0, 0, 0, 0],
            [-1, -0.5, -0.5 if lazy else 1, 1, 1, 1],
        ],
        dtype=torch.float64,
        device=DEVICE,
    )
    steps = torch.tensor(float(step), device=DEVICE)
    lr = torch.tensor(3e-4, device=DEVICE) if of_tensor else None
    hyper, seed = adam_numbers(constants, steps, lr, 0.0 if of_tensor else 3e-4)
    wanted = torch.tensor(reference.adam_numbers(step, 3e-4, 0.9, 0.999, 6.25e-10, lazy), dtype=torch.float64)
    roundings = torch.tensor([2.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    off = (hyper.cpu().double() / wanted - 1).abs()
    assert (off <= roundings * (2**-24 + 1e-12)).all()
    assert (seed.dtype, seed.tolist()) == (torch.int64, [step])


@pytest.mark.parametrize("groups", [[[0]], [[0, 1], [1], [0]], [[1], [0]], [[0], [1], [0], [1]]])
def test_codes_sorted_together(groups: list[list[int]]) -> None:
    from csae.kernels.portable.feature_rows import sort_codes as plain
    from csae.kernels.triton.feature_rows import sort_codes

    d_sae = 300
    generator = torch.Generator().manual_seed(0)
    features = [torch.randint(0, d_sae + 1, (n, 4), generator=generator).to(DEVICE) for n in (70, 31)]
    features[0][:40] = 17
    features[1] = features[1].T.contiguous().T
    for found, wanted in zip(sort_codes(features, groups, d_sae), plain(features, groups, d_sae), strict=True):
        for got, want in zip(found, wanted, strict=True):
            assert torch.equal(got, want)
            assert got.dtype == want.dtype
