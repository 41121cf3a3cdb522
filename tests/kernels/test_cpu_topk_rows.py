"""Native top-k of rows against a plain definition."""

from __future__ import annotations

import ctypes
import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu import library
from csae.kernels.cpu.topk_rows import topk_add, topk_finish, topk_start

needs_library = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -3.5, 1e-45, -1e-45, math.inf, -math.inf, 3.4e38, -3.4e38]


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


def topk_rows(
    pre_acts: Tensor,
    k: int,
    width: int | None = None,
    bias: Tensor | None = None,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The k largest of each row, taken in `width` columns at a time."""
    n, d_sae = pre_acts.shape
    best = topk_start(n, d_sae, k)
    bias = torch.zeros(d_sae) if bias is None else bias
    for first in range(0, d_sae, width or d_sae):
        columns = slice(first, first + (width or d_sae))
        topk_add(best, pre_acts[:, columns], bias[columns], first)
    return topk_finish(best, *out)


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


# The fixture is the same for all examples: the instruction set.
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=topk_cases())
def test_topk_rows_is_the_definition(isa: str, case: tuple[Tensor, int, int, Tensor]) -> None:
    pre_acts, k, _, bias = case
    before = pre_acts.clone()
    assert_same(topk_rows(*case), pre_acts + bias, k)
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
        best = topk_start(3, 10, k)
        topk_add(best, pre_acts, torch.zeros(10), 0)
        topk_finish(best, *out)

    with pytest.raises(error, match=message):
        call(*arguments)


@needs_library
def test_topk_rows_refuses_what_does_not_belong_together() -> None:
    best = topk_start(3, 10, 4)
    with pytest.raises(ValueError, match=r"bias: given shape \[9\]; needed \[10\]"):
        topk_add(best, X, torch.zeros(9), 0)
    with pytest.raises(TypeError, match=r"bias: given torch\.float64; needed torch\.float32"):
        topk_add(best, X, torch.zeros(10).double(), 0)
    with pytest.raises(ValueError, match=r"topk_add: .*refused"):
        topk_add(best, X, torch.zeros(10), 2**31 - 10)
    topk_add(best, X[:, :3], torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"topk_finish: .*refused"):
        topk_finish(best)  # 3 columns only


@needs_library
def test_topk_rows_refuses_in_c_too() -> None:
    values, indices = torch.full((3, 2), 7.0), torch.full((3, 2), 7)
    best = topk_start(3, 10, 2)
    topk_add(best, X, torch.zeros(10), 0)
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
