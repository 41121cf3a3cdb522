"""The Triton threshold_encode against the reference, and which of its branches a row takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, DTYPES, needs_triton, only_listed_variants

from csae import reference

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import threshold_encode, topk_groups, topk_product, topk_select, topk_threshold

    modules = (topk_groups, topk_product, topk_select, topk_threshold, threshold_encode)
    listed = SimpleNamespace(variants=lambda: [variant for module in modules for variant in module.variants()])
    only_listed_variants(listed, monkeypatch)  # type: ignore[arg-type]


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled, in each call, with the flags of its rows."""
    from csae.kernels.triton import threshold_encode

    flags: list[int] = []
    order = threshold_encode._append_and_order

    def spy(*arguments: Any) -> None:
        order(*arguments)
        flags[:] = arguments[4].tolist()

    monkeypatch.setattr(threshold_encode, "_append_and_order", spy)
    return flags


def integers(*shape: int, low: int = -3, high: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def assert_equal_to_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k_max: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from csae.kernels.triton.threshold_encode import threshold_encode

    want_values, want_indices = reference.threshold_encode(x, W_enc, b_enc, threshold, k_max)
    given = (tensor.to(DEVICE, dtype) for tensor in (x, W_enc, b_enc))
    values, indices = threshold_encode(*given, threshold.to(DEVICE, torch.float32), k_max)
    assert values.dtype == dtype
    assert indices.dtype == torch.int64
    torch.testing.assert_close(values.double().cpu(), want_values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(indices.cpu(), want_indices, rtol=0, atol=0)
    return values, indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["scalar", "a feature"])
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k_max"),
    [
        pytest.param(0, 4, 40, 3, id="no rows"),
        pytest.param(1, 1, 1, 1, id="ones"),
        pytest.param(3, 8, 256, 12, id="whole groups, more than k_max"),
        pytest.param(3, 5, 301, 301, id="odd sizes, room for all"),
    ],
)
def test_equals_reference(n: int, d_in: int, d_sae: int, k_max: int, kind: str, dtype: torch.dtype) -> None:
    threshold = torch.tensor(4.0) if kind == "scalar" else integers(d_sae, low=-9, high=20, seed=5)
    x, W_enc, b_enc = integers(n, d_in), integers(d_sae, d_in, seed=1), integers(d_sae, seed=2)
    assert_equal_to_reference(x, W_enc, b_enc, threshold.double(), k_max, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_by_tensor_descriptors(dtype: torch.dtype, failed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import topk_product

    if DEVICE == "cuda" and not topk_product._has_tma(torch.device("cuda")):
        pytest.skip("no tensor memory accelerator")
    monkeypatch.setattr(topk_product, "_has_tma", lambda device: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        x, W_enc, b_enc = integers(2, 24), integers(320, 24, seed=1), integers(320, seed=2)
        threshold = integers(320, low=0, high=30, seed=5)
        assert_equal_to_reference(x, W_enc, b_enc, threshold, 7, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    assert failed == [0, 0]


@pytest.mark.parametrize("kind", ["scalar", "a feature"])
def test_a_buffer_that_overflows(kind: str, failed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those rows go through the fallback, and the thresholds are kept there too; the others stay as they are."""
    from csae.kernels.triton import threshold_encode, topk_encode, topk_threshold

    for module in (threshold_encode, topk_threshold):
        monkeypatch.setattr(module, "CAPACITY", 40)
    monkeypatch.setattr(topk_encode, "LEAST_WIDTH", 256)
    monkeypatch.setattr(topk_encode, "WORKSPACE_BYTES", 250_000)
    W_enc = integers(640, 3, low=-9, high=30, seed=1)
    W_enc[60:, 1] = -1.0
    threshold = torch.tensor(1.0) if kind == "scalar" else integers(640, low=-3, high=25, seed=5)
    x = torch.eye(3, dtype=torch.float64)
    assert_equal_to_reference(x, W_enc, torch.zeros(640).double(), threshold.double(), 9, torch.float32)
    assert failed == [1, 0, 1]


def test_what_is_not_finite() -> None:
    from csae.kernels.triton.threshold_encode import threshold_encode

    inf, nan = math.inf, math.nan
    pre_acts = torch.full((6, 70), -1.0, dtype=torch.float64)
    pre_acts[0, [3, 40]] = inf
    pre_acts[1] = -inf
    pre_acts[2, 69] = nan
    pre_acts[3, 5] = 2.0
    pre_acts[4, [0, 1, 2]] = torch.tensor([0.0, -0.0, 1e-30], dtype=torch.float64)
    for threshold in (-inf, -5.0, 0.0, 1.0, inf, nan):
        for row in pre_acts:
            x, W_enc, b_enc = torch.zeros(1, 1), torch.zeros(70, 1), row.float()
            given = torch.tensor(threshold)
            want = reference.threshold_encode(x.double(), W_enc.double(), b_enc.double(), given.double(), 3)
            found = threshold_encode(*(tensor.to(DEVICE) for tensor in (x, W_enc, b_enc, given)), 3)
            torch.testing.assert_close(found[0].double().cpu(), want[0], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(found[1].cpu(), want[1], rtol=0, atol=0)


@pytest.mark.parametrize("capacity", [1024, 2], ids=["it fits", "it overflows"])
def test_near(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import threshold_encode, topk_threshold
    from csae.kernels.triton.threshold_encode import near_threshold

    for module in (threshold_encode, topk_threshold):
        monkeypatch.setattr(module, "CAPACITY", capacity)
    x, W_enc, b_enc = integers(5, 6), integers(90, 6, seed=1), integers(90, seed=2)
    threshold = integers(90, low=0, high=12, seed=5)
    given = [tensor.to(DEVICE, torch.float32) for tensor in (x, W_enc, b_enc)]
    found = near_threshold(*given, threshold.to(DEVICE, torch.float32), 5.0, 20)
    want = reference.near_threshold(x, W_enc, b_enc, threshold, 5.0, 20)
    torch.testing.assert_close(found[0].double().cpu(), want[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1].cpu(), want[1], rtol=0, atol=0)


def assert_equal(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("guess", "special", "masked", "k", "k_max", "capacity"),
    [
        pytest.param(None, 0.0, [], 4, 12, 1024, id="no guess"),
        pytest.param(3.0, math.nan, [2], 4, 12, 1024, id="a good guess, a row of NaN, a mask"),
        pytest.param(3.0, math.nan, [1], 4, 12, 2, id="a row of NaN out of the mask, more than fits"),
        pytest.param(100.0, math.inf, [], 4, 4, 1024, id="a guess that is too high, infinities"),
        pytest.param(math.nan, 0.0, [0, 1, 2], 4, 12, 1024, id="a guess of NaN, and no row counts"),
    ],
)
def test_batch(
    guess: float | None,
    special: float,
    masked: list[int],
    k: int,
    k_max: int,
    capacity: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from csae.kernels.triton import threshold_encode, topk_threshold

    for module in (threshold_encode, topk_threshold):
        monkeypatch.setattr(module, "CAPACITY", capacity)
    x, W_enc, b_enc = integers(3, 6), integers(90, 6, seed=1), integers(90, seed=2)
    W_enc[:, 0] = W_enc[:, 0].sign() + (W_enc[:, 0] == 0)  # no zeros, which would make a NaN of an infinity
    x[1, 0] = special
    mask = torch.ones(3, dtype=torch.bool)
    mask[masked] = False
    given = [tensor.to(DEVICE, torch.float32) for tensor in (x, W_enc, b_enc)]
    how = k, k_max, mask.to(DEVICE) if masked else None, None if guess is None else torch.tensor(guess, device=DEVICE)
    wanted = reference.batch_topk_encode(x, W_enc, b_enc, k, k_max, mask)
    assert_equal(threshold_encode.batch_topk_encode(*given, *how), wanted)
    *found, kept = threshold_encode.batch_encode_and_keep(*given, *how)
    assert_equal(found, wanted)
    a, W_a = integers(3, 2, seed=3), integers(90, 2, seed=4)
    wanted = reference.batch_topk_encode(torch.cat([x, a], 1), torch.cat([W_enc, -W_a], 1), b_enc, k, k_max, mask)
    found = threshold_encode.batch_encode_again(kept, *(of.to(DEVICE, torch.float32) for of in (a, W_a)), *how)
    assert_equal(found, wanted)


def test_rows_are_searched_again_only_where_the_batch_has_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import threshold_encode

    searched = []
    search = threshold_encode.by_ranges.search

    def spy(*given: Any, only: Tensor | None = None) -> None:
        searched.append(None if only is None else only.tolist())
        search(*given, only=only)

    monkeypatch.setattr(threshold_encode.by_ranges, "search", spy)
    x, W_enc, b_enc = integers(3, 6), integers(90, 6, seed=1), integers(90, seed=2)
    given = [tensor.to(DEVICE, torch.float32) for tensor in (x, W_enc, b_enc)]
    *_, threshold = threshold_encode.batch_topk_encode(*given, 4, 12, None, None)
    for guess in (threshold, threshold / threshold_encode.portable.LOWERED + 1):
        threshold_encode.batch_topk_encode(*given, 4, 12, None, guess)
    assert searched == [None, [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_without_a_gradient(dtype: torch.dtype, per_feature: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`threshold_encode_wide` has the reference's values, not rounded; there is no table, and none is needed."""
    from csae.ops import backend
    from csae.ops.threshold_encode import threshold_encode_wide, threshold_encoder, threshold_table

    monkeypatch.setattr(backend, "place", lambda op, *_: "triton" if op in backend.ON_TRITON else "portable")
    x, W_enc, b_enc = integers(2, 3, 6), integers(90, 6, seed=1), integers(90, seed=2)
    x[1, 2, 0] = math.nan
    x[0] += 1 / 8
    threshold = integers(90, low=0, high=12, seed=3) if per_feature else torch.tensor(4.0).double()
    x, W_enc, b_enc, above = (of.to(DEVICE) for of in (x, W_enc, b_enc, threshold))
    wanted = reference.threshold_encode(x, W_enc, b_enc, above, 7)
    given = *(of.to(dtype).requires_grad_() for of in (x, W_enc, b_enc)), above.float(), 7
    found = threshold_encode_wide(*given)
    assert found[0].dtype == torch.float32
    assert not found[0].requires_grad
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], wanted[1])
    assert threshold_table(*given[1:]) == []
    encode = threshold_encoder(*given[1:])
    for _ in range(3):  # where a table is a gain, the third has it
        values, indices = encode(given[0])
        torch.testing.assert_close(values.double(), wanted[0].to(dtype).double(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices, wanted[1])
