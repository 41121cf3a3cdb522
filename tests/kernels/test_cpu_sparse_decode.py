"""Native gathers and sums against plain definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csae.kernels import cpu
from csae.kernels.cpu.sparse_decode import feature_sum, gather_dot, gather_sum

needs_library = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))


class Sums(NamedTuple):
    """The arguments of the three sums."""

    values: Tensor  # [n, k]
    indices: Tensor  # [n, k]
    rows: Tensor  # [n, d]
    table: Tensor  # [d_sae, d]


def padded(tensor: Tensor, padding: int) -> Tensor:
    """The same matrix with a gap of NaN, or of an index out of range, between its rows."""
    n, width = tensor.shape
    gap = torch.full((n, width + padding), -1 if tensor.dtype == torch.int64 else math.nan, dtype=tensor.dtype)
    gap[:, :width] = tensor
    return gap[:, :width]


def sums_of(
    n: int, k: int, d: int, d_sae: int, seed: int = 0, padding: int = 0, dtype: torch.dtype = torch.float32
) -> Sums:
    generator = torch.Generator().manual_seed(seed)
    made = (
        torch.randn(n, k, generator=generator),
        # Half of the features only: so some have several pairs and some none. A row may name one twice.
        torch.randint((d_sae + 1) // 2, (n, k), generator=generator),
        torch.randn(n, d, generator=generator).to(dtype),
        torch.randn(d_sae, d, generator=generator).to(dtype),
    )
    return Sums(*(padded(tensor, padding) for tensor in made))


def assert_sums(case: Sums) -> None:
    """All three against float64, to a few roundings of the sum of absolute values, and one of the result."""
    values, indices, rows, table = (t.double() if t.is_floating_point() else t for t in case)
    d_sae, d = table.shape
    stored = case.table.dtype

    def close(given: Tensor, dtype: torch.dtype, wanted: Tensor, of_absolutes: Tensor) -> None:
        assert given.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2
        assert ((given.double() - wanted).abs() <= 1e-6 * of_absolutes + rounding * wanted.abs() + 1e-30).all()

    terms = values.unsqueeze(2) * table[indices]  # [n, k, d]
    close(gather_sum(case.values, case.indices, case.table), stored, terms.sum(1), terms.abs().sum(1))
    terms = rows.unsqueeze(1) * table[indices]  # [n, k, d]
    dots = gather_dot(case.rows.float(), case.values, case.indices, case.table)
    close(dots, torch.float32, terms.sum(2), terms.abs().sum(2))
    terms = (values.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1)  # [n * k, d]
    nothing = torch.zeros(d_sae, d, dtype=torch.float64)
    close(
        feature_sum(case.values, case.indices, case.rows, d_sae),
        stored,
        nothing.index_add(0, indices.flatten(), terms),
        nothing.index_add(0, indices.flatten(), terms.abs()),
    )


@needs_library
@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(0, 6),
    k=st.integers(0, 9),
    d=st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 128, 129, 300])),
    d_sae=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_sums_are_their_definitions(
    n: int, k: int, d: int, d_sae: int, seed: int, padding: int, dtype: torch.dtype
) -> None:
    assert_sums(sums_of(n, k, d, d_sae, seed, padding, dtype))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 17, 576, 1000])
def test_sums_in_each_isa(isa: str, d: int, dtype: torch.dtype) -> None:
    assert_sums(sums_of(50, 7, d, 90, dtype=dtype))


@needs_library
def test_bfloat16_is_rounded_as_torch_rounds_it(isa: str) -> None:
    # Halfway between two, to the even one; denormals, infinities and NaN.
    exact = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40, 3.4e38, math.inf, -math.inf, math.nan, 0, 1.7])
    for d in (1, 10, 40, 300):
        row = exact.repeat(30)[None, :d]
        # The exact number as a sum of what bfloat16 holds.
        parts = [row.bfloat16()]
        for _ in range(3):
            left = (row - sum(part.float() for part in parts)).nan_to_num(0, 0, 0)
            parts.append(left.bfloat16())
        table = torch.cat(parts)
        summed = gather_sum(torch.ones(1, 4), torch.arange(4)[None], table)
        wanted = sum(part.float() for part in parts).bfloat16()
        torch.testing.assert_close(summed, wanted, rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize("d_sae", [1, 40, 3000])
def test_sums_have_the_same_bits_for_any_number_of_threads(d_sae: int) -> None:
    # More than 4 * 16384 pairs, so that several threads sort them.
    case = sums_of(2500, 30, 33, d_sae)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            torch.cat(
                [
                    gather_sum(case.values, case.indices, case.table).flatten(),
                    gather_dot(case.rows, case.values, case.indices, case.table).flatten(),
                    feature_sum(case.values, case.indices, case.rows, d_sae).flatten(),
                ]
            ).view(torch.int32)
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_library
def test_feature_sum_adds_in_the_order_of_rows() -> None:
    # 1e8 + 1 - 1e8 is 0 in float32 in this order, and 1 in another.
    values = torch.tensor([[1e8, 1.0], [1.0, 2.0], [-1e8, 3.0]])
    indices = torch.tensor([[2, 0], [2, 0], [2, 0]])
    assert feature_sum(values, indices, torch.ones(3, 1), 4).tolist() == [[6.0], [0.0], [0.0], [0.0]]


@needs_library
def test_sums_pass_nan_and_inf_on() -> None:
    # A zero weight does not hide what it multiplies.
    table = torch.tensor([[1.0, math.inf], [math.nan, 2.0]])
    indices, values = torch.tensor([[0, 1]]), torch.tensor([[0.0, 1.0]])
    assert gather_sum(values, indices, table).isnan().all()
    assert gather_dot(torch.tensor([[1.0, 0.0]]), values, indices, table).isnan().all()
    assert feature_sum(values, indices, torch.tensor([[math.inf, 1.0]]), 2).isnan().tolist() == [
        [True, False],
        [False, False],
    ]


@needs_library
def test_sums_of_any_strides() -> None:
    case = sums_of(5, 3, 8, 12)
    turned = Sums(*(tensor.T.contiguous().T for tensor in case))
    assert torch.equal(
        gather_sum(turned.values, turned.indices, turned.table), gather_sum(case.values, case.indices, case.table)
    )
    assert torch.equal(
        gather_dot(turned.rows, turned.values, turned.indices, turned.table),
        gather_dot(case.rows, case.values, case.indices, case.table),
    )
    sums = (feature_sum(of.values, of.indices, of.rows, 12) for of in (case, turned))
    assert torch.equal(*sums)


@needs_library
@pytest.mark.parametrize("wrong", [-1, 12, 2**40, -(2**62)])
@pytest.mark.parametrize("place", [(0, 0), (4, 2)])
def test_sums_refuse_an_index_out_of_range(wrong: int, place: tuple[int, int]) -> None:
    case = sums_of(5, 3, 8, 12)
    case.indices[place] = wrong
    for call in (
        lambda: gather_sum(case.values, case.indices, case.table),
        lambda: gather_dot(case.rows, case.values, case.indices, case.table),
        lambda: feature_sum(case.values, case.indices, case.rows, 12),
    ):
        with pytest.raises(
            ValueError, match=rf"indices: given values from .*{wrong}.*; needed 0 <= index < d_sae = 12"
        ):
            call()


V, N, R, T = sums_of(5, 3, 8, 12)


@needs_library
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gather_sum(V.double(), N, T),
            TypeError,
            "values: given torch.float64; needed torch.float32 or torch.bfloat16",
        ),
        (lambda: gather_sum(V, N.int(), T), TypeError, "indices: given torch.int32; needed torch.int64"),
        (lambda: gather_sum(V, N[:, :2], T), ValueError, r"indices: given shape \[5, 2\]; needed \[5, 3\]"),
        (
            lambda: gather_sum(V, N, T.half()),
            TypeError,
            "table: given torch.float16; needed torch.float32 or torch.bfloat16",
        ),
        (lambda: gather_dot(R.half(), V, N, T), TypeError, "grad: given torch.float16; needed torch.float32"),
        (lambda: gather_dot(R[:, :4], V, N, T), ValueError, r"grad: given shape \[5, 4\]; needed \[any, 8\]"),
        (lambda: gather_dot(R, V, N[:3], T), ValueError, r"indices: given shape \[3, 3\]; needed \[5, 3\]"),
        (lambda: gather_dot(R, V, N, T.to("meta")), ValueError, "table: given a torch.strided tensor on meta"),
        (lambda: feature_sum(V, N, R[:4], 12), ValueError, r"rows: given shape \[4, 8\]; needed \[5, any\]"),
        (lambda: feature_sum(V, N, R, -1), ValueError, "d_sae: given -1; needed 0 or more"),
        (lambda: feature_sum(V, N, R, 12.0), TypeError, "d_sae: given float; needed int"),
    ],
)
def test_sums_refuse(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
