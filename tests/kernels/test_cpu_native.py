"""The native CPU library: its functions against a plain definition, and how it is loaded."""

from __future__ import annotations

import ctypes
import math
import platform
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu import library

needs_library = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -3.5, 1e-45, -1e-45, math.inf, -math.inf, 3.4e38, -3.4e38]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def topk_of_row(row: list[float], k: int) -> tuple[list[float], list[int]]:
    """The definition, in Python."""
    if any(map(math.isnan, row)):
        return [math.nan] * k, list(range(k))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return [max(row[i], 0.0) for i in order], order


def assert_same(given: tuple[Tensor, Tensor], pre_acts: Tensor, k: int) -> None:
    rows = [topk_of_row(row, k) for row in pre_acts.tolist()]
    n = pre_acts.shape[0]
    values = torch.tensor([v for v, _ in rows], dtype=torch.float32).reshape(n, k)
    indices = torch.tensor([i for _, i in rows], dtype=torch.int64).reshape(n, k)
    torch.testing.assert_close(given[0], values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(given[1], indices, rtol=0, atol=0)


# --- topk_start, topk_add, topk_finish -------------------------------------------------------------------


def topk_rows(
    pre_acts: Tensor,
    k: int,
    width: int | None = None,
    bias: Tensor | None = None,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The k largest of each row, taken in `width` columns at a time."""
    n, d_sae = pre_acts.shape
    best = cpu.topk_start(n, d_sae, k)
    bias = torch.zeros(d_sae) if bias is None else bias
    for first in range(0, d_sae, width or d_sae):
        columns = slice(first, first + (width or d_sae))
        cpu.topk_add(best, pre_acts[:, columns], bias[columns], first)
    return cpu.topk_finish(best, *out)


@st.composite
def topk_cases(draw: st.DrawFn) -> tuple[Tensor, int, int, Tensor]:
    n = draw(st.integers(0, 4))
    d_sae = draw(st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 640, 1000])))
    k = draw(st.one_of(st.just(1), st.just(d_sae), st.integers(1, d_sae)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "special", "negative"]))
    stride = d_sae + draw(st.integers(0, 5))
    buffer = torch.full((max(n, 1), stride), math.inf)  # what lies between the rows must not be seen
    pre_acts = buffer[:n, :d_sae]
    normal = torch.randn(n, d_sae, generator=generator)
    if kind == "special":
        normal = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (n, d_sae), generator=generator)]
    elif kind == "ties":
        normal = (normal * 2).round() / 2
    elif kind == "negative":
        normal = -normal.abs()
    pre_acts.copy_(normal)
    if n and draw(st.booleans()):
        pre_acts[draw(st.integers(0, n - 1)), draw(st.integers(0, d_sae - 1))] = math.nan
    width = draw(st.one_of(st.just(d_sae), st.integers(1, d_sae), st.just(64), st.just(128)))
    bias = draw(st.sampled_from([torch.zeros(d_sae), torch.arange(d_sae) / 4 - 3]))
    return pre_acts, k, width, bias


@needs_library
@pytest.mark.parametrize("name", library.ISAS)
@settings(deadline=None, max_examples=150)
@given(case=topk_cases())
def test_topk_rows_is_the_definition(name: str, case: tuple[Tensor, int, int, Tensor]) -> None:
    best = str(cpu.describe()["isa"])
    try:
        library.use_isa(name)
    except ValueError:
        pytest.skip(f"this CPU doesn't have {name}")
    pre_acts, k, _, bias = case
    before = pre_acts.clone()
    try:
        assert_same(topk_rows(*case), pre_acts + bias, k)
    finally:
        library.use_isa(best)
    torch.testing.assert_close(pre_acts, before, rtol=0, atol=0, equal_nan=True)


def wide_rows(kind: str, d_sae: int) -> Tensor:
    ramp = torch.arange(d_sae, dtype=torch.float32)
    if kind == "ascending":
        rows = torch.stack([ramp, ramp - d_sae])
    elif kind == "descending":
        rows = torch.stack([-ramp, d_sae - ramp])
    elif kind == "equal":
        rows = torch.stack([torch.zeros(d_sae), torch.full((d_sae,), -1.0), torch.full((d_sae,), -math.inf)])
    elif kind == "two values":
        rows = (ramp % 3 == 0).float().repeat(2, 1) - 1
    elif kind == "large ones together":
        rows = torch.randn(2, d_sae, generator=torch.Generator().manual_seed(0))
        rows[0, 700:900] += 10
        rows[1, ::64] += 10  # all in one group of the first pass
    else:
        rows = torch.randn(3, d_sae, generator=torch.Generator().manual_seed(1))
    return rows


@needs_library
@pytest.mark.parametrize("d_sae", [9216, 9217, 20000])
@pytest.mark.parametrize("kind", ["normal", "ascending", "descending", "equal", "two values", "large ones together"])
def test_topk_rows_of_wide_rows(isa: str, kind: str, d_sae: int) -> None:
    rows = wide_rows(kind, d_sae)
    for k in (1, 32, 150, 1500, d_sae):
        for width in (d_sae, 1000):
            assert_same(topk_rows(rows, k, width), rows, k)


@needs_library
def test_topk_rows_is_the_reference() -> None:
    torch.manual_seed(0)
    # Small integers: the product is exact, so ties are ties in any order of summation.
    x, W_enc = torch.randint(-3, 4, (9, 8)).float(), torch.randint(-3, 4, (300, 8)).float()
    values, indices = topk_rows(x @ W_enc.T, 20)
    wanted = reference.topk_encode(x, W_enc, torch.zeros(300), 20)
    assert torch.equal(values, wanted[0])
    assert torch.equal(indices, wanted[1])


@needs_library
def test_topk_rows_has_the_same_bits_for_any_number_of_threads() -> None:
    pre_acts = torch.randn(203, 5000)
    pre_acts[7, 11] = math.nan
    torch.set_num_threads(1)
    values, indices = topk_rows(pre_acts, 40, 1024)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        again = topk_rows(pre_acts, 40, 1024)
        assert torch.equal(again[0].view(torch.int32), values.view(torch.int32))
        assert torch.equal(again[1], indices)


@needs_library
def test_topk_rows_in_several_python_threads_at_once() -> None:
    inputs = [torch.randn(64, 4000) for _ in range(4)]
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = topk_rows(inputs[i], 16)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, pre_acts in enumerate(inputs):
        assert_same(results[i], pre_acts, 16)


@needs_library
def test_topk_rows_with_threads_of_its_own() -> None:
    pre_acts = torch.randn(100, 5000)
    torch.set_num_threads(3)
    library.native().csae_use_openmp(None)
    try:
        assert cpu.describe()["openmp"] is None
        assert_same(topk_rows(pre_acts, 8), pre_acts, 8)
    finally:
        library.native().csae_use_openmp(library._parallel_of_torch())


@needs_library
def test_topk_rows_fills_slices() -> None:
    pre_acts = torch.randn(6, 100)
    values, indices = torch.full((6, 9), 7.0), torch.full((6, 9), 7)
    given = topk_rows(pre_acts[2:5], 4, out=(values[2:5, 3:7], indices[2:5, 3:7]))
    assert given[0].data_ptr() == values[2:5, 3:7].data_ptr()
    assert_same((values[2:5, 3:7], indices[2:5, 3:7]), pre_acts[2:5], 4)
    values[2:5, 3:7], indices[2:5, 3:7] = 7, 7
    assert (values == 7).all()
    assert (indices == 7).all()


@needs_library
def test_topk_rows_of_an_expanded_row() -> None:
    row = torch.randn(1, 50).expand(3, 50)
    assert_same(topk_rows(row, 5), row, 5)


@needs_library
def test_topk_rows_beyond_32_bit_offsets() -> None:
    stride = 2**31 + 3
    pre_acts = torch.empty(stride + 100).as_strided((2, 100), (stride, 1))  # pages that are not touched cost nothing
    pre_acts.copy_(torch.randn(2, 100))
    assert_same(topk_rows(pre_acts, 7), pre_acts, 7)


X = torch.zeros(3, 10)


@needs_library
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((list(X), 1), TypeError, "pre_acts: given list; needed a torch.Tensor"),
        ((X.double(), 1), TypeError, "pre_acts: given torch.float64; needed torch.float32"),
        ((X.to("meta"), 1), ValueError, "pre_acts: given a torch.strided tensor on meta"),
        ((X.to_sparse(), 1), ValueError, "pre_acts: given a torch.sparse_coo tensor on cpu"),
        ((X[0], 1), ValueError, r"pre_acts: given shape \[10\]; needed \[3, any\]"),
        ((torch.zeros(10, 3).T, 1), ValueError, "pre_acts: given strides .*; needed a contiguous last dimension"),
        ((X, 0), ValueError, "k: given 0; needed 1 <= k <= d_sae, which is 10"),
        ((X, 11), ValueError, "k: given 11; needed 1 <= k <= d_sae, which is 10"),
        ((X, 2.0), TypeError, "k: given float; needed int"),
        ((X, 2, (torch.empty(3, 3), None)), ValueError, r"values: given shape \[3, 3\]; needed \[3, 2\]"),
        ((X, 2, (torch.empty(3, 2).double(), None)), TypeError, "values: given torch.float64; needed torch.float32"),
        ((X, 2, (torch.empty(2).expand(3, 2), None)), ValueError, "values: given strides .*; needed rows"),
        ((X, 2, (None, torch.empty(3, 2))), TypeError, "indices: given torch.float32; needed torch.int64"),
    ],
)
def test_topk_rows_refuses(arguments: tuple, error: type[Exception], message: str) -> None:
    def call(pre_acts: Tensor, k: int, out: tuple = ()) -> None:
        best = cpu.topk_start(3, 10, k)
        cpu.topk_add(best, pre_acts, torch.zeros(10), 0)
        cpu.topk_finish(best, *out)

    with pytest.raises(error, match=message):
        call(*arguments)


@needs_library
def test_topk_rows_refuses_what_does_not_belong_together() -> None:
    best = cpu.topk_start(3, 10, 4)
    with pytest.raises(ValueError, match=r"bias: given shape \[9\]; needed \[10\]"):
        cpu.topk_add(best, X, torch.zeros(9), 0)
    with pytest.raises(TypeError, match=r"bias: given torch\.float64; needed torch\.float32"):
        cpu.topk_add(best, X, torch.zeros(10).double(), 0)
    with pytest.raises(ValueError, match=r"topk_add: .*refused"):
        cpu.topk_add(best, X, torch.zeros(10), 2**31 - 10)
    cpu.topk_add(best, X[:, :3], torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"topk_finish: .*refused"):
        cpu.topk_finish(best)  # 3 columns only


@needs_library
def test_topk_rows_refuses_in_c_too() -> None:
    values, indices = torch.full((3, 2), 7.0), torch.full((3, 2), 7)
    best = cpu.topk_start(3, 10, 2)
    cpu.topk_add(best, X, torch.zeros(10), 0)
    good = library.Topk(*(part.data_ptr() for part in best[:4]), 3, 2, best.order.shape[1])
    function = library.native().csae_topk_finish

    def finish(state: library.Topk, *rest: int | None) -> int:
        return function(ctypes.byref(state), *rest)

    for name, wrong in [("n", -1), ("k", 0), ("k", 11), ("capacity", 65), ("capacity", 64), ("count", None)]:
        bad = library.Topk.from_buffer_copy(good)
        setattr(bad, name, wrong)
        assert finish(bad, values.data_ptr(), 2, indices.data_ptr(), 2, 1) == 1, name
    for count in (-2, 1, best.order.shape[1] + 1):
        best.counts[1] = count
        assert finish(good, values.data_ptr(), 2, indices.data_ptr(), 2, 1) == 1, count
    best.counts[1] = 10
    rest = [values.data_ptr(), 2, indices.data_ptr(), 2, 1]
    for place, wrong in [(0, None), (1, 1), (2, None), (3, 1), (4, 0)]:
        assert finish(good, *[wrong if i == place else value for i, value in enumerate(rest)]) == 1, place
    assert (values == 7).all()
    assert (indices == 7).all()
    assert finish(good, *rest) == 0


# --- gather_sum, gather_dot, feature_sum -----------------------------------------------------------------


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
    close(cpu.gather_sum(case.values, case.indices, case.table), stored, terms.sum(1), terms.abs().sum(1))
    terms = rows.unsqueeze(1) * table[indices]  # [n, k, d]
    dots = cpu.gather_dot(case.rows.float(), case.indices, case.table)
    close(dots, torch.float32, terms.sum(2), terms.abs().sum(2))
    terms = (values.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1)  # [n * k, d]
    nothing = torch.zeros(d_sae, d, dtype=torch.float64)
    close(
        cpu.feature_sum(case.values, case.indices, case.rows, d_sae),
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
        summed = cpu.gather_sum(torch.ones(1, 4), torch.arange(4)[None], table)
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
                    cpu.gather_sum(case.values, case.indices, case.table).flatten(),
                    cpu.gather_dot(case.rows, case.indices, case.table).flatten(),
                    cpu.feature_sum(case.values, case.indices, case.rows, d_sae).flatten(),
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
    assert cpu.feature_sum(values, indices, torch.ones(3, 1), 4).tolist() == [[6.0], [0.0], [0.0], [0.0]]


@needs_library
def test_sums_pass_nan_and_inf_on() -> None:
    # A zero weight does not hide what it multiplies.
    table = torch.tensor([[1.0, math.inf], [math.nan, 2.0]])
    indices, values = torch.tensor([[0, 1]]), torch.tensor([[0.0, 1.0]])
    assert cpu.gather_sum(values, indices, table).isnan().all()
    assert cpu.gather_dot(torch.tensor([[1.0, 0.0]]), indices, table).isnan().all()
    assert cpu.feature_sum(values, indices, torch.tensor([[math.inf, 1.0]]), 2).isnan().tolist() == [
        [True, False],
        [False, False],
    ]


@needs_library
def test_sums_write_into_out() -> None:
    case = sums_of(5, 3, 8, 12)
    buffer = torch.full((12, 10), 7.0)
    for function, arguments, shape in [
        (cpu.gather_sum, (case.values, case.indices, case.table), (5, 8)),
        (cpu.gather_dot, (case.rows, case.indices, case.table), (5, 3)),
        (cpu.feature_sum, (case.values, case.indices, case.rows, 12), (12, 8)),
    ]:
        out = buffer.fill_(7.0)[: shape[0], 1 : 1 + shape[1]]
        assert function(*arguments, out=out) is out
        assert torch.equal(out, function(*arguments))
        out.fill_(7.0)
        assert (buffer == 7).all()


@needs_library
@pytest.mark.parametrize("wrong", [-1, 12, 2**40, -(2**62)])
@pytest.mark.parametrize("place", [(0, 0), (4, 2)])
def test_sums_refuse_an_index_out_of_range(wrong: int, place: tuple[int, int]) -> None:
    case = sums_of(5, 3, 8, 12)
    case.indices[place] = wrong
    for call in (
        lambda: cpu.gather_sum(case.values, case.indices, case.table),
        lambda: cpu.gather_dot(case.rows, case.indices, case.table),
        lambda: cpu.feature_sum(case.values, case.indices, case.rows, 12),
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
        (lambda: cpu.gather_sum(V.double(), N, T), TypeError, "values: given torch.float64; needed torch.float32"),
        (lambda: cpu.gather_sum(V, N.int(), T), TypeError, "indices: given torch.int32; needed torch.int64"),
        (lambda: cpu.gather_sum(V, N[:, :2], T), ValueError, r"indices: given shape \[5, 2\]; needed \[5, 3\]"),
        (lambda: cpu.gather_sum(V, N, T.T), ValueError, "table: given strides"),
        (
            lambda: cpu.gather_sum(V, N, T.half()),
            TypeError,
            "table: given torch.float16; needed torch.float32 or torch.bfloat16",
        ),
        (lambda: cpu.gather_dot(R.bfloat16(), N, T), TypeError, "grad: given torch.bfloat16; needed torch.float32"),
        (lambda: cpu.gather_sum(V, N, T, R.T), ValueError, r"out: given shape \[8, 5\]; needed \[5, 8\]"),
        (lambda: cpu.gather_dot(R[:, :4], N, T), ValueError, r"grad: given shape \[5, 4\]; needed \[any, 8\]"),
        (lambda: cpu.gather_dot(R, N[:3], T), ValueError, r"indices: given shape \[3, 3\]; needed \[5, any\]"),
        (lambda: cpu.gather_dot(R, N, T.to("meta")), ValueError, "table: given a torch.strided tensor on meta"),
        (lambda: cpu.feature_sum(V, N, R[:4], 12), ValueError, r"rows: given shape \[4, 8\]; needed \[5, any\]"),
        (lambda: cpu.feature_sum(V, N, R, -1), ValueError, "d_sae: given -1; needed 0 or more"),
        (lambda: cpu.feature_sum(V, N, R, 12.0), TypeError, "d_sae: given float; needed int"),
        (lambda: cpu.feature_sum(V, N, R, 12, T[0].expand(12, 8)), ValueError, "out: given strides"),
    ],
)
def test_sums_refuse(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- loading ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_it_is_there_where_there_is_a_compiler() -> None:
    assert cpu.available(), f"{cpu.why_not()} (in a checkout: pip install -e .)"
    assert cpu.why_not() is None


@needs_library
def test_describe() -> None:
    torch.set_num_threads(3)
    described = cpu.describe()
    assert described["library"] == str(library.PATH)
    assert described["isa"] in library.ISAS
    assert described["threads"] == 3


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process() -> None:
    script = """
import re, torch
from csae.kernels import cpu
torch.set_num_threads(2)
x = torch.randn(512, 512) @ torch.randn(512, 4096)
cpu.topk_add(cpu.topk_start(512, 4096, 8), x, torch.zeros(4096), 0)
print(cpu.describe()["openmp"])
files = {line.split()[-1] for line in open("/proc/self/maps")}
print(sorted(file for file in files if re.search(r"/lib(g|i|)omp[^/]*$", file)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    used, files = run.stdout.splitlines()
    assert files == f"['{used}']"


def test_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "libcsae_cpu.so")
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    library.warn_once.cache_clear()
    assert not cpu.available()
    assert re.search(r"was not built.*install a C\+\+17 compiler.*pip install", str(cpu.why_not()))
    assert cpu.describe()["library"] is None
    with pytest.raises(RuntimeError, match="was not built"):
        cpu.topk_add(cpu.topk_start(3, 10, 1), X, X[0], 0)
    with pytest.warns(RuntimeWarning, match="slower PyTorch path.*was not built"):
        cpu.warn_once()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.warn_once()
    library.warn_once.cache_clear()


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "libcsae_cpu.so").write_text("not a library")
    monkeypatch.setattr(library, "PATH", tmp_path / "libcsae_cpu.so")
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert "can't be loaded" in str(cpu.why_not())


@needs_library
def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert re.search(r"has ABI version \d+, this package needs \d+", str(cpu.why_not()))


@needs_library
def test_nothing_is_said_where_it_is_there() -> None:
    library.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.warn_once()


# --- the process ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_memory_that_was_freed_is_kept_for_the_next_step() -> None:
    """The third time that eight blocks of 5 MB are written, their pages are there."""
    script = """
import resource, torch
from csae.kernels import cpu
assert cpu.available()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    blocks = [torch.full((5 << 18,), 1.0) for _ in range(8)]
    del blocks
print(faults() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 5120  # of 10240 pages
