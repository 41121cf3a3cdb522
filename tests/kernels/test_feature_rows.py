"""Pairs sorted by feature, the sums of their runs, and Adam on them: the native library and plain PyTorch alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu import feature_rows as native
from csae.kernels.pairs import Pairs, Table
from csae.kernels.portable import feature_rows as portable

needs_library = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))

LONG = 1024  # a longer run is cut into parts
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["native", "portable"])
def feature_rows(request: pytest.FixtureRequest) -> ModuleType:
    """The kernels."""
    if request.param == "portable":
        return portable
    if not cpu.available():
        pytest.skip(str(cpu.why_not()))
    return native


def padded(tensor: Tensor) -> Tensor:
    """The same matrix with a gap of NaN between its rows."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 3), math.nan)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def features_of(P: int, d_sae: int, generator: torch.Generator) -> Tensor:
    """Some in no pair, some in many, the one in the middle in a third of all; some pairs are inactive."""
    features = torch.randint(-1, d_sae + 1, (P,), generator=generator)
    often = torch.rand(P, generator=generator) < 1 / 3
    return torch.where(often, d_sae // 2, torch.where(features % 3 == 0, d_sae, features))


def case(
    P: int,
    N: int,
    d_sae: int,
    d: int,
    *,
    seed: int = 0,
    unit_rows: bool = False,
    moments: torch.dtype = torch.float32,
    rows: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Table]:
    """Features, tokens and a table with moments as after some steps; exp_avg_sq is large enough for smooth steps."""
    generator = torch.Generator().manual_seed(seed)
    features = features_of(P, d_sae, generator)
    tokens = torch.randint(max(N, 1), (P,), generator=generator)
    param = torch.randn(d_sae, d, generator=generator)
    table = Table(
        padded(torch.nn.functional.normalize(param, dim=1) if unit_rows else param),
        padded(torch.randn(d_sae, d, generator=generator).to(moments)),
        padded((torch.rand(d_sae, d, generator=generator) + 0.1).to(moments)),
        torch.randn(P, generator=generator),
        padded(torch.randn(N, d, generator=generator).to(rows)),
        unit_rows,
    )
    return features, tokens, table


def copy(table: Table, dtype: torch.dtype | None = None) -> Table:
    """Another table of the same numbers, but for the moments' dtype where it is given."""
    exp_avg, exp_avg_sq = (moment.to(dtype or moment.dtype, copy=True) for moment in table[1:3])
    return table._replace(param=table.param.clone(), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def dense_gradient(features: Tensor, tokens: Tensor, table: Table, absolute: bool = False) -> Tensor:
    """[d_sae, d] in float64, that of the reference; the sum of the terms' sizes with `absolute`."""
    factors = table.weights.double(), table.rows.double()
    weights, rows = (factor.abs() for factor in factors) if absolute else factors
    return reference.feature_sums(features, tokens, weights, rows, table.param.shape[0])


def hyper_of(t: int, lr: float = 0.01, eps: float = 1e-8, beta1: float = 0.9, beta2: float = 0.999) -> Tensor:
    return torch.tensor(reference.adam_numbers(t, lr, beta1, beta2, eps, lazy=False), dtype=torch.float32)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


SIZES = [(0, 5, 7, 6), (9, 4, 0, 6), (60, 8, 30, 0), (0, 0, 7, 6), (80, 9, 30, 1), (200, 9, 30, 67), (4000, 50, 3, 33)]


# --- sort_pairs ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(features=st.lists(st.one_of(st.integers(-2, 8), st.sampled_from([2**40, -(2**62)])), max_size=40))
def test_pairs_are_sorted_stably(features: list[int]) -> None:
    d_sae = 6
    tokens = [3 * i + 1 for i in range(len(features))]
    key = [f if 0 <= f < d_sae else d_sae for f in features]
    order = sorted(range(len(features)), key=lambda p: (key[p], p))
    wanted = (order, [tokens[p] for p in order], [sum(k < f for k in key) for f in range(d_sae + 1)])
    given = torch.tensor(features, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64), d_sae
    for kernels in (native, portable) if cpu.available() else (portable,):
        assert tuple(part.tolist() for part in kernels.sort_pairs(*given)) == wanted


@needs_library
@pytest.mark.parametrize("d_sae", [1, 40, 3000])
def test_pairs_sorted_by_several_threads(d_sae: int) -> None:
    features = torch.randint(-1, d_sae + 1, (140_000,), generator=torch.Generator().manual_seed(0))  # enough for four
    tokens = torch.arange(140_000)
    wanted = torch.where((features >= 0) & (features < d_sae), features, d_sae).argsort(stable=True)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(native.sort_pairs(features, tokens, d_sae).order, wanted)


# --- feature_sums ----------------------------------------------------------------------------------------


def assert_sums(feature_rows: ModuleType, features: Tensor, tokens: Tensor, tables: list[Table]) -> None:
    """The sums of all tables against float64."""
    pairs = feature_rows.sort_pairs(features, tokens, tables[0].param.shape[0])
    sums = feature_rows.feature_sums(pairs, [t.weights for t in tables], [t.rows for t in tables])
    for table, given_sum in zip(tables, sums, strict=True):
        dtype = table.rows.dtype
        assert given_sum.dtype == dtype
        # Summed in float32, then rounded once.
        summing, rounding = (1e-14, 0) if dtype == torch.float64 else (3e-6, torch.finfo(dtype).eps / 2)
        of_absolutes = dense_gradient(features, tokens, table, absolute=True)
        wanted = dense_gradient(features, tokens, table)
        assert ((given_sum.double() - wanted).abs() <= summing * of_absolutes + rounding * wanted.abs()).all()


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("P", "N", "d_sae", "d"), SIZES)
def test_feature_sums(feature_rows: ModuleType, P: int, N: int, d_sae: int, d: int, rows: torch.dtype) -> None:
    features, tokens, table = case(P, N, d_sae, d, rows=rows)
    narrow = table._replace(rows=table.rows[:, : d // 2], param=table.param[:, : d // 2])
    if feature_rows is native and rows == torch.float64:
        with pytest.raises(TypeError, match=r"rows\[0\]: given torch.float64"):
            assert_sums(feature_rows, features, tokens, [table])
        return
    assert_sums(feature_rows, features, tokens, [table, narrow])


@needs_library
@pytest.mark.parametrize("rows", DTYPES)
@pytest.mark.parametrize("d", [1, 17, 128, 300, 576])
def test_feature_sums_in_each_isa(isa: str, d: int, rows: torch.dtype) -> None:
    features, tokens, table = case(4000, 40, 50, d, rows=rows)
    assert_sums(native, features, tokens, [table])


def test_no_tables(feature_rows: ModuleType) -> None:
    features, tokens, _ = case(9, 4, 7, 6)
    pairs = feature_rows.sort_pairs(features, tokens, 7)
    assert feature_rows.feature_sums(pairs, [], []) == []
    feature_rows.adam_rows(pairs, [], hyper_of(1), torch.tensor([1]), lazy=False)


# --- adam_rows -------------------------------------------------------------------------------------------


def plain_step(features: Tensor, tokens: Tensor, table: Table, hyper: Tensor, lazy: bool) -> tuple[Tensor, ...]:
    """What becomes of param, exp_avg and exp_avg_sq, in float64; a lazy step leaves rows without a pair as they are."""
    before = [tensor.double() for tensor in table[:3]]
    gradient = dense_gradient(features, tokens, table)
    after = reference.adam_rows(*before, gradient, hyper.tolist(), table.unit_rows)
    stays = lazy & ~torch.isin(torch.arange(len(gradient)), features).unsqueeze(1)
    return tuple(torch.where(stays, old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("lazy", [False, True], ids=["exact", "lazy"])
@pytest.mark.parametrize("unit_rows", [False, True], ids=["any rows", "unit rows"])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("P", "N", "d_sae", "d"), SIZES)
def test_a_step(
    feature_rows: ModuleType, P: int, N: int, d_sae: int, d: int, rows: torch.dtype, unit_rows: bool, lazy: bool
) -> None:
    features, tokens, table = case(P, N, d_sae, d, unit_rows=unit_rows, rows=rows)
    other = case(P, N, d_sae, 1, seed=1)[2]
    wanted = [plain_step(features, tokens, one, hyper_of(3), lazy) for one in (table, other)]
    pairs = feature_rows.sort_pairs(features, tokens, d_sae)
    feature_rows.adam_rows(pairs, [table, other], hyper_of(3), torch.tensor([3]), lazy)
    for one, wanted_of_one in zip((table, other), wanted, strict=True):
        for given_tensor, wanted_tensor in zip(one, wanted_of_one, strict=False):
            # Gradients of long runs are near 1000 with a rounding of some 1e-4, their squares near 1e6.
            torch.testing.assert_close(given_tensor.double(), wanted_tensor, rtol=2e-5, atol=2e-5)


@needs_library
@pytest.mark.parametrize("moments", DTYPES)
@pytest.mark.parametrize("d", [1, 15, 16, 33, 576])
def test_a_step_in_each_isa(isa: str, d: int, moments: torch.dtype) -> None:
    for unit_rows in (False, True):
        features, tokens, table = case(300, 9, 40, d, unit_rows=unit_rows, moments=moments)
        param, exp_avg, exp_avg_sq = plain_step(features, tokens, table, hyper_of(3), False)
        pairs = native.sort_pairs(features, tokens, 40)
        native.adam_rows(pairs, [table], hyper_of(3), torch.tensor([3]), False)
        torch.testing.assert_close(table.param.double(), param, rtol=1e-5, atol=1e-5)
        last_bit = 2**-7 if moments == torch.bfloat16 else 1e-5
        torch.testing.assert_close(table.exp_avg.double(), exp_avg, rtol=last_bit, atol=1e-5)
        torch.testing.assert_close(table.exp_avg_sq.double(), exp_avg_sq, rtol=last_bit, atol=1e-5)


def many_steps(path_of_step: Callable[[int, Tensor, Tensor, Tensor], None], d_sae: int) -> None:
    """50 steps with features, tokens and weights of their own each."""
    generator = torch.Generator().manual_seed(7)
    for t in range(1, 51):
        features = features_of(60, d_sae, generator)
        tokens = torch.randint(8, (60,), generator=generator)
        path_of_step(t, features, tokens, torch.randn(60, generator=generator))


def test_exact_is_torch_adam_over_50_steps(feature_rows: ModuleType) -> None:
    d_sae, d = 30, 37
    start = torch.randn(d_sae, d, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(8, d, generator=torch.Generator().manual_seed(2))
    table = Table(start.clone(), torch.zeros(d_sae, d), torch.zeros(d_sae, d), torch.zeros(60), rows, False)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.01)

    def step(t: int, features: Tensor, tokens: Tensor, weights: Tensor) -> None:
        now = table._replace(weights=weights)
        parameter.grad = dense_gradient(features, tokens, now).float()
        optimizer.step()
        pairs = feature_rows.sort_pairs(features, tokens, d_sae)
        feature_rows.adam_rows(pairs, [now], hyper_of(t), torch.tensor([t]), lazy=False)

    many_steps(step, d_sae)
    assert (parameter - start).abs().max() > 0.1
    # 50 roundings of numbers up to 4, and of steps of 0.01
    torch.testing.assert_close(table.param, parameter.detach(), rtol=0, atol=3e-6)


def test_lazy_is_torch_sparse_adam_over_50_steps(feature_rows: ModuleType) -> None:
    d_sae, d = 30, 37
    start = torch.randn(d_sae, d, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(8, d, generator=torch.Generator().manual_seed(2))
    table = Table(start.clone(), torch.zeros(d_sae, d), torch.zeros(d_sae, d), torch.zeros(60), rows, False)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SparseAdam([parameter], lr=0.01)

    def step(t: int, features: Tensor, tokens: Tensor, weights: Tensor) -> None:
        now = table._replace(weights=weights)
        touched = features[(features >= 0) & (features < d_sae)].unique()
        gradient = dense_gradient(features, tokens, now).float()[touched]
        parameter.grad = torch.sparse_coo_tensor(touched[None], gradient, (d_sae, d), check_invariants=True)
        optimizer.step()
        pairs = feature_rows.sort_pairs(features, tokens, d_sae)
        # SparseAdam adds eps to the root before the correction.
        hyper = hyper_of(t, eps=1e-8 / math.sqrt(1 - 0.999**t))
        feature_rows.adam_rows(pairs, [now], hyper, torch.tensor([t]), lazy=True)

    many_steps(step, d_sae)
    assert (parameter - start).abs().max() > 0.1
    torch.testing.assert_close(table.param, parameter.detach(), rtol=0, atol=3e-6)


def test_unit_rows_keep_their_norm(feature_rows: ModuleType) -> None:
    d_sae = 30
    table = case(60, 8, d_sae, 37, unit_rows=True)[2]

    def step(t: int, features: Tensor, tokens: Tensor, weights: Tensor) -> None:
        pairs = feature_rows.sort_pairs(features, tokens, d_sae)
        feature_rows.adam_rows(pairs, [table._replace(weights=weights)], hyper_of(t), torch.tensor([t]), lazy=False)

    many_steps(step, d_sae)
    torch.testing.assert_close(table.param.norm(dim=1), torch.ones(d_sae), rtol=0, atol=1e-6)


def test_a_row_of_zeros_stays(feature_rows: ModuleType) -> None:
    features, tokens, table = case(0, 5, 7, 6, unit_rows=True)
    table.param[3], table.exp_avg[3] = 0, 0
    feature_rows.adam_rows(feature_rows.sort_pairs(features, tokens, 7), [table], hyper_of(1), torch.tensor([1]), False)
    assert (table.param[3] == 0).all()
    assert table.param.isfinite().all()


@pytest.mark.parametrize("unit_rows", [False, True], ids=["any rows", "unit rows"])
@pytest.mark.parametrize("lazy", [False, True], ids=["exact", "lazy"])
@pytest.mark.parametrize("moments", DTYPES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(
    feature_rows: ModuleType, broken: float, moments: torch.dtype, lazy: bool, unit_rows: bool
) -> None:
    features, tokens, table = case(60, 8, 30, 21, moments=moments, unit_rows=unit_rows)
    whole = copy(table)
    feature = features[(features >= 0) & (features < 30)][0]
    pairs = feature_rows.sort_pairs(features, tokens, 30)
    table.weights[(features == feature).nonzero()[0]] = broken
    for one in (table, whole._replace(weights=torch.where(table.weights.isfinite(), table.weights, 0))):
        feature_rows.adam_rows(pairs, [one], hyper_of(2), torch.tensor([2]), lazy)
    others = torch.arange(30) != feature
    for given_tensor, wanted in zip(table[:3], whole[:3], strict=True):
        assert torch.equal(bits(given_tensor)[others], bits(wanted)[others])
        assert not given_tensor[feature].isfinite().any()


@needs_library
def test_denormal_moments_become_zero(isa: str) -> None:
    # Where they stay denormal, as those of a dead feature do, a step takes ten times as long.
    _, _, table = case(0, 4, 5, 37)
    table.exp_avg.fill_(1e-39)
    table.exp_avg_sq.fill_(1e-39)
    table.param.zero_()
    empty = torch.zeros(0, dtype=torch.int64)
    native.adam_rows(native.sort_pairs(empty, empty, 5), [table], hyper_of(1), torch.tensor([1]), False)
    assert all((tensor == 0).all() for tensor in table[:3])
    assert (torch.full((100,), 1e-39) * 0.5 > 0).all()  # everything else computes as before


# --- bfloat16 moments ------------------------------------------------------------------------------------


def hash32(x: int) -> int:
    """The definition, in Python."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def rounded_by_chance(x: Tensor, seed: int, moment: int) -> Tensor:
    """x [d_sae, d] float32 -> the bits of its bfloat16, as the step with this seed rounds it."""
    of_step = hash32((seed + moment * 0x9E3779B9) % 2**32)
    words = x.contiguous().view(torch.int32).flatten().tolist()
    halves = [(word % 2**32 + (hash32(place ^ of_step) >> 16)) % 2**32 >> 16 for place, word in enumerate(words)]
    return torch.tensor([half - 2**16 if half >= 2**15 else half for half in halves], dtype=torch.int16).view(x.shape)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 + 5])
def test_moments_are_rounded_by_the_hash(feature_rows: ModuleType, seed: int) -> None:
    features, tokens, table = case(300, 9, 40, 37, moments=torch.bfloat16)
    pairs = feature_rows.sort_pairs(features, tokens, 40)
    exact = copy(table, torch.float32)
    for one in (exact, table):
        feature_rows.adam_rows(pairs, [one], hyper_of(5), torch.tensor([seed]), lazy=False)
    assert torch.equal(bits(table.exp_avg), rounded_by_chance(exact.exp_avg, seed, 0))
    assert torch.equal(bits(table.exp_avg_sq), rounded_by_chance(exact.exp_avg_sq, seed, 1))


@needs_library
def test_moments_are_rounded_by_the_hash_in_each_isa(isa: str) -> None:
    features, tokens, table = case(300, 9, 40, 37, moments=torch.bfloat16)
    pairs = native.sort_pairs(features, tokens, 40)
    exact = copy(table, torch.float32)
    for one in (exact, table):
        native.adam_rows(pairs, [one], hyper_of(5), torch.tensor([99]), lazy=False)
    assert torch.equal(bits(table.exp_avg), rounded_by_chance(exact.exp_avg, 99, 0))
    assert torch.equal(bits(table.exp_avg_sq), rounded_by_chance(exact.exp_avg_sq, 99, 1))


@pytest.mark.parametrize("unit_rows", [False, True], ids=["any rows", "unit rows"])
def test_parts_of_a_table_round_as_the_whole(feature_rows: ModuleType, unit_rows: bool) -> None:
    features, tokens, table = case(300, 9, 40, 37, moments=torch.bfloat16, unit_rows=unit_rows)
    parts = [copy(table)._replace(weights=table.weights, rows=table.rows) for _ in range(3)]
    feature_rows.adam_rows(
        feature_rows.sort_pairs(features, tokens, 40), [table], hyper_of(5), torch.tensor([5]), False
    )
    for part, start, stop in zip(parts, (0, 17, 39), (17, 39, 40), strict=True):
        own = part._replace(**{name: getattr(part, name)[start:stop] for name in ("param", "exp_avg", "exp_avg_sq")})
        pairs = feature_rows.sort_pairs(torch.where(features < stop, features - start, -1), tokens, stop - start)
        feature_rows.adam_rows(pairs, [own], hyper_of(5), torch.tensor([5]), False, first_row=start)
        for ours, whole in zip(own[:3], table[:3], strict=True):
            assert torch.equal(bits(ours), bits(whole[start:stop]))


def test_rounding_has_no_bias(feature_rows: ModuleType) -> None:
    # A third of the way between two bfloat16: without chance, or with the same in each step, it stays or is off.
    x = 1 + 2**-7 / 3
    empty = torch.zeros(0, dtype=torch.int64)
    pairs = feature_rows.sort_pairs(empty, empty, 200)
    means = []
    for seed in range(20):
        table = Table(
            torch.zeros(200, 50),
            torch.full((200, 50), 1.0, dtype=torch.bfloat16),
            torch.full((200, 50), 1.0, dtype=torch.bfloat16),
            torch.zeros(0),
            torch.zeros(0, 50),
            False,
        )
        # m += (0 - m) * (1 - x), v = v * x
        hyper = torch.tensor([0.0, 1.0, 1e-8, 1 - x, x, 0.0])
        feature_rows.adam_rows(pairs, [table], hyper, torch.tensor([seed]), lazy=False)
        means.append([table.exp_avg.float().mean(), table.exp_avg_sq.float().mean()])
    # 10,000 elements, each up by 2^-7 with probability 1/3: the mean's standard deviation is 4e-5
    off = (torch.tensor(means) - x).abs()
    assert off.max() < 4 * 4e-5
    assert off.mean() < 4e-5


# --- the native library ----------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("moments", DTYPES)
@pytest.mark.parametrize("lazy", [False, True], ids=["exact", "lazy"])
@pytest.mark.parametrize("d_sae", [1, 2, 700])
def test_same_bits_for_any_number_of_threads(d_sae: int, lazy: bool, moments: torch.dtype) -> None:
    features, tokens, table = case(20 * LONG, 50, d_sae, 33, unit_rows=True, moments=moments)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        one = copy(table)
        pairs = native.sort_pairs(features, tokens, d_sae)
        assert pairs.ends.diff().max() > LONG
        native.adam_rows(pairs, [one], hyper_of(2), torch.tensor([2]), lazy)
        sums = native.feature_sums(pairs, [table.weights], [table.rows])
        results.append([bits(tensor) for tensor in (*one[:3], *sums)])
    for result in results[1:]:
        assert all(torch.equal(*both) for both in zip(results[0], result, strict=True))


@needs_library
def test_a_run_is_added_in_order_and_a_long_one_in_parts() -> None:
    def total(weights: list[float]) -> float:
        features = torch.zeros(len(weights), dtype=torch.int64)
        pairs = native.sort_pairs(features, features, 1)
        return native.feature_sums(pairs, [torch.tensor(weights)], [torch.ones(1, 1)])[0].item()

    # In float32, 1e8 + 1 is 1e8, and 5 - 1e8 is 8 - 1e8.
    zeros = [0.0] * (LONG - 2)
    assert total([1e8, 1.0, -1e8]) == 0
    assert total([1e8, *zeros, 5.0 - 1e8]) == 8
    assert total([1e8, *zeros, -1e8, 5.0]) == 5
    assert total([1e8, 0.0, *zeros, -1e8, 5.0]) == 8


@needs_library
def test_nothing_between_rows_is_touched() -> None:
    features, tokens, table = case(300, 9, 40, 37)
    gaps = [tensor.as_strided((40, 3), (40, 1), 37) for tensor in table[:3]]
    # the last row ends where the memory does
    native.adam_rows(native.sort_pairs(features, tokens, 40), [table], hyper_of(2), torch.tensor([2]), False)
    assert all(gap.isnan().all() for gap in gaps)
    assert all(tensor.isfinite().all() for tensor in table[:3])


def replaced(pairs: Pairs, part: str, at: int, value: int) -> Pairs:
    changed = getattr(pairs, part).clone()
    changed[at] = value
    return pairs._replace(**{part: changed})


@needs_library
@pytest.mark.parametrize(
    ("part", "at", "value"),
    [
        ("order", 0, -1),
        ("order", 3, 60),
        ("tokens", 0, 8),
        ("tokens", 2, -(2**62)),
        ("ends", 0, 1),
        ("ends", 5, 2**40),
        ("ends", 29, -1),
        ("ends", 30, 61),
    ],
)
def test_wrong_pairs_are_refused(part: str, at: int, value: int) -> None:
    features, tokens, table = case(60, 8, 30, 5)
    pairs = replaced(native.sort_pairs(features, tokens, 30), part, at, value)
    before = copy(table)
    with pytest.raises(ValueError, match="adam_rows: given pairs with an order or a token out of range"):
        native.adam_rows(pairs, [table], hyper_of(1), torch.tensor([1]), False)
    assert all(torch.equal(*both) for both in zip(table[:3], before[:3], strict=True))
    with pytest.raises(ValueError, match="feature_sums: given pairs"):
        native.feature_sums(pairs, [table.weights], [table.rows])


FEATURES, TOKENS, TABLE = case(60, 8, 30, 5)
PAIRS = portable.sort_pairs(FEATURES, TOKENS, 30)


def step_of(**changes: object) -> Callable[[], None]:
    return lambda: native.adam_rows(PAIRS, [TABLE._replace(**changes)], hyper_of(1), torch.tensor([1]), False)


@needs_library
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: native.sort_pairs(FEATURES.int(), TOKENS, 30),
            TypeError,
            "features: given torch.int32; needed torch.int64",
        ),
        (lambda: native.sort_pairs(FEATURES, TOKENS[1:], 30), ValueError, r"tokens: given shape \[59\]; needed \[60\]"),
        (lambda: native.sort_pairs(FEATURES, TOKENS, -1), ValueError, "d_sae: given -1; needed 0 or more"),
        (lambda: native.sort_pairs(FEATURES, TOKENS, 3.0), TypeError, "d_sae: given float; needed int"),
        (step_of(weights=TABLE.weights.double()), TypeError, r"tables\[0\].weights: given torch.float64"),
        (step_of(weights=TABLE.weights[1:]), ValueError, r"tables\[0\].weights: given shape \[59\]; needed \[60\]"),
        (
            step_of(rows=TABLE.rows.double()),
            TypeError,
            r"tables\[0\].rows: given torch.float64; needed torch.float32 or",
        ),
        (step_of(rows=TABLE.rows[:, 1:]), ValueError, r"tables\[0\].param: given shape \[30, 5\]; needed \[30, 4\]"),
        (step_of(param=TABLE.param.double()), TypeError, r"tables\[0\].param: given torch.float64"),
        (step_of(param=torch.zeros(5).expand(30, 5)), ValueError, r"tables\[0\].param: .*rows that don't overlap"),
        (step_of(exp_avg=TABLE.exp_avg.half()), TypeError, r"tables\[0\].exp_avg: given torch.float16"),
        (
            step_of(exp_avg_sq=TABLE.exp_avg_sq.bfloat16()),
            TypeError,
            r"tables\[0\].exp_avg_sq: given torch.bfloat16; needed torch.float32",
        ),
        (
            lambda: native.adam_rows(PAIRS, [TABLE], hyper_of(1)[1:], torch.tensor([1]), False),
            ValueError,
            r"hyper: given shape \[5\]; needed \[6\]",
        ),
        (
            lambda: native.adam_rows(PAIRS, [TABLE], hyper_of(1), torch.tensor([1.0]), False),
            TypeError,
            "seed: given torch.float32; needed torch.int64",
        ),
        (
            lambda: native.feature_sums(PAIRS._replace(ends=torch.zeros(0).long()), [], []),
            ValueError,
            r"pairs.ends: given no element; needed d_sae \+ 1",
        ),
    ],
)
def test_native_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kernels", ["native", "portable", "triton"])
def test_codes_are_sorted_together_as_each_by_itself(kernels: str) -> None:
    """On a GPU all of them in one sort."""
    if kernels == "triton":
        pytest.importorskip("triton")
        from csae.kernels.triton import feature_sums as by
    else:
        by = {"native": native, "portable": portable}[kernels]  # type: ignore[assignment]
        if kernels == "native" and not cpu.available():
            pytest.skip(str(cpu.why_not()))
    generator, d_sae = torch.Generator().manual_seed(0), 9
    features = [torch.randint(0, d_sae + 1, (n, 3), generator=generator) for n in (5, 7, 1)]
    groups = [[0, 1], [0], [2], [1, 2, 0]]
    found = by.sort_codes(features, groups, d_sae)
    for codes, pairs in zip(groups, found, strict=True):
        flat = torch.cat([features[code].reshape(-1) for code in codes])
        tokens = torch.arange(sum(len(features[code]) for code in codes)).repeat_interleave(3)
        for got, want in zip(pairs, portable.sort_pairs(flat, tokens, d_sae), strict=True):
            assert torch.equal(got, want)
            assert got.is_contiguous()
    wide = [features[0], torch.randint(0, d_sae + 1, (4, 2), generator=generator)]  # of different k
    (both,) = by.sort_codes(wide, [[1, 0]], d_sae)
    flat = torch.cat([wide[1].reshape(-1), wide[0].reshape(-1)])
    tokens = torch.cat([torch.arange(4).repeat_interleave(2), torch.arange(4, 9).repeat_interleave(3)])
    for got, want in zip(both, portable.sort_pairs(flat, tokens, d_sae), strict=True):
        assert torch.equal(got, want)
    empty = by.sort_codes([torch.empty(0, 3, dtype=torch.int64)], [[0], [0]], d_sae)
    assert all(pairs.ends.tolist() == [0] * (d_sae + 1) for pairs in empty)
