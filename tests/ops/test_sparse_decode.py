import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csae import reference
from csae.ops import sparse_decode

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(1, 1, 1, 1), (3, 5, 5, 1), (17, 8, 65, 33), (65, 129, 129, 17), (4, 31, 1000, 3), (0, 3, 7, 5), (5, 2, 7, 0)]


def inputs(n, k, d_sae, d_out, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (
        torch.randn(n, k).to(dtype).requires_grad_(),
        torch.randint(0, d_sae, (n, k)),
        torch.randn(d_sae, d_out).to(dtype).requires_grad_(),
    )


def check(values, indices, W_dec, tolerance):
    out = sparse_decode(values, indices, W_dec)
    wide = [tensor.detach().double().requires_grad_() for tensor in (values, W_dec)]
    expected = reference.sparse_decode(wide[0], indices, wide[1])
    assert out.dtype == values.dtype
    grad = torch.randn(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, (values, W_dec), grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for name, got, want in zip(("out", "d values", "d W_dec"), (out, *found), (expected, *wanted), strict=True):
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("n", "k", "d_sae", "d_out"), SHAPES)
def test_matches_reference_forward_and_every_gradient(n, k, d_sae, d_out, dtype):
    check(*inputs(n, k, d_sae, d_out, dtype), ROUNDING[dtype])


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(0, 9),
    k=st.integers(0, 9),
    d_sae=st.integers(1, 40),
    d_out=st.integers(1, 20),
    one_feature=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_repetition(n, k, d_sae, d_out, one_feature, strided, seed):
    values, indices, W_dec = inputs(n, k, d_sae, d_out, seed=seed)
    if one_feature:
        indices = torch.full_like(indices, d_sae - 1)
    if strided:
        values = values.detach().T.contiguous().T.requires_grad_()
        indices = torch.stack([indices, indices], dim=-1)[..., 0]
        W_dec = W_dec.detach().T.contiguous().T.requires_grad_()
    check(values, indices, W_dec, 2e-5)


def test_gradient_of_the_table_is_the_same_to_the_bit_for_any_thread_count():
    values, indices, W_dec = inputs(300, 16, 20, 33)
    grad = torch.randn(300, 33)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(sparse_decode(values, indices, W_dec), W_dec, grad)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gradcheck():
    values, indices, W_dec = inputs(5, 3, 7, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda v, W: sparse_decode(v, indices, W), (values, W_dec))


def test_many_chunks_give_what_one_gives(monkeypatch):
    from csae.kernels.portable import sparse_decode as portable

    monkeypatch.setattr(portable, "WORKSPACE_BYTES", 100)
    for dtype in (torch.float32, torch.float16):
        check(*inputs(37, 6, 11, 5, dtype), ROUNDING[dtype])


def test_leading_dimensions():
    values, indices, W_dec = inputs(6, 3, 7, 4)
    out = sparse_decode(values.view(2, 3, 3), indices.view(2, 3, 3), W_dec)
    torch.testing.assert_close(out.view(6, 4), sparse_decode(values, indices, W_dec))
    assert sparse_decode(values[0], indices[0], W_dec).shape == (4,)


def test_nan_and_inf_reach_their_token_only():
    values, indices, W_dec = inputs(4, 3, 7, 5)
    with torch.no_grad():
        values[1, 0], values[2, 0] = math.nan, math.inf
    out = sparse_decode(values, indices, W_dec)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert out[[0, 3]].isfinite().all()


def test_autocast():
    values, indices, W_dec = inputs(4, 3, 8, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparse_decode(values, indices, W_dec)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert values.grad.dtype == W_dec.grad.dtype == torch.float32


def test_opcheck():
    for args in (inputs(5, 3, 7, 4), inputs(0, 3, 7, 4), inputs(5, 1, 1, 1)):
        torch.library.opcheck(torch.ops.csae.sparse_decode.default, args)
    values, indices, W_dec = (tensor.detach() for tensor in inputs(5, 3, 7, 4))
    args = (torch.ones(5, 4), values, indices, W_dec, True, True)
    torch.library.opcheck(torch.ops.csae.sparse_decode_backward.default, args)


def test_export():
    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W = torch.nn.Parameter(inputs(1, 1, 7, 4)[2].detach())

        def forward(self, values, indices):
            return sparse_decode(values, indices, self.W)

    module, (values, indices, _) = Decode(), inputs(5, 3, 7, 4)
    values = values.detach()
    n = torch.export.Dim("n", min=2)
    program = torch.export.export(module, (values, indices), dynamic_shapes=({0: n}, {0: n}))
    for rows in (5, 3):
        torch.testing.assert_close(
            program.module()(values[:rows], indices[:rows]), module(values[:rows], indices[:rows])
        )


V, J, W = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        ((V.tolist(), J, W), TypeError, "values: given a list; needed a torch.Tensor"),
        ((V, J.int(), W), TypeError, "indices: given dtype torch.int32; needed torch.int64"),
        ((V, J, W.half()), TypeError, "W_dec: given dtype torch.float16; needed torch.float32 as values has"),
        ((V.long(), J, W), TypeError, "values: given dtype torch.int64; needed float32"),
        ((V, J[:1], W), ValueError, "indices: given shape [1, 3]; needed [..., k] as values = [2, 3]"),
        ((V, J, W[0]), ValueError, "W_dec: given shape [4]; needed [d_sae, d_out] = [any, any]"),
        ((V, J.to("meta"), W), ValueError, "indices: given on meta; needed on cpu as values is"),
        ((torch.zeros(()), torch.tensor(0), W), ValueError, "values: given a scalar; needed [..., k]"),
        ((V, J + 7, W), ValueError, "indices: given values from 7 to 7; needed 0 <= index < d_sae = 7"),
        ((V, J - 1, W), ValueError, "indices: given values from -1 to -1; needed 0 <= index < d_sae = 7"),
    ],
)
def test_errors_name_the_argument(args, kind, message):
    with pytest.raises(kind) as error:
        sparse_decode(*args)
    assert message in str(error.value)
