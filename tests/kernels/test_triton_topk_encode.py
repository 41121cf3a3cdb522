"""The Triton topk_encode against the reference in float64.

Most cases have small integers for inputs: then products and sums are exact in every dtype and precision, ties are
many, and the result must be equal, not close.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, DTYPES, INTERPRETED, eps, needs_triton, only_listed_variants, random_normal

from csae import reference

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_groups, topk_product, topk_select

    both = SimpleNamespace(
        variants=lambda: [*topk_groups.variants(), *topk_product.variants(), *topk_select.variants()]
    )
    only_listed_variants(both, monkeypatch)  # type: ignore[arg-type]


def integers(*shape: int, low: int = -3, high: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def assert_equal_to_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> None:
    from csae.kernels.triton.topk_encode import topk_encode

    want_values, want_indices = reference.topk_encode(x, W_enc, b_enc, k)
    values, indices = topk_encode(*(tensor.to(DEVICE, dtype) for tensor in (x, W_enc, b_enc)), k)
    assert values.dtype == dtype
    assert indices.dtype == torch.int64
    torch.testing.assert_close(indices.cpu(), want_indices, rtol=0, atol=0)
    torch.testing.assert_close(values.double().cpu(), want_values, rtol=0, atol=0, equal_nan=True)


SHAPES = [  # n, d_in, d_sae, k
    pytest.param(0, 8, 16, 4, id="no rows"),
    pytest.param(1, 1, 1, 1, id="ones"),
    pytest.param(3, 17, 65, 65, id="k is d_sae"),
    pytest.param(5, 129, 17, 3, id="more inputs than features"),
    pytest.param(2, 65, 1100, 3, id="by groups"),
    pytest.param(2, 24, 3000, 40, id="by groups, several blocks of candidates"),
    pytest.param(2, 16, 2049, 40, id="directly, several blocks of keys"),
    pytest.param(2, 3, 256, 4, id="as many groups as twice k"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_equals_reference(n: int, d_in: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    assert_equal_to_reference(integers(n, d_in), integers(d_sae, d_in, seed=1), integers(d_sae, seed=2), k, dtype)


@pytest.mark.slow
def test_more_rows_than_a_block() -> None:
    assert_equal_to_reference(integers(130, 8), integers(129, 8, seed=1), integers(129, seed=2), 2, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_equal_pre_activations_gives_the_lowest_indices(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    assert_equal_to_reference(zeros, integers(500, 5), torch.full((500,), 2.0, dtype=torch.float64), 7, dtype)


@pytest.mark.parametrize("k", [3, 40])
def test_rows_without_a_positive_pre_activation_give_zeros_in_order(k: int) -> None:
    x = torch.zeros(2, 5, dtype=torch.float64)
    assert_equal_to_reference(x, integers(300, 5), integers(300, low=-9, high=0), k, torch.float32)


@pytest.mark.parametrize("d_sae", [11, 500])
def test_infinities_and_signed_zeros_and_nan(d_sae: int) -> None:
    # Pre-activations x * w: with x = 1 all kinds of numbers, with x = 0 a NaN from 0 * inf, and so on.
    x = torch.tensor([[1.0], [0.0], [-1.0], [math.nan], [math.inf], [2.0]], dtype=torch.float64)
    W_enc = integers(d_sae, 1)
    W_enc[:7, 0] = torch.tensor([-0.0, 0.0, math.inf, -1.0, -math.inf, -0.0, math.inf], dtype=torch.float64)
    b_enc = torch.full((d_sae,), -0.0, dtype=torch.float64)
    for k in (4, 11):
        assert_equal_to_reference(x, W_enc, b_enc, k, torch.float32)
    assert_equal_to_reference(x[[0, 2, 5]], W_enc, b_enc, 1, torch.float16)


def test_a_last_group_that_is_not_full_ends_with_its_row() -> None:
    # The largest of row 0 is in the last feature; after it in memory come the keys of row 1, which are larger.
    W_enc = torch.full((1100, 2), -1.0, dtype=torch.float64)
    W_enc[1099], W_enc[:40] = torch.tensor([5.0, 0.0]), torch.tensor([0.0, 9.0])
    x = torch.eye(2, dtype=torch.float64)
    assert_equal_to_reference(x, W_enc, torch.zeros(1100, dtype=torch.float64), 4, torch.float32)


def test_keys_have_the_order_of_their_floats() -> None:
    from triton_keys import keys_of

    from csae.kernels.triton.topk_keys import NAN_KEY

    tiny, huge, inf = 1e-45, 3.4e38, math.inf
    rising = [-inf, -huge, -1.0, -tiny, 0.0, tiny, 1.0, huge, inf, math.nan]
    numbers = torch.tensor([*rising, -0.0, -math.nan, 1.0, 1.0, 1.0, 1.0])
    keys = torch.empty(16, dtype=torch.int32, device=DEVICE)
    keys_of[(1,)](numbers.to(DEVICE), keys, 16)
    ordered = keys[:10].tolist()
    assert ordered == sorted(set(ordered))
    assert keys[10] == keys[4] == 0
    assert keys[9] == keys[11] == NAN_KEY
    assert keys[0] > -(2**31)


def test_one_nan_spoils_its_row_only() -> None:
    x = integers(4, 6)
    x[2, 3] = math.nan
    assert_equal_to_reference(x, integers(700, 6, seed=1), integers(700, seed=2), 5, torch.float32)


@pytest.fixture
def _narrow_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_encode

    monkeypatch.setattr(topk_encode, "LEAST_WIDTH", 256)
    monkeypatch.setattr(topk_encode, "WORKSPACE_BYTES", 3500)


@pytest.mark.usefixtures("_narrow_ranges")
@pytest.mark.parametrize(
    ("n", "d_sae", "k", "rows", "width"),
    [
        pytest.param(3, 1024, 3, 2, 256, id="full ranges"),
        pytest.param(2, 700, 4, 2, 256, id="a last range that is not full"),
        pytest.param(2, 1100, 5, 1, 512, id="a width that follows from k"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_of_features_give_the_same(
    n: int, d_sae: int, k: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    from csae.kernels.triton import topk_encode

    assert topk_encode._workspace(n, d_sae, k) == (rows, width)
    assert_equal_to_reference(integers(n, 5), integers(d_sae, 5, seed=1), integers(d_sae, seed=2), k, dtype)


@pytest.mark.usefixtures("_narrow_ranges")
def test_ranges_where_more_groups_than_k_are_above_the_bound() -> None:
    # Rising pre-activations: each range beats all that is before it, in every group. The second row falls.
    W_enc = torch.arange(1024, dtype=torch.float64)[:, None] - 500
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert_equal_to_reference(x, W_enc, torch.zeros(1024, dtype=torch.float64), 3, torch.float32)


@pytest.mark.usefixtures("_narrow_ranges")
@pytest.mark.parametrize("k", [1, 4])
def test_ranges_with_equal_pre_activations(k: int) -> None:
    W_enc = torch.full((1024, 4), -7.0, dtype=torch.float64)
    W_enc[:, 0] = 2.0
    W_enc[[1, 300, 600, 601, 1000], 1] = 1.0
    W_enc[[20, 1000], 2] = 3.0
    W_enc[700, 3] = 0.0
    x = torch.eye(4, dtype=torch.float64)
    assert_equal_to_reference(x, W_enc, torch.zeros(1024, dtype=torch.float64), k, torch.float32)


@pytest.mark.usefixtures("_narrow_ranges")
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_groups_the_lower_ones_stay(dtype: torch.dtype) -> None:
    """Groups of later ranges push out some of those that are equal, one range after the other."""
    pre_acts = torch.full((1024,), 5.0, dtype=torch.float64)
    pre_acts[[300, 400]] = 7.0  # of the second range's groups, two
    pre_acts[[600, 1000]] = 6.0
    fallen = pre_acts.clone()
    fallen[0] = fallen[33] = -1.0
    none_twice = torch.arange(1024, dtype=torch.float64) % 61
    W_enc = torch.stack([pre_acts, fallen, none_twice], dim=1)
    for k in (3, 4, 7):
        zeros = torch.zeros(1024, dtype=torch.float64)
        assert_equal_to_reference(torch.eye(3, dtype=torch.float64), W_enc, zeros, k, dtype)


@pytest.mark.usefixtures("_narrow_ranges")
def test_more_than_one_program_sorts() -> None:
    assert_equal_to_reference(integers(2, 5), integers(9000, 5, seed=1), integers(9000, seed=2), 131, torch.float32)


@pytest.mark.usefixtures("_narrow_ranges")
@pytest.mark.parametrize(
    ("rest", "number", "where"),
    [
        pytest.param(-7.0, math.inf, [5, 6, 7, 8, 400], id="more than k infinities"),
        pytest.param(-math.inf, -1.0, [700], id="nearly all minus infinity"),
        pytest.param(math.inf, math.nan, [900], id="a late nan after k infinities"),
        pytest.param(1.0, math.nan, [10, 11, 12, 13, 14], id="more than k nan at once"),
    ],
)
def test_ranges_with_infinities_and_nan(rest: float, number: float, where: list[int]) -> None:
    b_enc = torch.full((1024,), rest, dtype=torch.float64)
    b_enc[where] = number
    zeros = torch.zeros(1024, 1, dtype=torch.float64)
    assert_equal_to_reference(zeros[:1], zeros, b_enc, 4, torch.float32)


def test_the_workspace_is_bounded() -> None:
    from csae.kernels.triton import topk_encode

    for d_sae in (1, 100, 32768, 131072, 2**24, 2**27):
        for n in (1, 1000, 8192, 10**7):
            for k in {1, min(64, d_sae), d_sae}:
                rows, width = topk_encode._workspace(n, d_sae, k)
                assert 1 <= rows <= n
                assert width % 32 == 0
                assert width % 256 == 0 or width >= d_sae
                assert k <= width
                groups = width // 32
                listed = min(k, groups)
                # pre-activations, maxima, bounds; listed groups with 4 integers; with several ranges, their copies
                used = 4 * (width + groups + 1 + 4 * listed) + (128 * listed if width < d_sae else 0)
                assert rows == 1 or rows * used <= topk_encode.WORKSPACE_BYTES
                if rows < n:
                    assert rows % 128 == 0 or rows < 128


def test_ranges_fill_waves() -> None:
    """At the three shapes that are measured, on 132 multiprocessors: all rows at once, and hardly a wave more."""
    from csae.kernels.triton import topk_encode

    for d_sae, k in ((32768, 32), (65536, 64), (131072, 64)):
        rows, width = topk_encode._workspace(8192, d_sae, k)
        assert rows == 8192
        waves = sum(-(-64 * -(-min(width, d_sae - start) // 256) // 132) for start in range(0, d_sae, width))
        assert waves <= -(-64 * d_sae // 256 // 132) + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "hopper"), [(2, 24, 320, True), (3, 72, 96, True), (3, 72, 800, False), (1, 8, 32, True)]
)
def test_products_by_tensor_descriptors(
    n: int, d_in: int, d_sae: int, hopper: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csae.kernels.triton import topk_encode, topk_product

    if DEVICE == "cuda" and not topk_product._has_tma(torch.device("cuda")):
        pytest.skip("no tensor memory accelerator")
    monkeypatch.setattr(topk_product, "_has_tma", lambda device: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(topk_product, "_is_hopper", lambda device: hopper)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        x, W_enc = random_normal(n, d_in, dtype=dtype), random_normal(d_sae, d_in, dtype=dtype)
        product = topk_product.best_product(x, d_sae)
        assert product.kernel is topk_product._pre_acts_tma
        assert topk_product.best_product(x[:, 1:], d_sae).kernel is topk_product._pre_acts
        assert topk_product.best_product(x, d_sae + 1).kernel is topk_product._pre_acts
        # A single row may have any stride.
        single = x[:1].as_strided((1, d_in), (1, 1))
        assert single.stride(0) == 1
        topk_encode.topk_encode(single, W_enc, W_enc[:, 0], 1)
        # Small integers are exact in TF32 too.
        x, W_enc = integers(n, d_in), integers(d_sae, d_in, seed=1)
        assert_equal_to_reference(x, W_enc, integers(d_sae, seed=2), 3, dtype)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_product_of_choice() -> None:
    from csae.kernels.triton import topk_encode, topk_product

    x, W_enc, b_enc = random_normal(2, 8), random_normal(40, 8, seed=1), random_normal(40, seed=2)
    product = topk_product.product_variant(torch.float32, "ieee", 1)
    values, indices = topk_encode.topk_encode(x, W_enc, b_enc, 3, product=product)
    want_values, want_indices = reference.topk_encode(x, W_enc, b_enc, 3)
    torch.testing.assert_close(indices, want_indices, rtol=0, atol=0)
    torch.testing.assert_close(values, want_values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_unaligned_inputs(dtype: torch.dtype) -> None:
    x, W_enc, b_enc = integers(33, 5).T[:, 1:], integers(65, 70)[:, 3:67:2], integers(130)[::2]
    assert_equal_to_reference(x, W_enc, b_enc, 4, dtype)


def test_dtypes_that_no_kernel_was_compiled_for() -> None:
    from csae.kernels.triton.topk_encode import topk_encode

    x, W_enc, b_enc = (integers(*shape).to(DEVICE) for shape in ((2, 3), (5, 3), (5,)))
    with pytest.raises(TypeError, match=r"x_ptr: given torch.float64; needed float32, bfloat16 or float16"):
        topk_encode(x, W_enc, b_enc, 1)
    with pytest.raises(TypeError, match=r"W_ptr: given torch.float64; needed torch.float32"):
        topk_encode(x.float(), W_enc, b_enc, 1)


def test_float32_is_multiplied_as_torch_is_told_to() -> None:
    from csae.kernels.triton.variant import dot_precision

    before = torch.get_float32_matmul_precision()
    assert dot_precision(torch.float32) == "ieee"
    try:
        for precision, want in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(precision)
            assert dot_precision(torch.float32) == want
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers_to_rounding(dtype: torch.dtype, precision: str) -> None:
    from csae.kernels.triton.topk_encode import topk_encode

    n, d_in, d_sae, k = 9, 67, 300, 8
    x, W_enc = random_normal(n, d_in, dtype=dtype), random_normal(d_sae, d_in, dtype=dtype, seed=1)
    b_enc = random_normal(d_sae, dtype=dtype, seed=2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        values, indices = topk_encode(x, W_enc, b_enc, k)
    finally:
        torch.set_float32_matmul_precision(before)
    pre_acts = x.double() @ W_enc.double().T + b_enc.double()
    # Products of TF32 have 10 bits; the interpreter has no TF32. Sums are float32.
    product = 2**-10 if dtype == torch.float32 and precision == "high" and not INTERPRETED else 0.0
    magnitude = x.double().abs() @ W_enc.double().abs().T + b_enc.double().abs()
    close = (product + d_in * eps(torch.float32)) * magnitude.amax(dim=1, keepdim=True)
    chosen = pre_acts.gather(1, indices)
    assert ((values.double() - chosen.relu()).abs() <= close + eps(dtype) * chosen.abs()).all()
    # What was chosen is the top k but for differences that rounding hides.
    assert ((chosen - pre_acts.topk(k, dim=1).values).abs() <= 2 * close).all()
    assert all(len(set(row)) == k for row in indices.tolist())


def kept_and_again(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, a: Tensor, W_a: Tensor, k: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from csae.kernels.triton.topk_encode import encode_again, encode_and_keep

    *first, kept = encode_and_keep(*(tensor.to(DEVICE, dtype) for tensor in (x, W_enc, b_enc)), k)
    assert kept.shape == (x.shape[0], W_enc.shape[0])
    return tuple(first), encode_again(kept, a.to(DEVICE, dtype), W_a.to(DEVICE, dtype), k)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "r", "k"),
    [
        pytest.param(0, 4, 40, 3, 2, id="no rows"),
        pytest.param(3, 5, 77, 3, 4, id="odd sizes"),
        pytest.param(2, 8, 1024, 8, 3, id="ranges of features"),
        pytest.param(6, 8, 257, 3, 2, id="chunks of rows and odd ranges"),
        pytest.param(2, 3, 40, 0, 2, id="nothing to subtract"),
    ],
)
def test_encode_again_equals_the_encoder_of_the_difference(
    n: int, d_in: int, d_sae: int, r: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csae.kernels.triton import topk_encode

    monkeypatch.setattr(topk_encode, "LEAST_WIDTH", 256)
    monkeypatch.setattr(topk_encode, "WORKSPACE_BYTES", 600)
    x, W_enc, b_enc = integers(n, d_in), integers(d_sae, d_in, seed=1), integers(d_sae, seed=2)
    a, W_a = integers(n, r, seed=3), integers(d_sae, r, seed=4)
    if n == 6:
        assert topk_encode._rows_of_kept(n, d_sae, k) == 4
        assert topk_encode._width_of_kept(d_sae, k) == 256
    first, again = kept_and_again(x, W_enc, b_enc, a, W_a, k, dtype)
    joined = torch.cat([x, -a], dim=1), torch.cat([W_enc, W_a], dim=1), b_enc, k
    for got, want in ((first, reference.topk_encode(x, W_enc, b_enc, k)), (again, reference.topk_encode(*joined))):
        assert got[0].dtype == dtype
        torch.testing.assert_close(got[1].cpu(), want[1], rtol=0, atol=0)
        torch.testing.assert_close(got[0].double().cpu(), want[0], rtol=0, atol=0)


def test_encode_again_keeps_a_nan_and_finds_a_new_one() -> None:
    x, W_enc, b_enc = integers(3, 4), integers(70, 4, seed=1), integers(70, seed=2)
    a, W_a = integers(3, 2, seed=3), integers(70, 2, seed=4)
    x[0, 1] = a[2, 0] = math.nan
    first, again = kept_and_again(x, W_enc, b_enc, a, W_a, 3, torch.float32)
    assert first[0].isnan().all(dim=1).tolist() == [True, False, False]
    assert again[0].isnan().all(dim=1).tolist() == [True, False, True]
    assert again[1][[0, 2]].tolist() == [[0, 1, 2]] * 2


def test_encode_again_rounds_about_as_encoding_the_difference_does() -> None:
    n, d_in, d_sae, r, k = 4, 192, 512, 48, 8
    x, W_enc, b_enc = random_normal(n, d_in), random_normal(d_sae, d_in, seed=1), random_normal(d_sae, seed=2)
    a, W_O = random_normal(n, r, seed=3), random_normal(d_in, r, seed=4) / r**0.5
    W_a = (W_enc.double() @ W_O.double()).float()
    _, (values, indices) = kept_and_again(x, W_enc, b_enc, a, W_a, k, torch.float32)
    exact = (x.double() - a.double() @ W_O.double().T) @ W_enc.double().T + b_enc.double()
    magnitude = (x.double().abs() + a.double().abs() @ W_O.double().abs().T) @ W_enc.double().abs().T
    close = (d_in + r) * eps(torch.float32) * magnitude.amax()
    assert (values - exact.gather(1, indices)).abs().max() <= close
    assert (exact.gather(1, indices) - exact.topk(k, dim=1).values).abs().max() <= 2 * close
