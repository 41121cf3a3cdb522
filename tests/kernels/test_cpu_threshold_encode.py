"""threshold_encode by a coarse product in bfloat16, settled in float32: run here whether or not this CPU has units for
it. What the native parts give by themselves, in each instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu import library, threshold_encode, topk_coarse
from csae.kernels.cpu.above_rows import Between, above_add, above_finish, above_settle, cut
from csae.kernels.cpu.topk_rows import topk_add_products, topk_start

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library was not built")

N, D_IN, D_SAE, K_MAX = 300, 130, 1600, 30


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes the coarse way the one that is taken. Gives which rows were settled, in each of its calls."""
    found = []
    coarsely = threshold_encode._settle

    def noted(*arguments: object) -> Tensor:
        found.append(coarsely(*arguments))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(threshold_encode, "_settle", noted)
    return found


def given(seed: int = 0, n: int = N, d_in: int = D_IN, d_sae: int = D_SAE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, W_enc = (torch.randn(size, d_in, generator=generator) for size in (n, d_sae))
    return x, W_enc / d_in**0.5, 0.1 * torch.randn(d_sae, generator=generator)


def thresholds(per_feature: bool, size: float = 2.5) -> Tensor:
    """About ten features of D_SAE are above."""
    one = torch.tensor(size)
    return one * (1 + 0.1 * torch.rand(D_SAE, generator=torch.Generator().manual_seed(1))) if per_feature else one


def check(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int = K_MAX) -> Tensor:
    """Against the product in float32; where a number is as good as its threshold, either may be right. -> values."""
    values, indices = threshold_encode.threshold_encode(x, W_enc, b_enc, threshold, k_max)
    pre_acts = x.double() @ W_enc.double().T + b_enc.double()
    slack = 1e-5 * pre_acts.abs().max() if x.dtype == torch.float32 else 2**-8 * pre_acts.abs().max()
    wanted = reference.threshold_encode(x.double(), W_enc.double(), b_enc.double(), threshold.double(), k_max)
    sure = ((pre_acts - threshold).abs() > 1e-5 * pre_acts.abs().max()).all(dim=1)
    assert sure.float().mean() > 0.5
    torch.testing.assert_close(values[sure].double(), wanted[0][sure], rtol=0, atol=float(slack))
    chosen = torch.where(values > 0, pre_acts.gather(1, indices), 0)
    torch.testing.assert_close(chosen, values.double(), rtol=0, atol=float(slack))
    assert (indices[values == 0] == 0).all()
    return values


@pytest.mark.parametrize("per_feature", [False, True])
def test_it_is_the_definition(per_feature: bool, settled: list[Tensor]) -> None:
    values = check(*given(1), thresholds(per_feature))
    assert 3 < (values > 0).sum(1).float().mean() < 15
    assert torch.cat(settled).float().mean() > 0.99


@pytest.mark.parametrize("per_feature", [False, True])
def test_the_same_as_by_the_product_in_float32(per_feature: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc = given(2)
    values, indices = threshold_encode.threshold_encode(x, W_enc, b_enc, thresholds(per_feature), K_MAX)
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
    wanted = threshold_encode.threshold_encode(x, W_enc, b_enc, thresholds(per_feature), K_MAX)
    assert torch.equal(indices, wanted[1])
    torch.testing.assert_close(values, wanted[0])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_rows_with_more_candidates_than_lists_hold(threshold: float, settled: list[Tensor]) -> None:
    """The largest bounds prove the k_max largest; of thresholds of features they prove nothing."""
    x, W_enc, b_enc = given(3)
    check(x, W_enc, b_enc, torch.tensor(threshold))
    assert settled[-1].all()
    check(x, W_enc, b_enc, torch.full((D_SAE,), threshold))
    assert not settled[-1].any()


@pytest.mark.parametrize("per_feature", [False, True])
def test_more_that_can_not_be_told_apart_than_lists_hold(per_feature: bool, settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(4)
    W_enc[::3] = W_enc[0] * (1 + 1e-5 * torch.randn(len(W_enc[::3]), 1, generator=torch.Generator().manual_seed(1)))
    b_enc[::3] = 9.0
    check(x, W_enc, b_enc, thresholds(per_feature))
    assert not torch.cat(settled).any()


def test_large_biases_that_their_thresholds_cancel(settled: list[Tensor]) -> None:
    """Of numbers as large as these float32 keeps little of what is left: no candidate may be lost to that."""
    x, W_enc, b_enc = given(5)
    b_enc += 3e4
    threshold = b_enc + 2.5
    values, indices = threshold_encode.threshold_encode(x, W_enc, b_enc, threshold, K_MAX)
    pre_acts = x.double() @ W_enc.double().T + b_enc.double()
    slack = 2e-2
    for i in range(len(x)):
        active = set(indices[i][values[i] > 0].tolist())
        assert active >= set((pre_acts[i] > threshold.double() + slack).nonzero().flatten().tolist())
        assert active <= set((pre_acts[i] > threshold.double() - slack).nonzero().flatten().tolist())
    assert torch.cat(settled).float().mean() > 0.9


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e37, 1e-41, 1e-25, 1e25])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc", "threshold"])
def test_numbers_that_are_none_or_far_off(
    value: float, where: str, per_feature: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W_enc, b_enc = given(7)
    threshold = thresholds(per_feature)
    {"x": x, "W_enc": W_enc, "b_enc": b_enc, "threshold": threshold}[where].view(-1)[0:1].fill_(value)
    values, indices = threshold_encode.threshold_encode(x, W_enc, b_enc, threshold, K_MAX)
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
    wanted = threshold_encode.threshold_encode(x, W_enc, b_enc, threshold, K_MAX)
    torch.testing.assert_close(values, wanted[0], equal_nan=True)
    assert torch.equal(indices, wanted[1])


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_features_that_are_switched_off_or_on(value: float, settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(14)
    threshold = thresholds(True)
    b_enc[::100], threshold[1::2] = value, torch.inf
    values, indices = threshold_encode.threshold_encode(x, W_enc, b_enc, threshold, K_MAX)
    wanted = reference.threshold_encode(x, W_enc, b_enc, threshold, K_MAX)
    assert torch.equal(indices, wanted[1])
    torch.testing.assert_close(values, wanted[0])
    assert torch.cat(settled).float().mean() > 0.99


@pytest.mark.parametrize("scale", [1e-36, 1e-18, 1e15])
def test_any_unit(scale: float) -> None:
    x, W_enc, b_enc = given(8)
    check(x * scale, W_enc, b_enc * scale, thresholds(True) * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, settled: list[Tensor]) -> None:
    check(*(tensor.to(dtype) for tensor in given(9)), thresholds(True))
    assert bool(settled) == (dtype == torch.bfloat16)


def test_tables_that_lie_otherwise(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(10)
    threshold = thresholds(True)
    wanted = threshold_encode.threshold_encode(x, W_enc, b_enc, threshold, K_MAX)
    for W_there in (W_enc.T.contiguous().T, W_enc.repeat(1, 2)[:, :D_IN]):
        apart = torch.stack([threshold, threshold], dim=1)[:, 0]
        values, indices = threshold_encode.threshold_encode(x.T.contiguous().T, W_there, b_enc, apart, K_MAX)
        torch.testing.assert_close(values, wanted[0])
        assert torch.equal(indices, wanted[1])
    assert len(settled) == 3


@pytest.mark.parametrize("per_feature", [False, True])
def test_near_the_threshold(per_feature: bool, settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(12)
    values, indices = threshold_encode.near_threshold(x, W_enc, b_enc, thresholds(per_feature), 0.4, K_MAX)
    wide = (tensor.double() for tensor in (x, W_enc, b_enc, thresholds(per_feature)))
    wanted = reference.near_threshold(*wide, 0.4, K_MAX)
    torch.testing.assert_close(values, wanted[0].float())
    assert torch.equal(indices, wanted[1])
    assert torch.cat(settled).float().mean() > 0.9


@pytest.mark.parametrize("guess", [None, 0.5, 1.0, 3.0])
def test_a_budget_is_met_by_the_coarse_search(guess: float | None, settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(13, 700)
    mask = torch.arange(700) % 5 != 0
    wide = (tensor.double() for tensor in (x, W_enc, b_enc))
    expected = reference.batch_topk_encode(*wide, 8, K_MAX, mask)
    given_guess = None if guess is None else guess * expected[2].float()
    found = threshold_encode.batch_topk_encode(x, W_enc, b_enc, 8, K_MAX, mask, given_guess)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype))
    # The first guess is far too low, nearly right or too high.
    assert len(settled) == {None: 1, 0.5: 1, 1.0: 1, 3.0: 2}[guess]


@pytest.mark.parametrize(("n", "d_sae", "k"), [(1, 1, 1), (9, 200, 5), (40, 64, 64), (70, 1000, 3), (0, 7, 2)])
def test_what_is_added_is_found_again(n: int, d_sae: int, k: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(n)
    pre_acts = torch.randint(-9, 10, (n, d_sae), generator=generator).float()
    pre_acts[4:5, d_sae // 2] = math.nan
    floor, ceiling = torch.randint(0, 5, (d_sae,), generator=generator).float(), torch.full((d_sae,), 8.0)
    bias = torch.randint(-2, 3, (d_sae,), generator=generator).float()
    for band in (Between(floor), Between(floor, ceiling)):
        inside = (pre_acts + bias > floor) & ((band.ceiling is None) | (pre_acts + bias < ceiling))
        wanted = reference._largest(pre_acts + bias, inside, k)
        for size in (d_sae, 70):
            best = topk_start(n, d_sae, k)
            for first in range(0, d_sae, size):
                here = slice(first, first + size)
                above_add(best, band.of(here), pre_acts[:, here], bias[here], first)
            for got, want in zip(above_finish(best), wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("budget", [0, 1, 7, 20, 43, 1000])
def test_cut_is_that_of_the_reference(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (17, 9), generator=generator).float().sort(dim=1, descending=True).values
    values[3], values[5] = math.nan, 0
    values[6, 0] = math.inf
    indices = torch.randint(0, 99, (17, 9), generator=generator)
    wanted = reference._within_budget(values, indices, budget)
    threshold = cut(values, indices, budget)
    for got, want in zip((values, indices, torch.tensor(threshold)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_native_parts_refuse() -> None:
    x, W_enc, b_enc = given(12, n=3)
    acts, table = topk_coarse.rounded_acts(x)[0], topk_coarse.rounded(W_enc, b_enc)
    best, band = topk_start(3, D_SAE, 20), Between(torch.zeros(D_SAE))
    topk_add_products(best, acts, table, 0)
    values, indices = torch.empty(3, 21), torch.empty(3, 21, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"above_settle: .* refused"):
        above_settle(best, band, 0.0, True, x, W_enc, b_enc, values, indices)
    given_to = x, W_enc[:1000], b_enc[:1000], values[:, :4], indices[:, :4]
    with pytest.raises(ValueError, match=r"floor: given shape \[1600\]; needed \[1000\]"):
        above_settle(best, band, 0.0, True, *given_to)
    with pytest.raises(ValueError, match=r"best: holds a column of 1000 or more"):
        above_settle(best, band.of(slice(1000)), 0.0, True, *given_to)
    with pytest.raises(ValueError, match=r"ceiling: given strides \(2,\); needed contiguous numbers"):
        above_add(best, Between(torch.zeros(4), torch.zeros(8)[::2]), torch.zeros(3, 4), torch.zeros(4), 0)
