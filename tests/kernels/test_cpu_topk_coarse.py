"""topk_encode by a coarse product in bfloat16, proven in float32: run here whether or not this CPU has units for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu import library, topk_coarse, topk_encode
from csae.kernels.cpu.round_rows import BESIDE, PairedRows, paired_room, round_pairs, round_rows
from csae.kernels.cpu.topk_rows import topk_add_products, topk_finish, topk_settle, topk_start
from csae.ops.topk_encode import repeated

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library was not built")

N, D_IN, D_SAE, K = 300, 130, 1600, 7


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes the coarse way the one that is taken. Gives which rows were settled, in each of its calls."""
    found = []
    coarsely = topk_coarse.topk_encode

    def noted(*arguments) -> tuple[Tensor, Tensor]:
        proven, reached = coarsely(*arguments)
        found.append(proven)
        return proven, reached

    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(topk_coarse, "LEAST_SAMPLED", 1)
    monkeypatch.setattr(topk_coarse, "topk_encode", noted)
    return found


def encoder(W_enc: Tensor, b_enc: Tensor, k: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """topk_encode by the same weights again and again."""
    return repeated(W_enc, b_enc, k, [], topk_encode.topk_encode, topk_encode.round_table, topk_encode.encode_by_table)


def given(seed: int = 0, n: int = N, d_in: int = D_IN, d_sae: int = D_SAE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, W_enc = (torch.randn(size, d_in, generator=generator) for size in (n, d_sae))
    return x, W_enc / d_in**0.5, 0.1 * torch.randn(d_sae, generator=generator)


def check(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int = K) -> None:
    """Against the definition in float64; where two features are as good as equal, either may be chosen."""
    values, indices = topk_encode.topk_encode(x, W_enc, b_enc, k)
    wanted = reference.topk_encode(x.double(), W_enc.double(), b_enc.double(), k)
    pre_acts = x.double() @ W_enc.double().T + b_enc.double()
    close = {"rtol": 1e-5 if x.dtype == torch.float32 else 2**-8, "atol": 1e-5 * float(pre_acts.abs().max())}
    torch.testing.assert_close(values.double(), wanted[0], **close)
    torch.testing.assert_close(pre_acts.gather(1, indices).relu(), wanted[0], rtol=1e-5, atol=close["atol"])
    assert all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"), [(N, D_IN, D_SAE, K), (257, 128, 2977, 60), (2500, 191, 1600, 16), (256, 576, 1100, 1)]
)
def test_it_is_the_definition(n: int, d_in: int, d_sae: int, k: int, settled: list[Tensor]) -> None:
    check(*given(1, n, d_in, d_sae), k)
    assert torch.cat(settled).float().mean() > 0.99


def test_the_same_features_as_by_the_product_in_float32(settled: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc = given(2)
    values, indices = topk_encode.topk_encode(x, W_enc, b_enc, K)
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
    wanted = topk_encode.topk_encode(x, W_enc, b_enc, K)
    assert torch.equal(indices, wanted[1])
    torch.testing.assert_close(values, wanted[0])
    assert len(settled) == 1


@pytest.mark.parametrize("aligned", [1, -1])
def test_rounding_that_adds_up(aligned: int, settled: list[Tensor]) -> None:
    """Every number is halfway between two of bfloat16, and rounds the same way, where that does the most harm."""
    x, W_enc, b_enc = given(3)
    x = x.sign() * (1 + 2**-8)
    # Half of the features are rounded to more than they are, the others to less: 1% apart, which the bound must span.
    W_enc[::2] = (1 + aligned * 2**-8) * x[:1].sign()
    W_enc[1::2] = (1 + (2 - aligned) * 2**-8) * x[:1].sign()
    W_enc *= torch.where(torch.rand(W_enc.shape, generator=torch.Generator().manual_seed(0)) < 0.2, -1, 1)
    check(x, W_enc, b_enc)


def test_features_that_rounding_makes_smaller_than_others(settled: list[Tensor]) -> None:
    """x is bfloat16; the largest features lose all that Cauchy-Schwarz allows, the others nothing."""
    x, W_enc, b_enc = given(17)
    x[:] = x[:1].sign()
    step = 2**-8
    W_enc[:] = x[0] * torch.tensor([1 - step, -1 - 2 * step]).repeat_interleave(D_IN // 2)
    W_enc[1::25, :40] = x[0, :40]
    # Halfway between two numbers of bfloat16, and rounded away from x.
    W_enc[::200] = x[0] * torch.tensor([1 + step, -1 - 3 * step]).repeat_interleave(D_IN // 2)
    check(x, W_enc, torch.ones_like(b_enc))


def test_more_that_can_not_be_told_apart_than_there_are_candidates(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(4)
    W_enc[::3] = W_enc[0] * (1 + 1e-5 * torch.randn(len(W_enc[::3]), 1, generator=torch.Generator().manual_seed(1)))
    b_enc[::3] = 9.0
    check(x, W_enc, b_enc)
    assert not torch.cat(settled).any()


def test_some_rows_unsettled(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(5)
    x[::5] = 0  # every pre-activation is its bias, of which many are alike
    b_enc = (4 * b_enc).round() / 4
    check(x, W_enc, b_enc)
    assert not torch.cat(settled)[::5].any()
    assert torch.cat(settled).float().mean() > 0.75


def test_equal_features_by_lower_index_first(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(6)
    W_enc[800:], b_enc[800:] = W_enc[:800].clone(), b_enc[:800].clone()
    _, indices = topk_encode.topk_encode(x, W_enc, b_enc, 8)
    assert torch.equal(indices[:, 1::2], indices[:, ::2] + 800)
    check(x, W_enc, b_enc, 8)
    assert torch.cat(settled).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e37, 1e-41, 1e-25, 1e25])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_numbers_that_are_none_or_far_off(value: float, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc = given(7)
    {"x": x, "W_enc": W_enc, "b_enc": b_enc}[where][3] = value
    values, indices = topk_encode.topk_encode(x, W_enc, b_enc, K)
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
    wanted = topk_encode.topk_encode(x, W_enc, b_enc, K)
    torch.testing.assert_close(values, wanted[0], equal_nan=True)
    assert torch.equal(indices, wanted[1])


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_features_that_are_switched_off_or_on_by_their_bias(value: float, settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(14)
    b_enc[::100] = value
    values, indices = topk_encode.topk_encode(x, W_enc, b_enc, 18)
    wanted = reference.topk_encode(x.double(), W_enc.double(), b_enc.double(), 18)
    assert torch.equal(indices, wanted[1])
    torch.testing.assert_close(values.double(), wanted[0], rtol=1e-5, atol=1e-5)
    assert torch.cat(settled).float().mean() > 0.99


@pytest.mark.parametrize("scale", [1e-36, 1e-18, 1e15])
def test_any_unit(scale: float) -> None:
    x, W_enc, b_enc = given(8)
    check(x * scale, W_enc, b_enc * scale)


def test_bfloat16(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = (tensor.bfloat16() for tensor in given(9))
    check(x, W_enc, b_enc)
    assert torch.cat(settled).float().mean() > 0.99


def test_tables_that_lie_otherwise(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(10)
    wanted = topk_encode.topk_encode(x, W_enc, b_enc, K)
    others = (x.T.contiguous().T, W_enc.T.contiguous().T), (x.repeat(1, 2)[:, :D_IN], W_enc.repeat(1, 2)[:, :D_IN])
    for x_there, W_there in others:
        values, indices = topk_encode.topk_encode(x_there, W_there, b_enc, K)
        torch.testing.assert_close(values, wanted[0])
        assert torch.equal(indices, wanted[1])
    assert len(settled) == 3


def unpaired(table: PairedRows) -> Tensor:
    """[n, width]: the rows themselves."""
    return table.pairs.transpose(1, 2).flatten(2).flatten(0, 1)[: len(table.lengths)]


@pytest.mark.parametrize("d_in", [128, 130, 191])
def test_the_bounds_hold(d_in: int, settled: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """No pre-activation is above its bound, and no bound looser than it must be for numbers as random as these."""
    x, W_enc, b_enc = given(11, d_in=d_in)
    W_enc *= 10 ** torch.linspace(-2, 2, len(W_enc))[:, None]  # each feature has a bound of its own
    bounds = []
    add = topk_add_products

    def noted(best: object, acts: Tensor, table: PairedRows, first: int) -> None:
        bounds.append(acts.double() @ unpaired(table).double().T)
        add(best, acts, table, first)  # type: ignore[arg-type]

    monkeypatch.setattr(topk_coarse, "topk_add_products", noted)
    monkeypatch.setattr(topk_coarse, "TILE_BYTES", 0)
    topk_encode.topk_encode(x, W_enc, b_enc, K)
    assert len(bounds) == 1 + -(-D_SAE // topk_coarse.LEAST_TILE_ROWS)  # the first is of a sample
    above = torch.cat(bounds[1:], dim=1) - (x.double() @ W_enc.double().T + b_enc.double())
    lengths = x.double().norm(dim=1, keepdim=True) * W_enc.double().norm(dim=1)  # [N, D_SAE]
    assert (above >= 0).all()
    assert (above <= lengths / 100 + b_enc.abs() * 2**-8).all()


@pytest.mark.parametrize(("n", "d_in", "columns"), [(1, 28, 1), (33, 60, 49), (70, 601, 1100), (600, 5, 40)])
def test_products(n: int, d_in: int, columns: int, isa: str) -> None:
    """All that are added, found again: the same as those of the plain product, whatever the tiles."""
    generator = torch.Generator().manual_seed(n)
    x, W_enc = (torch.randn(size, d_in, generator=generator) for size in (n, columns))
    bias = torch.randn(columns, generator=generator)
    acts, _ = topk_coarse.rounded_acts(x)
    wanted = (acts.double() @ unpaired(topk_coarse.rounded(W_enc, bias)).double().T).relu()
    k = min(columns, 50)
    for size in (columns, 16):
        best = topk_start(n, columns, k)
        for first in range(0, columns, size):
            here = slice(first, first + size)
            topk_add_products(best, acts, topk_coarse.rounded(W_enc[here], bias[here]), first)
        values, indices = topk_finish(best)
        torch.testing.assert_close(values.double(), wanted.topk(k, dim=1).values, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(wanted.gather(1, indices), values.double(), rtol=1e-5, atol=1e-4)
        assert all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_pairs(dtype: torch.dtype) -> None:
    rows, bias = torch.randn(37, 7).to(dtype), torch.randn(37, 2).bfloat16()
    table = round_pairs(rows, bias, 0.5, 2.0, paired_room(37, 12))
    assert tuple(table.pairs.shape) == (3, 6, 16, 2)
    found = unpaired(table)
    assert torch.equal(found[:, :7], rows.bfloat16())
    assert torch.equal(found[:, 7:9], bias)
    torch.testing.assert_close(table.lengths, (rows.float().norm(dim=1) + 0.5) * 2)
    assert torch.equal(found[:, 9], table.lengths.bfloat16())
    errors = (rows.float() - rows.bfloat16().float()).norm(dim=1)
    torch.testing.assert_close(found[:, 10].float(), (errors + 0.5) * 2, rtol=2**-8, atol=0)
    assert not found[:, 11].any()
    assert not table.pairs.transpose(1, 2).flatten(2).flatten(0, 1)[37:].any()
    with pytest.raises(ValueError, match=r"out: given torch.bfloat16 \[2, 6, 16, 2\]; needed .* \[3, 6, 16, 2\]"):
        round_pairs(rows, bias, 0.5, 2.0, paired_room(32, 12))
    with pytest.raises(ValueError, match=r"out: .* with room for 11 numbers a row"):
        round_pairs(rows, bias, 0.5, 2.0, paired_room(37, 10))


def test_a_sample_that_misleads(settled: list[Tensor]) -> None:
    """Every row is left unsettled, and right all the same."""
    x, W_enc, b_enc = given(19)
    every = topk_coarse.candidates(16) // topk_coarse.CANDIDATES_PER_SAMPLED
    b_enc[: 15 * every : every] += 20  # one less than k
    check(x, W_enc, b_enc, 16)
    assert not torch.cat(settled).any()


def test_a_long_row_leaves_the_others_settled(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(15)
    W_enc[5] *= 300
    b_enc[6] = -300
    check(x, W_enc, b_enc)
    assert torch.cat(settled).float().mean() > 0.99


def test_what_lies_beside_the_numbers_is_not_multiplied(settled: list[Tensor]) -> None:
    acts, _ = topk_coarse.rounded_acts(given(16)[0])
    assert acts.shape[1] % topk_coarse.AT_ONCE == 0
    assert acts.is_contiguous()
    assert not acts[:, D_IN + BESIDE :].any()


@pytest.mark.parametrize("value", [0.3, -0.3, 1e-41, 77.7, -1e30, torch.inf, -torch.inf, 0.0])
def test_a_bias_in_two_parts_is_no_less(value: float) -> None:
    bias = torch.tensor([value])
    first, rest = topk_coarse.in_two(bias, D_IN).double()[0]
    least = 2.0**-126  # smaller numbers count as zero
    assert first + rest >= bias.double() - least
    if bias.abs() < topk_coarse.TOO_LONG:
        assert first + rest <= bias.double() + bias.double().abs() * 2**-11 + least


def test_round_rows() -> None:
    rows = torch.randn(5, 37)
    found = round_rows(rows)
    assert torch.equal(found.rows, rows.bfloat16())
    torch.testing.assert_close(found.lengths, rows.norm(dim=1))
    torch.testing.assert_close(found.errors, (rows - rows.bfloat16().float()).norm(dim=1), rtol=1e-3, atol=0)
    with pytest.raises(TypeError, match=r"rows: given torch.float64"):
        round_rows(rows.double())


def test_settle_refuses() -> None:
    x, W_enc, b_enc = given(12, n=3)
    acts, table = topk_coarse.rounded_acts(x)[0], topk_coarse.rounded(W_enc, b_enc)
    best = topk_start(3, D_SAE, 20)
    with pytest.raises(TypeError, match=r"x: given torch.float32; needed torch.bfloat16"):
        topk_add_products(best, acts.float(), table, 0)
    with pytest.raises(ValueError, match=r"x: given shape \[3, 128\]; needed \[3, 160\]"):
        topk_add_products(best, acts[:, :128], table, 0)
    narrow = round_pairs(W_enc, W_enc[:, :2].bfloat16(), 0, 1, paired_room(D_SAE, 136))
    with pytest.raises(ValueError, match=r"topk_add_products: .* refused"):
        topk_add_products(best, acts[:, :136], narrow, 0)
    topk_add_products(best, acts, table, 0)
    with pytest.raises(ValueError, match=r"table: given shape \[1600, 129\]; needed \[any, 130\]"):
        topk_settle(best, 4, x, W_enc[:, :-1], b_enc)
    with pytest.raises(ValueError, match=r"topk_settle: .* refused"):
        topk_settle(best, 20, x, W_enc, b_enc)
    with pytest.raises(ValueError, match=r"best: holds a column of 1000 or more"):
        topk_settle(best, 4, x, W_enc[:1000], b_enc[:1000])


def test_encoder_is_coarse_in_inference_mode_too(settled: list[Tensor]) -> None:
    x, W_enc, b_enc = given(13)
    with torch.inference_mode():
        encoder(W_enc.detach(), b_enc, K)(x)
    assert len(settled) == 1


def test_encoder_rounds_the_weights_once_and_not_for_a_few_rows(
    settled: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W_enc, b_enc = given(18, 100)
    made, rounded = [], topk_coarse.rounded
    monkeypatch.setattr(topk_coarse, "rounded", lambda W, *table: made.append(len(W)) or rounded(W, *table))
    encode = encoder(W_enc, b_enc, K)
    found = [encode(x) for _ in range(5)]
    assert (len(settled), made.count(D_SAE)) == (3, 1)
    assert len(made) == 2  # the other is a sample
    for values, indices in found[1:]:
        assert torch.equal(indices, found[0][1])
        torch.testing.assert_close(values, found[0][0])


def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each search is of."""
    found, search = [], topk_coarse._search
    monkeypatch.setattr(topk_coarse, "_search", lambda x, *rest: found.append(len(x)) or search(x, *rest))
    return found


def check_again(first: Tensor, second: Tensor, W_enc: Tensor, b_enc: Tensor, k: int = K) -> None:
    """The second is encoded after the first as it would be alone."""
    encode = encoder(W_enc, b_enc, k)
    encode(first)
    values, indices = encode(second)
    wanted = encoder(W_enc, b_enc, k)(second)
    torch.testing.assert_close(values, wanted[0], equal_nan=True)
    assert torch.equal(indices, wanted[1])


@pytest.mark.parametrize(("share", "shorter"), [(0.1, 1.0), (0.5, 1.0), (0.3, 1e-3), (0.3, 1e6)])
def test_rows_that_changed_a_little_are_searched_once_and_without_a_sample_of_their_own(
    share: float, shorter: float, settled: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W_enc, b_enc = given(20, 1000)
    found = searches(monkeypatch)
    check_again(x, shorter * (x - share * torch.randn_like(x)), W_enc, b_enc * min(shorter, 1))
    assert found == [1000, 1000, 1000]
    assert torch.cat(settled).float().mean() > 0.99


def test_rows_that_moved_further_than_the_others_are_searched_again(
    settled: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some rows all that was large is gone: what is left is far below what was reached."""
    x, W_enc, b_enc = given(21, 1000)
    W_enc[:150, 0] = torch.linspace(0.5, 1.5, 150)
    left = x.clone()
    left[:, 0] += 20 * (torch.arange(1000) % 9 != 1)
    x[:, 0] += 20
    found = searches(monkeypatch)
    check_again(x, left, W_enc, b_enc)
    assert found == [1000, 1000, 111, 1000]
    assert torch.cat(settled).float().mean() > 0.99


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, 1e30, 1e-30])
@pytest.mark.parametrize("when", [0, 1])
def test_rows_that_were_or_became_what_tells_nothing(value: float, when: int) -> None:
    x, W_enc, b_enc = given(22, 1000)
    of = [x, x + 0.1]
    of[when] = of[when].clone()
    of[when][::4] *= value
    check_again(*of, W_enc, b_enc)


def test_other_rows_after_some(settled: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from rows of another number, and what is taken from other rows does no harm."""
    x, W_enc, b_enc = given(23, 1000)
    found = searches(monkeypatch)
    check_again(x, x[:900], W_enc, b_enc)
    assert found == [1000, 900, 900]
    check_again(x, x.flip(0) * torch.logspace(-3, 3, 1000)[:, None], W_enc, b_enc)
    assert torch.cat(settled).float().mean() > 0.99


def test_nothing_is_kept_of_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_coarse, "LEAST_SAMPLED", 1001)
    x, W_enc, b_enc = given(24, 1000)
    found = searches(monkeypatch)
    check_again(x, x + 0.1, W_enc, b_enc)
    assert found == [1000, 1000, 1000]
