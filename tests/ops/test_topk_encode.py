import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csae import reference
from csae.kernels import cpu
from csae.ops import topk_encode

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(1, 1, 1, 1), (3, 1, 5, 5), (1, 7, 2, 1), (17, 33, 65, 8), (65, 17, 129, 129), (4, 3, 1000, 31)]


def inputs(n, d_in, d_sae, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    scale = 1 / math.sqrt(d_in)
    return (
        torch.randn(n, d_in).to(dtype).requires_grad_(),
        (torch.randn(d_sae, d_in) * scale).to(dtype).requires_grad_(),
        (0.1 * torch.randn(d_sae)).to(dtype).requires_grad_(),
    )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_matches_reference_forward_and_every_gradient(n, d_in, d_sae, k, dtype):
    x, W, b = inputs(n, d_in, d_sae, dtype)
    values, indices = topk_encode(x, W, b, k)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, W, b)]
    pre_acts = wide[0] @ wide[1].T + wide[2]
    expected = reference.topk_encode(*wide, k)[0]
    tolerance = ROUNDING[dtype]
    assert values.dtype == dtype
    assert indices.dtype == torch.int64
    torch.testing.assert_close(values.double(), expected, rtol=tolerance, atol=tolerance)
    # Near-ties may fall either way in rounding: the chosen entries must be worth what the best are worth.
    torch.testing.assert_close(
        pre_acts.gather(1, indices).relu(),
        expected,
        rtol=tolerance,
        atol=tolerance,
        msg="indices do not belong to values",
    )
    assert all(len(set(row.tolist())) == k for row in indices)
    grad = torch.randn(n, k).to(dtype)
    found = torch.autograd.grad(values, (x, W, b), grad)
    # The gradient of the entries that were chosen, in float64.
    chosen = pre_acts.gather(1, indices)
    masked = torch.where(values <= 0, 0, grad).double()
    wanted = torch.autograd.grad(chosen, wide, masked)
    for name, got, want in zip(("x", "W_enc", "b_enc"), found, wanted, strict=True):
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance * scale, msg=lambda m, name=name: f"d {name}: {m}"
        )


@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_selects_what_the_reference_selects(n, d_in, d_sae, k):
    # Small integers: products are exact in float32, and there are many ties.
    torch.manual_seed(1)
    x, W, b = (torch.randint(-2, 3, shape).float() for shape in ((n, d_in), (d_sae, d_in), (d_sae,)))
    values, indices = topk_encode(x, W, b, k)
    expected_values, expected_indices = reference.topk_encode(x.double(), W.double(), b.double(), k)
    assert torch.equal(values.double(), expected_values)
    assert torch.equal(indices, expected_indices)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 9),
    d_sae=st.integers(1, 70),
    share=st.floats(0, 1),
    levels=st.integers(1, 4),
    kind=st.sampled_from(["mixed", "negative", "specials"]),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_selection_over_ties_negatives_nan_and_inf(n, d_sae, share, levels, kind, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(share * d_sae))
    pre_acts = torch.randint(-levels, levels + 1, (n, d_sae), generator=generator).float()
    if kind == "negative":
        pre_acts = -pre_acts.abs() - 1
    if kind == "specials" and n:
        specials = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
        where = torch.rand(n, d_sae, generator=generator) < 0.05
        pre_acts = torch.where(where, specials[torch.randint(0, 4, (n, d_sae), generator=generator)], pre_acts)
    # An identity for weights and the pre-activations as input reach every bit pattern but inf and nan, which a
    # product with zero would spread: those come in through a bias, a row at a time.
    if kind == "specials":
        got = [topk_encode(torch.zeros(1, 1), torch.zeros(d_sae, 1), row, k) for row in pre_acts]
        values = torch.cat([v for v, _ in got]) if got else torch.empty(0, k)
        indices = torch.cat([i for _, i in got]) if got else torch.empty(0, k, dtype=torch.int64)
        wanted = [reference.topk_encode(torch.zeros(1, 1), torch.zeros(d_sae, 1), row, k) for row in pre_acts]
        expected_values = torch.cat([v for v, _ in wanted]) if got else values
        expected_indices = torch.cat([i for _, i in wanted]) if got else indices
    else:
        x, W, b = pre_acts, torch.eye(d_sae), torch.zeros(d_sae)
        if strided:
            x = torch.stack([x, x], dim=-1)[..., 0]
            W = torch.stack([W, W], dim=0).transpose(0, 2)[..., 0]
        values, indices = topk_encode(x, W, b, k)
        expected_values, expected_indices = reference.topk_encode(x.double(), W.double(), b.double(), k)
    torch.testing.assert_close(values.double(), expected_values.double(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("kind", ["reals", "ties", "negative", "specials"])
@pytest.mark.parametrize("tile", [(1000, 5), (7, 5), (3, 1000), (1, 1), (1000, 64)])
def test_many_tiles_give_what_the_reference_gives(kind, tile, monkeypatch):
    """Tiles of so many rows and columns, down to narrower ones than k."""
    n, d_in, d_sae, k = 37, 8, 150, 6
    for place in ("cpu", "portable"):
        module = import_module(f"csae.kernels.{place}.topk_encode")
        tiles = module.INNER._replace(tile=lambda *given: (min(n, tile[0]), min(d_sae, tile[1])))
        monkeypatch.setattr(module, "INNER", tiles)
    torch.manual_seed(0)
    if kind == "reals":
        x, W, b = (tensor.detach() for tensor in inputs(n, d_in, d_sae))
    else:  # products of small integers are exact, and there are many ties
        x, W, b = (torch.randint(-2, 3, shape).float() for shape in ((n, d_in), (d_sae, d_in), (d_sae,)))
    if kind == "negative":
        b -= 100
    if kind == "specials":
        b[70], b[71], x[5, 0], x[9, 3] = math.inf, -math.inf, math.nan, math.inf
    values, indices = topk_encode(x, W, b, k)
    expected_values, expected_indices = reference.topk_encode(x, W, b, k)
    torch.testing.assert_close(values, expected_values, equal_nan=True)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_workspace_is_bounded(dtype):
    from csae.kernels.cpu.topk_encode import _tile as native_tile
    from csae.kernels.cpu.topk_rows import topk_capacity
    from csae.kernels.portable.topk_encode import _tile as portable_tile

    on_native = cpu.available() and dtype != torch.float64
    itemsize = 8 if dtype == torch.float64 else 4
    for n in (1, 100, 5_000, 1_000_000):
        for d_sae in (1, 300, 40_000, 1_000_000):
            for k in {1, 32, d_sae}:
                x = torch.empty(0, dtype=dtype).expand(n, 0)
                rows, columns = (native_tile if on_native else portable_tile)(x, d_sae, min(k, d_sae))
                assert 1 <= rows <= n
                assert 1 <= columns <= d_sae
                candidates = 8 * topk_capacity(d_sae, min(k, d_sae)) if on_native else 0
                assert rows * (columns * itemsize + candidates) <= 16 << 20 or rows == 1


def exact_inputs(n, d_in, d_sae, r):
    """Small integers, of which products are exact in float32, with many ties."""
    torch.manual_seed(2)
    shapes = ((n, d_in), (d_sae, d_in), (d_sae,), (n, r), (d_sae, r))
    return [torch.randint(-2, 3, shape).float() for shape in shapes]


@pytest.mark.parametrize("tile", [(1000, 1000), (7, 50)])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_encoding_again_is_encoding_what_is_left(dtype, tile, monkeypatch):
    from csae.kernels.portable import topk_encode as portable

    n, d_in, d_sae, r, k = 20, 8, 150, 5, 6
    tiles = portable.INNER._replace(tile=lambda *given: (min(n, tile[0]), min(d_sae, tile[1])))
    monkeypatch.setattr(portable, "INNER", tiles)
    monkeypatch.setattr(portable, "WIDE_BYTES", 1000)
    x, W, b, a, W_a = exact_inputs(n, d_in, d_sae, r)
    x[3, 2] = math.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values, indices, kept = portable.encode_and_keep(*(tensor.to(dtype) for tensor in (x, W, b)), k)
    expected = reference.topk_encode(x, W, b, k)
    assert values.dtype == dtype
    assert kept.shape == (n, d_sae)
    assert kept.dtype == wide
    torch.testing.assert_close(values.float(), expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected[1])
    a[5, 1] = math.nan
    values, indices = portable.encode_again(kept, a.to(dtype), W_a.to(dtype), k)
    expected = reference.topk_encode(torch.cat([x, a], 1), torch.cat([W, -W_a], 1), b, k)
    assert values.dtype == dtype
    torch.testing.assert_close(values.float(), expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected[1])


def test_encoding_nothing_again():
    from csae.kernels.portable import topk_encode as portable

    x, W, b, a, W_a = exact_inputs(0, 8, 30, 5)
    values, indices, kept = portable.encode_and_keep(x, W, b, 4)
    assert (values.shape, indices.shape, kept.shape) == ((0, 4), (0, 4), (0, 30))
    assert portable.encode_again(kept, a, W_a, 4)[0].shape == (0, 4)


@pytest.mark.slow
def test_more_pre_activations_than_int32_counts():
    n, d_sae = 70_000, 32_768  # 2.3e9
    torch.manual_seed(0)
    x, W, b = torch.randint(-3, 4, (n, 2)).float(), torch.randint(-3, 4, (d_sae, 2)).float(), torch.rand(d_sae)
    values, indices = topk_encode(x, W, b, 2)
    for rows in (slice(0, 50), slice(65_500, 65_600), slice(n - 50, n)):
        expected_values, expected_indices = reference.topk_encode(x[rows], W, b, 2)
        assert torch.equal(values[rows], expected_values)
        assert torch.equal(indices[rows], expected_indices)


def test_gradcheck():
    x, W, b = inputs(5, 4, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda *args: topk_encode(*args, 3)[0], (x, W, b))


def test_leading_dimensions_and_empty_batch():
    x, W, b = inputs(6, 4, 9)
    values, indices = topk_encode(x.view(2, 3, 4), W, b, 2)
    flat = topk_encode(x, W, b, 2)
    assert torch.equal(values.view(6, 2), flat[0])
    assert torch.equal(indices.view(6, 2), flat[1])
    empty, where = topk_encode(x[:0].view(0, 3, 4), W, b, 2)
    assert empty.shape == where.shape == (0, 3, 2)
    empty.sum().backward()
    assert W.grad.abs().sum() == 0
    single, _ = topk_encode(x[0], W, b, 2)
    torch.testing.assert_close(single, flat[0][0])


def test_nan_reaches_the_output_and_the_gradient_of_its_token_only():
    x, W, b = inputs(4, 3, 8)
    with torch.no_grad():
        x[2, 1] = math.nan
    values, indices = topk_encode(x, W, b, 3)
    assert values[2].isnan().all()
    assert indices[2].tolist() == [0, 1, 2]
    assert not values[[0, 1, 3]].isnan().any()
    grad_x = torch.autograd.grad(values.nansum() + (values * values).sum(), x)[0]
    assert grad_x[2].isnan().all()
    assert not grad_x[[0, 1, 3]].isnan().any()


def test_autocast_computes_in_the_lower_dtype_and_gradients_keep_theirs():
    x, W, b = inputs(4, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = topk_encode(x, W, b, 3)
    assert values.dtype == torch.bfloat16
    values.sum().backward()
    assert x.grad.dtype == W.grad.dtype == b.grad.dtype == torch.float32
    x64, W64, b64 = inputs(4, 3, 8, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert topk_encode(x64, W64, b64, 3)[0].dtype == torch.float64


def test_opcheck():
    for x, W, b in (inputs(5, 4, 9), inputs(0, 4, 9), inputs(3, 1, 1)):
        torch.library.opcheck(torch.ops.csae.topk_encode.default, (x, W, b, 1))
    x, W, b = inputs(5, 4, 9)
    values, indices = topk_encode(x.detach(), W.detach(), b.detach(), 3)
    args = (torch.ones_like(values), values, indices, x.detach(), W.detach(), True, True, True)
    torch.library.opcheck(torch.ops.csae.topk_encode_backward.default, args)


def test_export():
    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, W, b = inputs(1, 4, 9)
            self.W, self.b = torch.nn.Parameter(W.detach()), torch.nn.Parameter(b.detach())

        def forward(self, x):
            return topk_encode(x, self.W, self.b, 3)

    module, x = Encode(), inputs(5, 4, 9)[0].detach()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for n in (5, 3):
        for got, want in zip(program.module()(x[:n]), module(x[:n]), strict=True):
            assert torch.equal(got, want)


X, W, B = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(9)


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (([1.0], W, B, 3), TypeError, "x: given a list; needed a torch.Tensor"),
        ((X.long(), W, B, 3), TypeError, "x: given dtype torch.int64; needed float32"),
        ((X, W.double(), B, 3), TypeError, "W_enc: given dtype torch.float64; needed torch.float32 as x has"),
        ((X, W, B.half(), 3), TypeError, "b_enc: given dtype torch.float16; needed torch.float32 as x has"),
        ((X, W.to("meta"), B, 3), ValueError, "W_enc: given on meta; needed on cpu as x is"),
        ((torch.zeros(()), W, B, 3), ValueError, "x: given a scalar; needed [..., d_in]"),
        ((X, W.T, B, 3), ValueError, "W_enc: given shape [4, 9]; needed [d_sae, d_in] = [any, 4]"),
        ((X, W, B[:5], 3), ValueError, "b_enc: given shape [5]; needed [d_sae] = [9]"),
        ((X, W, B, 0), ValueError, "k: given 0; needed 1 <= k <= d_sae = 9"),
        ((X, W, B, 10), ValueError, "k: given 10; needed 1 <= k <= d_sae = 9"),
        ((X, W, B, 2.0), TypeError, "k: given a float; needed an int"),
        ((X, W, B, True), TypeError, "k: given a bool; needed an int"),
    ],
)
def test_errors_name_the_argument(args, kind, message):
    with pytest.raises(kind) as error:
        topk_encode(*args)
    assert message in str(error.value)


def test_encoding_again_less_something_of_low_rank():
    """encode_and_keep, then encode_again by the narrow product: what topk_encode gives, forward and backward."""
    from csae.ops.topk_encode import encode_again, encode_and_keep, with_encode_gradient

    x, W, b = inputs(13, 16, 70)
    V, a = torch.randn(16, 3, dtype=x.dtype), torch.randn(13, 3, dtype=x.dtype)
    values, indices, kept = encode_and_keep(x, W, b, 5)
    assert torch.equal(indices, topk_encode(x, W, b, 5)[1])
    W_a = (W @ V).detach()
    for part in (a, 0.5 * a, -2 * a):
        values, indices = encode_again(kept, part, W_a, 5)
        x = (x - part @ V.T).detach().requires_grad_()
        expected, expected_indices = topk_encode(x, W, b, 5)
        assert torch.equal(indices, expected_indices)
        values = with_encode_gradient(x, W, b, values, indices)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(values)
        ours, theirs = (torch.autograd.grad(of, (x, W, b), grad) for of in (values, expected))
        for mine, theirs_of_it in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, theirs_of_it)
    torch.library.opcheck(torch.ops.csae.encode_and_keep.default, (x.detach(), W.detach(), b.detach(), 5))
    torch.library.opcheck(torch.ops.csae.encode_again.default, (kept, a, W_a, 5))
    detached = (x.detach().requires_grad_(), W, b, values.detach(), indices)
    torch.library.opcheck(torch.ops.csae.with_encode_gradient.default, detached)


@pytest.mark.parametrize("n", [0, 3, 700])
@pytest.mark.parametrize("autocast", [False, True])
def test_encoder_is_topk_encode(autocast: bool, n: int) -> None:
    """Once and again, without a gradient."""
    from csae.ops.topk_encode import encoder

    torch.manual_seed(0)
    x, W, b = torch.randn(2, n, 130), torch.randn(1700, 130, requires_grad=True), torch.randn(1700)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        encode = encoder(W, b, 5)
        for _ in range(2):
            values, indices = encode(x)
            wanted = topk_encode(x, W, b, 5)
            assert not values.requires_grad
            assert values.dtype == wanted[0].dtype
            torch.testing.assert_close(values, wanted[0].detach())
            assert torch.equal(indices, wanted[1])
    with pytest.raises(TypeError, match=r"W_enc: given dtype torch.float32; needed torch.float64 as x has"):
        encoder(W, b, 5)(x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("d_sae", [40, 3000])
def test_wide_values_are_those_of_the_selection(dtype: torch.dtype, d_sae: int) -> None:
    """As many ranks compare them: in half precision many would be equal."""
    from csae.ops.topk_encode import encode_wide

    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*size, generator=generator).to(dtype) for size in ((70, 16), (d_sae, 16), (d_sae,)))
    values, indices = encode_wide(x, W, b, 5)
    rounded = topk_encode(x, W, b, 5)
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(indices, rounded[1])
    assert torch.equal(values.to(dtype), rounded[0])
    expected = (x.double() @ W.double().T + b.double()).gather(1, indices).relu()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
