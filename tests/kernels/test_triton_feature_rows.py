"""The Triton sort_pairs, feature_sums and adam_rows against the reference in float64, and against torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, eps, needs_triton, only_listed_variants, random_normal

from csae import reference

pytestmark = needs_triton

# bfloat16 too: these kernels widen it by its bits, which the interpreter can do.
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LR, BETA1, BETA2, EPS = 0.1, 0.9, 0.99, 1e-3


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import feature_sums

    listed = [form for variant in variants() for form in forms(variant)]
    only_listed_variants(SimpleNamespace(variants=lambda: listed), monkeypatch)
    # So that runs that are short enough for a test are cut into pieces.
    monkeypatch.setattr(feature_sums, "MIN_PIECE", 64)


def variants():
    """Of both of the modules that feature_rows is made of."""
    from csae.kernels.triton import adam_rows, feature_sums

    return [*feature_sums.variants(), *adam_rows.variants()]


def forms(variant):
    """The variant, and what a GPU may be tuned to."""
    return [variant, *import_module(variant.kernel.fn.__module__).candidates(variant)]


def pairs_of(lengths: list[int], n: int, inactive: int = 0, seed: int = 0):
    """Pairs with runs of these lengths, given in a random order; features, tokens, sorted pairs."""
    from csae.kernels.triton.feature_rows import sort_pairs

    generator = torch.Generator().manual_seed(seed)
    d_sae = len(lengths)
    features = torch.repeat_interleave(torch.arange(d_sae + 1), torch.tensor([*lengths, inactive]))
    features = features[torch.randperm(len(features), generator=generator)].to(DEVICE)
    tokens = torch.randint(0, n, features.shape, generator=generator).to(DEVICE)
    return features, tokens, sort_pairs(features, tokens, d_sae)


def sums(features: Tensor, tokens: Tensor, weights: Tensor, rows: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """The gradient in float64, and the sum of the magnitudes of its terms."""
    factors = weights.double(), rows.double()
    sizes = [factor.abs() for factor in factors]
    return tuple(reference.feature_sums(features, tokens, *of, d_sae) for of in (factors, sizes))  # type: ignore[return-value]


def assert_sums(got: Tensor, want: Tensor, magnitude: Tensor, terms: int) -> None:
    """Within one rounding of the result, and one of float32 a term on the sum of the terms' magnitudes."""
    assert got.shape == want.shape
    tolerance = eps(got.dtype) * want.abs() + (terms + 2) * eps(torch.float32) * magnitude
    assert ((got.double() - want).abs() <= tolerance).all()


def test_pairs_are_sorted_by_feature_and_keep_their_order() -> None:
    from csae.kernels.triton.feature_rows import sort_pairs

    features = torch.tensor([3, 0, 5, 3, -1, 0, 2**40, 3, 2**32, 4], device=DEVICE)
    tokens = torch.tensor([7, 7, 0, 2, 1, 3, 4, 9, 5, 6], device=DEVICE)
    order, sorted_tokens, ends = sort_pairs(features, tokens, 5)
    assert order.tolist() == [1, 5, 0, 3, 7, 9, 2, 4, 6, 8]
    assert torch.equal(sorted_tokens, tokens[order])
    assert ends.tolist() == [0, 2, 2, 2, 5, 6]
    assert {order.dtype, sorted_tokens.dtype, ends.dtype} == {torch.int64}


def test_no_pairs() -> None:
    from csae.kernels.triton.feature_rows import feature_sums

    _, _, pairs = pairs_of([0, 0, 0], n=1)
    assert pairs.ends.tolist() == [0, 0, 0, 0]
    weights, rows = torch.empty(0, device=DEVICE), [random_normal(2, 8), random_normal(2, 3)]
    assert all((out == 0).all() for out in feature_sums(pairs, [weights, weights], rows))
    inactive = pairs_of([0, 0, 0], n=2, inactive=100)[2]
    assert (feature_sums(inactive, [random_normal(100)], [random_normal(2, 8)])[0] == 0).all()


def test_no_features_and_no_columns() -> None:
    from csae.kernels.triton.feature_rows import feature_sums

    pairs = pairs_of([], n=2, inactive=5)[2]
    assert feature_sums(pairs, [random_normal(5)], [random_normal(2, 4)])[0].shape == (0, 4)
    pairs = pairs_of([3, 2], n=2)[2]
    assert feature_sums(pairs, [random_normal(5)], [random_normal(2, 0)])[0].shape == (2, 0)


# Runs longer than a piece of 64: they cover several blocks, begin and end at a block's edge, meet in a block. Places:
# 0-63 | 64-127 | 128-191 | 192-255 | ...
RUNS = {
    "short": [3, 0, 1, 64, 0, 7, 0],
    "one feature has all": [0, 300, 0],
    "from edge to edge": [64, 0, 128, 64, 65],
    "two long ones meet in a block": [30, 70, 80, 5],
    "a long one ends, short ones, a long one begins": [100, 2, 3, 150, 9, 0],
    "ends one past an edge": [65, 64, 66, 190],
}


@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS.keys())
def test_runs_of_any_length(lengths: list[int]) -> None:
    from csae.kernels.triton.feature_rows import feature_sums

    features, tokens, pairs = pairs_of(lengths, n=11, inactive=13)
    weights, rows = random_normal(len(features)), [random_normal(11, d, seed=d) for d in (1, 8)]
    for got, of in zip(feature_sums(pairs, [weights, weights], rows), rows, strict=True):
        assert_sums(got, *sums(features, tokens, weights, of, len(lengths)), terms=max(lengths))


@pytest.mark.parametrize("long", [0, 63, 64, 79, 2345, 4999])
def test_a_long_run_is_found_among_many_features(long: int) -> None:
    """In rounds: 5000 features are searched at 64 places first."""
    from csae.kernels.triton.feature_rows import feature_sums

    lengths = [0] * 5000
    for feature, length in ((1, 20), (78, 3), (2344, 5), (2346, 30), (4998, 40), (long, 150)):
        lengths[feature] = length
    features, tokens, pairs = pairs_of(lengths, n=11, inactive=13)
    weights, rows = random_normal(len(features)), random_normal(11, 1, seed=1)
    got = feature_sums(pairs, [weights], [rows])[0]
    assert_sums(got, *sums(features, tokens, weights, rows, 5000), terms=150)


def test_pieces_grow_with_the_pairs_where_memory_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import feature_sums

    monkeypatch.setattr(feature_sums, "PARTIAL_BYTES", 8 * 4 * 3)  # two slots a block of 4-byte sums, for 3 blocks
    lengths = [40, 90, 10, 160]
    features, tokens, pairs = pairs_of(lengths, n=5)
    weights, rows = random_normal(300), random_normal(5, 4, seed=1)
    (_, _, partial), piece, _ = feature_sums.gradient_tensors(pairs, [(weights, rows)])
    assert (piece, tuple(partial.shape)) == (100, (6, 4))
    assert_sums(
        feature_sums.feature_sums(pairs, [weights], [rows])[0], *sums(features, tokens, weights, rows, 4), terms=160
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [1, 5, 17, 130, 520])
def test_sums_of_every_width(d: int, dtype: torch.dtype) -> None:
    """Two tables of one width, which are summed together, and one of another."""
    from csae.kernels.triton.feature_rows import feature_sums

    features, tokens, pairs = pairs_of([3, 0, 70, 9], n=6, inactive=4)
    weights = [random_normal(len(features), seed=seed) for seed in range(3)]
    rows = [random_normal(6, width, dtype=dtype, seed=seed) for seed, width in enumerate([d, d, 8])]
    got = feature_sums(pairs, weights, rows)
    for out, of, at in zip(got, weights, rows, strict=True):
        assert out.dtype == dtype
        assert_sums(out, *sums(features, tokens, of, at, 4), terms=70)
    again = feature_sums(pairs, weights, rows)
    assert all(torch.equal(one, two) for one, two in zip(got, again, strict=True))


def test_infinite_and_nan_rows_stay_with_their_features() -> None:
    from csae.kernels.triton.feature_rows import feature_sums, sort_pairs

    features = torch.tensor([0, 1, 1, 2, 3], device=DEVICE)
    tokens = torch.tensor([0, 0, 1, 2, 2], device=DEVICE)
    rows = torch.tensor([[math.inf], [math.nan], [1.0]], device=DEVICE).expand(3, 8)
    out = feature_sums(sort_pairs(features, tokens, 4), [torch.ones(5, device=DEVICE)], [rows])[0]
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor([math.inf, math.nan, 1, 1]), equal_nan=True)


def hyper_of(step: int, lazy: bool) -> Tensor:
    """What adam_rows takes, for step 1, 2, ...: the eps of SparseAdam is outside of the correction."""
    numbers = reference.adam_numbers(step, LR, BETA1, BETA2, EPS, lazy)
    return torch.tensor(numbers, dtype=torch.float32, device=DEVICE)


def seed_of(step: int) -> Tensor:
    return torch.tensor([step], device=DEVICE)


def table_of(d_sae: int, d: int, weights: Tensor, rows: Tensor, unit_rows: bool, moments: torch.dtype = torch.float32):
    from csae.kernels.pairs import Table

    param = random_normal(d_sae, d, seed=4)
    if unit_rows:
        param /= param.norm(dim=1, keepdim=True)
    avg, avg_sq = random_normal(d_sae, d, seed=5), random_normal(d_sae, d, seed=6).square() + 0.1
    return Table(param, avg.to(moments), avg_sq.to(moments), weights, rows, unit_rows)


def clones(table):
    return table._replace(param=table.param.clone(), exp_avg=table.exp_avg.clone(), exp_avg_sq=table.exp_avg_sq.clone())


@pytest.mark.parametrize("lazy", [False, True], ids=["exact", "lazy"])
def test_fifty_steps_equal_those_of_torch(lazy: bool) -> None:
    """The same parameters to the rounding of each step: Adam's, or SparseAdam's, which leaves rows as they are."""
    from csae.kernels.pairs import Table
    from csae.kernels.triton.feature_rows import adam_rows, feature_sums

    d_sae, d, steps = 7, 5, 50
    param = random_normal(d_sae, d)
    moments = [torch.zeros(d_sae, d, device=DEVICE) for _ in range(2)]
    theirs = torch.nn.Parameter(param.clone())
    options = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS}
    optimizer = torch.optim.SparseAdam([theirs], **options) if lazy else torch.optim.Adam([theirs], **options)
    seen = torch.zeros(d_sae, dtype=torch.bool, device=DEVICE)
    for step in range(1, steps + 1):
        # Feature 6 never fires, and others not in every step.
        lengths = [step % 3, 4, (step % 5) * 2, 1, step % 2, 70 if step % 5 == 0 else 6, 0]
        features, _, pairs = pairs_of(lengths, n=9, inactive=3, seed=step)
        weights, rows = random_normal(len(features), seed=step), random_normal(9, d, seed=-step)
        gradient = feature_sums(pairs, [weights], [rows])[0]
        fired = torch.tensor(lengths, device=DEVICE) > 0
        seen |= fired
        if lazy:
            rows_fired = fired.nonzero().T
            theirs.grad = torch.sparse_coo_tensor(rows_fired, gradient[fired], gradient.shape, check_invariants=True)
        else:
            theirs.grad = gradient
        optimizer.step()
        before = param.clone()
        adam_rows(pairs, [Table(param, *moments, weights, rows, False)], hyper_of(step, lazy), seed_of(step), lazy)
        if lazy:
            assert torch.equal(param[~fired], before[~fired])
        tolerance = step * eps(torch.float32) * (theirs.detach().abs().max() + LR)
        assert (param - theirs.detach()).abs().max() <= tolerance
    assert seen.tolist() == [True] * 6 + [False]
    assert not torch.equal(param[:6], random_normal(d_sae, d)[:6])


def adam_in_float64(table, gradient: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step of the reference."""
    return reference.adam_rows(*(tensor.double() for tensor in table[:3]), gradient, hyper.tolist(), table.unit_rows)


# The last two of unit norm are more than the registers of a program hold.
STEPS = [(d, False, False) for d in (1, 7, 17, 24, 520)]
STEPS += [(d, True, False) for d in (1, 7, 24, 520, 2000, 7992, 521, 8200)]
STEPS += [(7, False, True), (24, True, True), (130, True, True)]


@pytest.mark.parametrize(("d", "unit_rows", "lazy"), STEPS)
def test_a_step_at_every_width(d: int, unit_rows: bool, lazy: bool) -> None:
    from csae.kernels.triton.feature_rows import adam_rows

    features, tokens, pairs = pairs_of([2, 0, 66], n=4, inactive=3)
    weights, rows = random_normal(len(features), seed=1), random_normal(4, d, seed=2)
    table = table_of(3, d, weights, rows, unit_rows)
    before, again = clones(table), clones(table)
    want = adam_in_float64(table, sums(features, tokens, weights, rows, 3)[0], hyper_of(3, lazy))
    adam_rows(pairs, [table], hyper_of(3, lazy), seed_of(3), lazy)
    for got, expected, old in zip(table[:3], want, before[:3], strict=True):
        if lazy:
            expected[1] = old[1].double()
            assert torch.equal(got[1], old[1])
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    adam_rows(pairs, [again], hyper_of(3, lazy), seed_of(3), lazy)
    assert all(torch.equal(one, two) for one, two in zip(again[:3], table[:3], strict=True))


@pytest.mark.parametrize(
    ("d", "unit_rows", "lazy"), [(1, False, False), (24, True, True), (130, True, False), (8200, True, False)]
)
def test_the_rounded_copy_is_written_with_the_rows(d: int, unit_rows: bool, lazy: bool) -> None:
    """To the nearest, ties to even, as torch rounds; rows that a lazy step leaves stay as they are in the copy too."""
    from csae.kernels.triton.feature_rows import adam_rows

    features, _, pairs = pairs_of([2, 0, 66], n=4, inactive=3)
    weights, rows = random_normal(len(features), seed=1), random_normal(4, d, seed=2)
    table = table_of(3, d, weights, rows, unit_rows)
    table.param[1] = torch.tensor([1 + 2**-8, math.inf, -math.nan, 1 + 3 * 2**-8, 1e-40, 3.4e38]).repeat(d)[:d]
    copy = torch.full_like(table.param, 7, dtype=torch.bfloat16)
    table = table._replace(rounded=copy, exp_avg=torch.zeros_like(table.param))
    if not unit_rows:
        table.exp_avg_sq.fill_(1)  # so that the row without a gradient stays as it is
    alone = clones(table)._replace(rounded=None)
    adam_rows(pairs, [table], hyper_of(3, lazy), seed_of(3), lazy)
    adam_rows(pairs, [alone], hyper_of(3, lazy), seed_of(3), lazy)
    for one, two in zip(table[:3], alone[:3], strict=True):
        assert torch.equal(one.nan_to_num(5), two.nan_to_num(5))
    want = table.param.bfloat16()
    want[1] = 7 if lazy else want[1]
    assert torch.equal(copy.isnan(), want.isnan())
    assert torch.equal(copy.nan_to_num(5), want.nan_to_num(5))


def test_tables_of_different_widths_and_kinds_in_one_call() -> None:
    from csae.kernels.triton.feature_rows import adam_rows

    features, _, pairs = pairs_of([2, 5, 66, 0], n=4)
    weights = [random_normal(len(features), seed=seed) for seed in range(3)]
    rows = [random_normal(4, 24, dtype=torch.float16), random_normal(4, 24, seed=1), torch.ones(4, 1, device=DEVICE)]
    tables = [
        table_of(4, of.shape[1], at, of, unit) for at, of, unit in zip(weights, rows, (False, True, False), strict=True)
    ]
    apart = [clones(table) for table in tables]
    adam_rows(pairs, tables, hyper_of(1, False), seed_of(1), False)
    for table, alone in zip(tables, apart, strict=True):
        adam_rows(pairs, [alone], hyper_of(1, False), seed_of(1), False)
        assert all(torch.equal(one, two) for one, two in zip(table[:3], alone[:3], strict=True))


@pytest.mark.parametrize("d", [8, 130])
def test_rows_of_zeros_are_not_divided_by_zero(d: int) -> None:
    from csae.kernels.triton.feature_rows import adam_rows

    pairs = pairs_of([0, 0], n=1)[2]
    table = table_of(2, d, torch.empty(0, device=DEVICE), random_normal(1, d), unit_rows=True)
    for tensor in table[:3]:
        tensor[0] = 0
    adam_rows(pairs, [table], hyper_of(1, False), seed_of(1), False)
    assert (table.param[0] == 0).all()
    torch.testing.assert_close(table.param[1].norm().cpu(), torch.tensor(1.0))


def hash32(x: Tensor) -> Tensor:
    """lowbias32 on integers below 2^32, held as int64."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def rounded_by_chance(x: Tensor, seed: int, first_row: int) -> Tensor:
    """float32 -> bfloat16: 16 bits of chance are added to the bits, of which the upper 16 stay."""
    places = torch.arange(x.numel(), device=x.device).view(x.shape) + first_row * x.shape[1] & 0xFFFFFFFF
    chance = hash32(places ^ hash32(torch.tensor(seed & 0xFFFFFFFF, device=x.device))) >> 16
    bits = (x.view(torch.int32).long() & 0xFFFFFFFF) + chance
    return torch.where(x.isnan(), torch.nan, (bits >> 16).to(torch.int16).view(torch.bfloat16))


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seed", "first_row"), [(1, 0), (2**32 + 5, 7), (2**31 + 7, 2**28 + 1)])
@pytest.mark.parametrize("d", [24, 9000])
def test_bfloat16_moments_are_rounded_by_the_hash_of_their_place(
    d: int, seed: int, first_row: int, rows_dtype: torch.dtype
) -> None:
    from csae.kernels.triton.feature_rows import adam_rows

    features, _, pairs = pairs_of([2, 0, 66], n=4)
    weights, rows = random_normal(len(features), seed=1), random_normal(4, d, dtype=rows_dtype, seed=2)
    rows[0, 3], rows[1, 4] = math.inf, math.nan
    narrow = table_of(3, d, weights, rows, True, torch.bfloat16)
    wide = narrow._replace(
        param=narrow.param.clone(), exp_avg=narrow.exp_avg.float(), exp_avg_sq=narrow.exp_avg_sq.float()
    )
    for table in (narrow, wide):
        adam_rows(pairs, [table], hyper_of(2, False), torch.tensor([seed], device=DEVICE), False, first_row)
    torch.testing.assert_close(narrow.param, wide.param, rtol=0, atol=0, equal_nan=True)
    for got, exact, own_seed in (
        (narrow.exp_avg, wide.exp_avg, seed),
        (narrow.exp_avg_sq, wide.exp_avg_sq, seed + 0x9E3779B9),
    ):
        torch.testing.assert_close(got, rounded_by_chance(exact, own_seed, first_row), rtol=0, atol=0, equal_nan=True)
    assert narrow.exp_avg.isnan().any()
    assert not torch.equal(narrow.exp_avg[1], wide.exp_avg[1].to(torch.bfloat16))


def test_an_infinite_moment_stays_infinite() -> None:
    from csae.kernels.triton.feature_rows import adam_rows

    pairs = pairs_of([1], n=1)[2]
    weights, rows = torch.ones(1, device=DEVICE), torch.tensor([[math.inf, -math.inf] * 4], device=DEVICE)
    table = table_of(1, 8, weights, rows, False, torch.bfloat16)
    adam_rows(pairs, [table], hyper_of(1, False), seed_of(1), False)
    assert torch.equal(table.exp_avg.float(), rows)
    assert (table.exp_avg_sq == math.inf).all()


def test_every_form_that_a_gpu_may_be_tuned_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import feature_rows, tuning

    d = 264
    features, tokens, pairs = pairs_of([2, 0, 66], n=4)
    weights, rows = random_normal(len(features), seed=1), random_normal(4, d, seed=2)
    want, magnitude = sums(features, tokens, weights, rows, 3)
    before = table_of(3, d, weights, rows, True)
    updated = adam_in_float64(before, want, hyper_of(1, False))
    most = max(len(forms(variant)) for variant in variants())
    assert most > 5
    for place in range(most):

        def other(variant, device, place=place):
            found = forms(variant)
            return found[place % len(found)]

        monkeypatch.setattr(tuning, "best", other)
        assert_sums(feature_rows.feature_sums(pairs, [weights], [rows])[0], want, magnitude, terms=66)
        table = clones(before)
        feature_rows.adam_rows(pairs, [table], hyper_of(1, False), seed_of(1), False)
        for got, expected in zip(table[:3], updated, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_updated_must_be_in_order_in_memory() -> None:
    from csae.kernels.triton.feature_rows import adam_rows

    pairs = pairs_of([1, 1], n=1)[2]
    table = table_of(2, 8, random_normal(2), random_normal(1, 8), False)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        strided = table._replace(**{name: random_normal(8, 2).T})
        with pytest.raises(ValueError, match=f"{name}: given strides"):
            adam_rows(pairs, [strided], hyper_of(1, False), seed_of(1), False)
    mixed = table._replace(exp_avg_sq=table.exp_avg_sq.bfloat16())
    with pytest.raises(TypeError, match="exp_avg_sq_ptr: given torch"):
        adam_rows(pairs, [mixed], hyper_of(1, False), seed_of(1), False)
    shifted = table._replace(param=random_normal(17)[1:].view(2, 8))
    with pytest.raises(ValueError, match="param: given an address that is 4 bytes past"):
        adam_rows(pairs, [shifted], hyper_of(1, False), seed_of(1), False)


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph; on a CPU, where there are none, itself."""
    if DEVICE == "cpu":
        return step
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def test_a_captured_step_on_other_pairs_and_step_sizes() -> None:
    from csae.kernels.triton.feature_rows import adam_rows, feature_sums, sort_pairs

    n, d_sae, d = 100, 9, 24
    weights, rows = random_normal(2 * n), random_normal(n, d, seed=1)
    features, tokens = torch.zeros(2 * n, dtype=torch.int64, device=DEVICE), torch.arange(2 * n, device=DEVICE) // 2
    hyper, seed = hyper_of(1, False), seed_of(1)
    table = table_of(d_sae, d, weights, rows, True)

    def step() -> Tensor:
        pairs = sort_pairs(features, tokens, d_sae)
        adam_rows(pairs, [table], hyper, seed, False)
        return feature_sums(pairs, [weights], [rows])[0]

    replay = captured(step)
    for place in range(3):
        features.copy_(torch.randint(0, d_sae + 1, (2 * n,), generator=torch.Generator().manual_seed(place)))
        features[: place * 70] = 2
        hyper.copy_(hyper_of(place + 1, False))
        want, magnitude = sums(features, tokens, weights, rows, d_sae)
        updated = adam_in_float64(table, want, hyper)
        assert_sums(replay(), want, magnitude, terms=2 * n)
        for got, expected in zip(table[:3], updated, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
