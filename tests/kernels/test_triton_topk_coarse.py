"""topk_encode of float32 by bounds in float16, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, needs_triton

from csae import reference

pytestmark = needs_triton
# d_in: a multiple of 8, of 4, and of neither. d_sae: whole groups, and not.
SHAPES = [(3, 136, 160, 5), (2, 132, 192, 32), (3, 131, 300, 33), (2, 200, 256, 96)]


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and the rows that were not proven; x, W_enc and b_enc in float32."""
    from csae.kernels.triton import topk_coarse, topk_encode, topk_select

    pairs = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    failed = topk_coarse.search(x, W_enc, b_enc, pairs, topk_encode.search)
    return *topk_select.ordered(pairs, torch.float32), failed


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(*shape: int, seed: int) -> Tensor:
    """Their products have no rounding in float32, and many are equal."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float32)


def assert_exact(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    values, indices, failed = encode(x, W_enc, b_enc, k)
    wanted = reference.topk_encode(x.double(), W_enc.double(), b_enc.double(), k)
    assert torch.equal(indices, wanted[1])
    torch.testing.assert_close(values.double(), wanted[0], rtol=0, atol=0, equal_nan=True)
    return failed


@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_integers_and_ties_are_exact(n: int, d_in: int, d_sae: int, k: int) -> None:
    assert_exact(integers(n, d_in, seed=0), integers(d_sae, d_in, seed=1), integers(d_sae, seed=2), k)


@pytest.mark.parametrize("x_size", [1e-12, 1.0, 1e8])
@pytest.mark.parametrize("W_size", [1e-8, 30.0])
def test_random_rows_are_proven(x_size: float, W_size: float) -> None:
    n, d_in, d_sae, k = 3, 136, 320, 17
    x, W_enc = x_size * normal(n, d_in, seed=0), W_size * normal(d_sae, d_in, seed=1)
    b_enc = x_size * W_size * normal(d_sae, seed=2)
    values, indices, failed = encode(x, W_enc, b_enc, k)
    assert not failed.any()
    wanted = reference.topk_encode(x.double(), W_enc.double(), b_enc.double(), k)
    assert torch.equal(indices, wanted[1])
    torch.testing.assert_close(values.double(), wanted[0], rtol=1e-5, atol=0)


def test_a_long_feature_has_a_loose_bound_alone() -> None:
    x, W_enc = normal(2, 136, seed=0), normal(192, 136, seed=1)
    W_enc[7] *= 1000
    assert not encode(x, W_enc, torch.zeros(192, device=DEVICE), 9)[2].any()


def test_more_equal_ones_than_candidates_fall_back() -> None:
    x, W_enc = integers(2, 136, seed=0), integers(1, 136, seed=1).repeat(192, 1)
    assert assert_exact(x, W_enc, torch.ones(192, device=DEVICE), 9).all()


def test_pre_activations_that_float16_can_not_tell_apart() -> None:
    """All rows are nearly the same: the bounds prove nothing, and the result is that of float32."""
    x, W_enc = torch.ones(2, 136, device=DEVICE), torch.ones(192, 136, device=DEVICE)
    W_enc[:, 0] += 2.0**-16 * torch.arange(192, device=DEVICE)[torch.randperm(192)]
    assert assert_exact(x, W_enc, torch.zeros(192, device=DEVICE), 20).all()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_numbers_that_are_none_or_too_large(number: float, where: str) -> None:
    given = {"x": integers(3, 136, seed=0), "W_enc": integers(192, 136, seed=1), "b_enc": integers(192, seed=2)}
    given[where][(1,) * given[where].dim()] = number
    found = encode(*given.values(), 6)[:2]
    wanted = reference.topk_encode(*given.values(), 6)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], equal_nan=True)


@pytest.mark.parametrize("d_in", [131, 136])
def test_bounds_are_no_less_than_pre_activations(d_in: int) -> None:
    from csae.kernels.triton import topk_coarse

    seen = []
    x, W_enc, b_enc = normal(3, d_in, seed=0), normal(192, d_in, seed=1), normal(192, seed=2)
    x[1] *= 1e-5
    W_enc[3:9] *= torch.tensor([1e-9, 1e-3, 0, 1e3, 1e4, 1e5], device=DEVICE)[:, None]

    def record(
        halves: Tensor, W_halves: Tensor, raised: Tensor, found: Tensor, *_: object, only: Tensor | None = None
    ) -> None:
        if only is None:
            found.copy_(0x7FFFFFFF - torch.arange(found.shape[1]))  # a bound of zero for each of the first features
            seen.append(halves.double() @ W_halves.double().T + raised.double())
            seen.append(2.0 ** (raised[0] / b_enc[0]).log2().round())  # a power of two, and raised by little

    pairs = torch.empty(3, 5, dtype=torch.int64, device=DEVICE)
    topk_coarse.search(x, W_enc, b_enc, pairs, record)
    exact = x.double() @ W_enc.double().T + b_enc.double()
    bounds, scale = seen
    above = bounds / scale - exact
    assert (above > 0).all()
    lengths = x.double().norm(dim=1)[:, None] * W_enc.double().norm(dim=1)
    assert (above[:1, 20:] < 2e-3 * (lengths[:1, 20:] + b_enc[20:].abs())).all()


def test_strict_float32_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_coarse, topk_encode

    taken = []
    search = topk_coarse.search
    monkeypatch.setattr(topk_coarse, "search", lambda *given: taken.append(search(*given)))
    monkeypatch.setattr(topk_coarse, "LEAST_ROWS", 2)
    monkeypatch.setattr(topk_coarse, "LEAST_COLUMNS_PER_CANDIDATE", 3)
    x, W_enc, b_enc = integers(3, 136, seed=0), integers(192, 136, seed=1), integers(192, seed=2)
    wanted = reference.topk_encode(x.double(), W_enc.double(), b_enc.double(), 5)
    for times, dtype, precision in ((1, torch.float32, "highest"), (1, torch.float32, "high"), (1, torch.float16, "")):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision or before)
        try:
            found = topk_encode.topk_encode(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype), 5)
        finally:
            torch.set_float32_matmul_precision(before)
        assert len(taken) == times
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[0].double(), wanted[0])


@pytest.mark.parametrize("wanted", [[], [0], [4200], [5, 4097]])
def test_rows_are_searched_where_their_flag_is_set(wanted: list[int]) -> None:
    """In more rows than a gated product looks at the flags of at once."""
    from csae.kernels.triton.topk_encode import search
    from csae.kernels.triton.topk_product import product_variant

    product = product_variant(torch.float32, "ieee", 1)
    gated = product._replace(constants={**product.constants, "GATED": True})
    x, W_enc, b_enc = integers(4201, 1, seed=0), integers(2, 1, seed=1), integers(2, seed=2)
    only = torch.zeros(len(x), dtype=torch.int32, device=DEVICE)
    only[wanted] = 1
    pairs = torch.full((len(x), 1), -1, device=DEVICE)
    search(x, W_enc, b_enc, pairs, gated, only=only)
    best = reference.topk_encode(x.double(), W_enc.double(), b_enc.double(), 1)[1]
    assert (pairs.flatten() != -1).nonzero().flatten().tolist() == wanted
    assert torch.equal(0x7FFFFFFF - (pairs[wanted] & 0x7FFFFFFF), best[wanted])
