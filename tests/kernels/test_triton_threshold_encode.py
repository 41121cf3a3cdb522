"""The Triton threshold_encode against the reference, and which of its branches a row takes."""

from __future__ import annotations

import math
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
def test_near_and_batch(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import threshold_encode, topk_threshold
    from csae.kernels.triton.threshold_encode import batch_topk_encode, near_threshold

    for module in (threshold_encode, topk_threshold):
        monkeypatch.setattr(module, "CAPACITY", capacity)
    x, W_enc, b_enc = integers(5, 6), integers(90, 6, seed=1), integers(90, seed=2)
    threshold = integers(90, low=0, high=12, seed=5)
    given = [tensor.to(DEVICE, torch.float32) for tensor in (x, W_enc, b_enc)]
    found = near_threshold(*given, threshold.to(DEVICE, torch.float32), 5.0, 20)
    want = reference.near_threshold(x, W_enc, b_enc, threshold, 5.0, 20)
    torch.testing.assert_close(found[0].double().cpu(), want[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1].cpu(), want[1], rtol=0, atol=0)
    mask = torch.tensor([True, True, False, True, True])
    for guess in (None, torch.tensor(3.0), torch.tensor(100.0)):
        at = None if guess is None else guess.to(DEVICE)
        got = batch_topk_encode(*given, 4, 12, mask.to(DEVICE), at)
        wanted = reference.batch_topk_encode(x, W_enc, b_enc, 4, 12, mask)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one.double().cpu(), other.double(), rtol=0, atol=0)
