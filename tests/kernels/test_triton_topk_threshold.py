"""The scheme of a sampled threshold against the reference, and which of its branches a row takes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, DTYPES, needs_triton, only_listed_variants

from csae import reference

pytestmark = needs_triton

D_SAE = 1024  # of which 256 are the sample


@pytest.fixture(autouse=True)
def _small_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_groups, topk_product, topk_select, topk_threshold

    modules = (topk_groups, topk_product, topk_select, topk_threshold)
    listed = SimpleNamespace(variants=lambda: [variant for module in modules for variant in module.variants()])
    only_listed_variants(listed, monkeypatch)  # type: ignore[arg-type]
    monkeypatch.setattr(topk_threshold, "SAMPLE", 4)
    monkeypatch.setattr(topk_threshold, "LEAST_SAMPLE", 256)


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled, in each call of topk_encode, with the flags of its rows."""
    from csae.kernels.triton import topk_threshold

    flags: list[int] = []
    search = topk_threshold.search

    def spy(*arguments: object, only: Tensor) -> None:
        flags[:] = only.tolist()
        # What lies behind the flags says "failed", and new memory holds NaN: a flag that is read from there redoes a
        # row, and the row is then wrong.
        only = torch.cat([only, torch.ones_like(only)])[: only.numel()]
        torch.use_deterministic_algorithms(True)
        try:
            search(*arguments, only=only)  # type: ignore[arg-type]
        finally:
            torch.use_deterministic_algorithms(False)

    monkeypatch.setattr(topk_threshold, "search", spy)
    return flags


def integers(*shape: int, low: int = -9, high: int = 10, seed: int = 0) -> Tensor:
    """A test in bfloat16 needs pre-activations up to 256 only, the largest before the first that it can't hold."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def small_integers(*shapes: tuple[int, ...]) -> list[Tensor]:
    """From -3 to 3, of which `integers` has another seed each."""
    return [integers(*shape, low=-3, high=4, seed=seed) for seed, shape in enumerate(shapes)]


def assert_equal_to_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> None:
    from csae.kernels.triton.topk_threshold import topk_encode

    want_values, want_indices = reference.topk_encode(x, W_enc, b_enc, k)
    exact = want_values.to(dtype).double()
    assert torch.equal(exact.nan_to_num(), want_values.nan_to_num()), f"{dtype} can't hold what is wanted"
    values, indices = topk_encode(*(tensor.to(DEVICE, dtype) for tensor in (x, W_enc, b_enc)), k)
    assert values.dtype == dtype
    torch.testing.assert_close(indices.cpu(), want_indices, rtol=0, atol=0)
    torch.testing.assert_close(values.double().cpu(), want_values, rtol=0, atol=0, equal_nan=True)


def features(*pre_acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_enc and b_enc of which each row has the given pre-activations."""
    return torch.eye(len(pre_acts), dtype=torch.float64), torch.stack(pre_acts, dim=1), torch.zeros(D_SAE).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(16, 1024, 3), (5, 1101, 30)], ids=["whole groups", "odd sizes"])
def test_rows_that_are_proved(d_in: int, d_sae: int, k: int, dtype: torch.dtype, failed: list[int]) -> None:
    x, W_enc, b_enc = small_integers((3, d_in), (d_sae, d_in), (d_sae,))
    assert_equal_to_reference(x, W_enc, b_enc, k, dtype)
    assert failed == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_by_tensor_descriptors(dtype: torch.dtype, failed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_product

    if DEVICE == "cuda" and not topk_product._has_tma(torch.device("cuda")):
        pytest.skip("no tensor memory accelerator")
    monkeypatch.setattr(topk_product, "_has_tma", lambda device: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert_equal_to_reference(*small_integers((2, 24), (1056, 24), (1056,)), 5, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    assert failed == [0, 0]


def test_a_sample_that_misleads_and_a_buffer_that_overflows(failed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_threshold

    monkeypatch.setattr(topk_threshold, "CAPACITY", 80)
    fair = integers(D_SAE, low=-1000, high=1000)
    too_few, too_many = fair.clone(), fair.clone()
    too_few[:256] += 3000  # the sample has all of the largest, and is searched for fewer than k
    too_many[256:] += 3000
    k = 20
    assert k > k // 8 + 12
    assert_equal_to_reference(*features(too_few, fair, too_many, too_few), k, torch.float32)
    assert failed == [1, 0, 1, 1]


def test_more_found_than_a_block(failed: list[int]) -> None:
    # All features after the sample are above the threshold, and they fit.
    b_enc = torch.arange(4096, dtype=torch.float64)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]
    b_enc[1024:] += 5000
    zeros = torch.zeros(4096, 1, dtype=torch.float64)
    assert_equal_to_reference(zeros[:1], zeros, b_enc, 5, torch.float32)
    assert failed == [0]


def test_equal_pre_activations(failed: list[int]) -> None:
    nothing = torch.zeros(D_SAE, dtype=torch.float64)
    ends = nothing.clone()  # more than k equal ones at the edge, in the sample and after it
    ends[[3, 40, 41, 255, 256, 300, 301, 302, 700, 1000, 1001, 1023]] = 5.0
    ends[[500, 900]] = 6.0
    after = nothing.clone()  # more than k equal ones after the sample, and larger ones in it
    after[[5, 6]] = 9.0
    after[400:410] = 8.0
    assert_equal_to_reference(*features(nothing, ends, after), 6, torch.float32)
    assert failed == [0, 0, 0]
    assert_equal_to_reference(*features(nothing, ends, after), 13, torch.float32)
    assert failed == [0, 0, 0]
    assert_equal_to_reference(*features(nothing, ends, after), 24, torch.float32)
    assert failed[0] == 1


@pytest.mark.parametrize(
    ("rest", "number", "where"),
    [
        pytest.param(-7.0, math.inf, [5, 600, 601, 602, 603], id="more than k infinities"),
        pytest.param(-math.inf, -1.0, [700], id="nearly all minus infinity"),
        pytest.param(1.0, math.nan, [900], id="a late nan"),
        pytest.param(1.0, math.nan, list(range(20)), id="a sample of nan"),
    ],
)
def test_infinities_and_nan(rest: float, number: float, where: list[int]) -> None:
    b_enc = torch.full((D_SAE,), rest, dtype=torch.float64)
    b_enc[where] = number
    zeros = torch.zeros(D_SAE, 1, dtype=torch.float64)
    assert_equal_to_reference(zeros[:1], zeros, b_enc, 4, torch.float32)


@pytest.mark.parametrize(("n", "d_sae", "k"), [(0, 1024, 3), (2, 1023, 3), (2, 1024, 129)])
def test_where_a_sample_would_say_little(n: int, d_sae: int, k: int, failed: list[int]) -> None:
    assert_equal_to_reference(integers(n, 4), integers(d_sae, 4, seed=1), integers(d_sae, seed=2), k, torch.float32)
    assert failed == []


@pytest.mark.slow
def test_chunks_of_rows(failed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_encode

    monkeypatch.setattr(topk_encode, "WORKSPACE_BYTES", 2**20)
    x, W_enc = integers(130, 8), integers(D_SAE, 8, seed=1)
    assert_equal_to_reference(x, W_enc, integers(D_SAE, seed=2), 2, torch.float32)
    assert failed == [0] * 130
