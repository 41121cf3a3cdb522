"""The Triton gather_sum, gather_dot, feature_sum against the reference and its gradients in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, DTYPES, eps, needs_triton, only_listed_variants, random_normal

from csae import reference

pytestmark = needs_triton

SHAPES = [  # n, k, d_sae, d
    (1, 1, 1, 1),
    (3, 17, 65, 129),
    (5, 3, 17, 24),
    (2, 9, 9, 257),
    (2, 1, 3, 512),
    (0, 3, 5, 8),
]


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import feature_sums, sparse_decode

    # Those of feature_sums: feature_sum is made of it. And those that a GPU may be tuned to.
    listed = sparse_decode.variants()
    listed += [other for variant in listed for other in sparse_decode.candidates(variant)] + feature_sums.variants()
    only_listed_variants(SimpleNamespace(variants=lambda: listed), monkeypatch)


def code(n: int, k: int, d_sae: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, d_sae, (n, k), generator=generator).to(DEVICE)
    return random_normal(n, k, dtype=dtype), indices


def assert_sum_close(got: Tensor, want: Tensor, magnitude: Tensor, terms: int) -> None:
    """Within one rounding of the result, and one of float32 a term on the sum of the terms' magnitudes."""
    assert got.shape == want.shape
    tolerance = eps(got.dtype) * want.abs() + (terms + 2) * eps(torch.float32) * magnitude
    assert ((got.double() - want).abs() <= tolerance).all()


def feature_sums(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """What feature_sum must give, in float64, and the sums of the terms' magnitudes."""
    terms = (values.double()[..., None] * rows.double()[:, None]).flatten(0, 1)
    zeros = terms.new_zeros(d_sae, rows.shape[1])
    return zeros.index_add(0, indices.flatten(), terms), zeros.index_add(0, indices.flatten(), terms.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d_sae", "d"), SHAPES)
def test_forward_and_gradients_equal_the_reference(n: int, k: int, d_sae: int, d: int, dtype: torch.dtype) -> None:
    from csae.kernels.triton.sparse_decode import feature_sum, gather_dot, gather_sum

    values, indices = code(n, k, d_sae, dtype)
    table, grad = random_normal(d_sae, d, dtype=dtype, seed=1), random_normal(n, d, dtype=dtype, seed=2)
    wide_values, wide_table = values.double().requires_grad_(), table.double().requires_grad_()
    want = reference.sparse_decode(wide_values, indices, wide_table)
    want_dvalues, want_dtable = torch.autograd.grad(want, [wide_values, wide_table], grad.double())
    # The same with all numbers positive: how large the terms were that were added.
    magnitude_values, magnitude_table = values.double().abs().requires_grad_(), table.double().abs().requires_grad_()
    magnitude = reference.sparse_decode(magnitude_values, indices, magnitude_table)
    of_gradients = torch.autograd.grad(magnitude, [magnitude_values, magnitude_table], grad.double().abs())

    out, dvalues = gather_sum(values, indices, table), gather_dot(grad, values, indices, table)
    dtable = feature_sum(values, indices, grad, d_sae)
    assert out.dtype == dvalues.dtype == dtable.dtype == dtype
    assert_sum_close(out, want.detach(), magnitude.detach(), k)
    assert_sum_close(dvalues, want_dvalues, of_gradients[0], d)
    assert_sum_close(dtable, want_dtable, of_gradients[1], n * k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(6, 20, 40), (3, 150, 8)])
def test_a_row_ends_at_its_length(n: int, k: int, d: int, dtype: torch.dtype) -> None:
    """What stands behind names rows of NaN or no row at all: whatever reads one has it in its result."""
    from csae.kernels.triton.sparse_decode import feature_sum, gather_dot, gather_sum

    d_sae = 14
    values, indices = code(n, k, d_sae - 3, dtype)
    # The first rows are empty and full. Values are in no order, with zeros among them and one NaN.
    lengths = torch.randint(0, k + 1, (n,), generator=torch.Generator().manual_seed(5))
    lengths[0], lengths[1] = 0, k
    places = torch.arange(k, device=DEVICE)
    live = places < lengths.to(DEVICE)[:, None]
    values = torch.where((places % 3 == 1) & (places < lengths.to(DEVICE)[:, None] - 1), 0, values)
    values = torch.where(live, values, torch.where(places % 2 == 0, 0.0, -0.0).to(dtype))
    table, grad = random_normal(d_sae, d, dtype=dtype, seed=1), random_normal(n, d, dtype=dtype, seed=2)
    terms = values.double()[..., None] * table[indices].double()
    dots = torch.where(live[..., None], grad.double()[:, None] * table[indices].double(), 0)
    sums = feature_sums(values, indices, grad, d_sae)
    table[-3:] = math.nan
    indices = torch.where(
        live, indices, torch.where(places % 3 == 0, d_sae - 1, torch.where(places % 3 == 1, -1, 2**40))
    )
    assert_sum_close(gather_sum(values, indices, table), terms.sum(1), terms.abs().sum(1), k)
    found = gather_dot(grad, values, indices, table)
    assert_sum_close(found, dots.sum(2), dots.abs().sum(2), d)
    assert (found[~live] == 0).all()
    assert_sum_close(feature_sum(values, indices, grad, d_sae), *sums, n * k)
    values[1, k // 2] = math.nan
    assert gather_sum(values, indices, table)[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_values_with_a_narrower_table(dtype: torch.dtype) -> None:
    from csae.kernels.triton.sparse_decode import feature_sum, gather_dot, gather_sum

    values, indices = code(3, 5, 11, torch.float32)
    table, grad = random_normal(11, 16, dtype=dtype, seed=1), random_normal(3, 16, seed=2)
    rows = table[indices].double()
    terms = values.double()[..., None] * rows
    out = gather_sum(values, indices, table)
    assert out.dtype == dtype
    assert_sum_close(out, terms.sum(1), terms.abs().sum(1), 5)
    terms = grad.double()[:, None] * rows
    dots = gather_dot(grad, values, indices, table)
    assert dots.dtype == torch.float32
    assert_sum_close(dots, terms.sum(2), terms.abs().sum(2), 16)
    rows = grad.to(dtype)
    assert_sum_close(feature_sum(values, indices, rows, 11), *feature_sums(values, indices, rows, 11), terms=15)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("slab", [512, 256, 128, 64])
def test_slabs_of_every_width(slab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens are many, the width of a slab depends on how many rows there are for L2 to hold."""
    from csae.kernels.triton import sparse_decode

    monkeypatch.setattr(sparse_decode, "FEW_PROGRAMS", 0)
    monkeypatch.setattr(sparse_decode, "SLAB_BYTES", 7 * slab)
    values, indices = code(3, 35, 7, dtype)
    table, grad = random_normal(7, 264, dtype=dtype, seed=1), random_normal(3, 264, dtype=dtype, seed=2)
    launched = []
    tuned = sparse_decode.tuning.best
    monkeypatch.setattr(sparse_decode.tuning, "best", lambda *given: launched.append(tuned(*given)) or launched[-1])
    check_gathers(values, indices, table, grad)
    widths = [variant.constants["COLUMNS"] * dtype.itemsize for variant in launched]
    assert widths == [max(slab, 128), max(slab, 256)]


@pytest.mark.parametrize("place", range(8))
def test_every_form_that_a_gpu_may_be_tuned_to(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import sparse_decode

    monkeypatch.setattr(sparse_decode.tuning, "best", lambda variant, device: sparse_decode.candidates(variant)[place])
    values, indices = code(3, 35, 7, torch.float32)
    check_gathers(values, indices, random_normal(7, 264, seed=1), random_normal(3, 264, seed=2))


def check_gathers(values: Tensor, indices: Tensor, table: Tensor, grad: Tensor) -> None:
    from csae.kernels.triton.sparse_decode import gather_dot, gather_sum

    k, d = indices.shape[1], table.shape[1]
    terms = values.double()[..., None] * table[indices].double()
    assert_sum_close(gather_sum(values, indices, table), terms.sum(1), terms.abs().sum(1), k)
    terms = grad.double()[:, None] * table[indices].double()
    assert_sum_close(gather_dot(grad, values, indices, table), terms.sum(2), terms.abs().sum(2), d)


@pytest.mark.parametrize("bad", [-1, 7, -(2**40), 2**40, 2**32])
def test_an_index_outside_the_table_is_never_followed(bad: int) -> None:
    from csae.kernels.triton.sparse_decode import feature_sum, gather_dot, gather_sum

    values, indices = code(4, 3, 7, torch.float32)
    table, grad = random_normal(7, 10, seed=1), random_normal(4, 10, seed=2)
    want = [gather_sum(values, indices, table), gather_dot(grad, values, indices, table)]
    indices[2, 1] = bad
    out, dots = gather_sum(values, indices, table), gather_dot(grad, values, indices, table)
    assert out[2].isnan().all()
    assert dots[2, 1].isnan()
    others = [0, 1, 3]
    assert torch.equal(out[others], want[0][others])
    assert torch.equal(dots[others], want[1][others])
    assert torch.equal(dots[2, [0, 2]], want[1][2, [0, 2]])
    silent = torch.where(indices == bad, 0.0, values)
    inside = torch.where(indices == bad, 0, indices)
    torch.testing.assert_close(feature_sum(values, indices, grad, 7), feature_sum(silent, inside, grad, 7))


def test_infinite_and_nan_numbers_come_through() -> None:
    from csae.kernels.triton.sparse_decode import feature_sum, gather_dot, gather_sum

    indices = torch.tensor([[0, 1], [2, 3], [3, 3]], device=DEVICE)
    table = torch.tensor([[math.inf], [1.0], [math.nan], [-math.inf]], device=DEVICE).expand(4, 3)
    values = torch.ones(3, 2, device=DEVICE)
    rows = torch.tensor([[math.inf], [math.nan], [1.0]], device=DEVICE).expand(3, 3)
    inf, nan = math.inf, math.nan
    out = gather_sum(values, indices, table)[:, 0].cpu()
    torch.testing.assert_close(out, torch.tensor([inf, nan, -inf]), equal_nan=True)
    dots = gather_dot(rows, values, indices, table).cpu()
    torch.testing.assert_close(dots, torch.tensor([[inf, inf], [nan, nan], [-inf, -inf]]), equal_nan=True)
    sums = feature_sum(values, indices, rows, 5)[:, 0].cpu()
    torch.testing.assert_close(sums, torch.tensor([inf, inf, nan, nan, 0.0]), equal_nan=True)


def test_strided_and_unaligned_inputs() -> None:
    from csae.kernels.triton.sparse_decode import feature_sum, gather_dot, gather_sum

    values, indices = code(6, 5, 9, torch.float32)
    table, grad = random_normal(20, 9, seed=1), random_normal(6, 39, seed=2)
    indices = indices.clamp(max=8)
    # Columns of a wider code, a transposed table that begins inside its storage, every second column of grad.
    strided = [values[:, 1:3], indices[:, 1:3], table.T[:, 1:], grad[:, 1::2]]
    dense = [tensor.clone(memory_format=torch.contiguous_format) for tensor in strided]
    assert not any(tensor.is_contiguous() for tensor in strided)
    for call in (
        lambda v, i, t, g: gather_sum(v, i, t),
        lambda v, i, t, g: gather_dot(g, v, i, t),
        lambda v, i, t, g: feature_sum(v, i, g, 9),
    ):
        assert torch.equal(call(*strided), call(*dense))


@pytest.mark.slow
def test_a_table_of_more_than_two_to_the_31_elements() -> None:
    from csae.kernels.triton.sparse_decode import gather_dot, gather_sum

    d_sae, d = 2**22, 520
    table = torch.zeros(d_sae, d, dtype=torch.float16, device=DEVICE)
    table[-1] = 1.0
    indices = torch.tensor([[d_sae - 1, 0]], device=DEVICE)
    values = torch.tensor([[2.0, 3.0]], dtype=torch.float16, device=DEVICE)
    assert (gather_sum(values, indices, table) == 2.0).all()
    dots = gather_dot(torch.ones(1, d, dtype=torch.float16, device=DEVICE), values, indices, table)
    assert dots.tolist() == [[d, 0]]
