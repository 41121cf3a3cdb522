import math

import pytest
import torch

from csae import reference
from csae.ops import near_threshold, threshold_encode
from csae.ops.straight_through import decode_steps, threshold_steps
from csae.ops.threshold_encode import (
    threshold_and_near,
    threshold_encode_again,
    threshold_encode_and_keep,
    threshold_encode_wide,
    threshold_encoder,
)

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# n, d_in, d_sae, k_max
SHAPES = [(1, 1, 1, 1), (3, 1, 5, 5), (1, 7, 2, 1), (17, 33, 65, 8), (65, 17, 129, 129), (0, 4, 9, 3), (4, 3, 1000, 31)]
# The last is one that the native kernels search in bfloat16, where the CPU has units for it.
LARGE = (300, 130, 1100, 12)


def inputs(n, d_in, d_sae, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    scale = 1 / math.sqrt(d_in)
    return (
        torch.randn(n, d_in).to(dtype).requires_grad_(),
        (torch.randn(d_sae, d_in) * scale).to(dtype).requires_grad_(),
        (0.1 * torch.randn(d_sae)).to(dtype).requires_grad_(),
    )


def thresholds(d_sae, kind):
    """Of one feature in six a pre-activation is above."""
    one = torch.tensor(1.0)
    return one if kind == "scalar" else one + 0.3 * torch.randn(d_sae)


def integers(n, d_in, d_sae, seed=1):
    """Products of small integers are exact, and there are many ties."""
    torch.manual_seed(seed)
    return [torch.randint(-2, 3, shape).float() for shape in ((n, d_in), (d_sae, d_in), (d_sae,))]


@pytest.mark.parametrize("kind", ["scalar", "a feature"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k_max"), [*SHAPES, LARGE])
def test_matches_reference_forward_and_every_gradient(n, d_in, d_sae, k_max, dtype, kind):
    x, W, b = inputs(n, d_in, d_sae, dtype)
    threshold = thresholds(d_sae, kind)
    values, indices = threshold_encode(x, W, b, threshold, k_max)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, W, b)]
    pre_acts = wide[0] @ wide[1].T + wide[2]
    expected, expected_indices = reference.threshold_encode(*wide, threshold.double(), k_max)
    assert values.dtype == dtype
    assert indices.dtype == torch.int64
    assert values.shape == indices.shape == (n, k_max)
    # A pre-activation near its threshold may fall either way in float32.
    sure = ((pre_acts - threshold).abs() > 1e-5).all(dim=1)
    assert sure.float().mean() > 0.5 or n == 0
    torch.testing.assert_close(values[sure].double(), expected[sure], rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert torch.equal((values > 0).sum(1)[sure], (expected > 0).sum(1)[sure])
    if dtype == torch.float64:
        assert torch.equal(indices, expected_indices)
    chosen = torch.where(values > 0, pre_acts.gather(1, indices), 0)
    torch.testing.assert_close(chosen, values.double(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert (indices[values == 0] == 0).all()
    grad = torch.randn(n, k_max).to(dtype)
    found = torch.autograd.grad(values, (x, W, b), grad)
    wanted = torch.autograd.grad(chosen, wide, grad.double())
    for name, got, want in zip(("x", "W_enc", "b_enc"), found, wanted, strict=True):
        tolerance = ROUNDING[dtype] * max(1.0, want.abs().max().item() if want.numel() else 0)
        torch.testing.assert_close(
            got.double(), want, rtol=ROUNDING[dtype], atol=tolerance, msg=lambda m, name=name: f"d {name}: {m}"
        )


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k_max"), [*SHAPES, LARGE])
def test_selects_what_the_reference_selects(n, d_in, d_sae, k_max, per_feature):
    x, W, b = integers(n, d_in, d_sae)
    spread = 2 * math.sqrt(d_in)
    choice = torch.randint(-2, 9, (d_sae,)).float() / 4 * spread  # whole numbers too: equal is not above
    for threshold in (choice, choice.round()) if per_feature else (*choice[:3].round(), torch.tensor(-math.inf)):
        values, indices = threshold_encode(x, W, b, threshold, k_max)
        wanted = reference.threshold_encode(x.double(), W.double(), b.double(), threshold.double(), k_max)
        assert torch.equal(values.double(), wanted[0])
        assert torch.equal(indices, wanted[1])


@pytest.mark.parametrize("shape", [(9, 8, 70, 5), LARGE])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["x", "b_enc", "threshold"])
def test_nan_and_infinities(shape, special, place):
    n, d_in, d_sae, k_max = shape
    x, W, b = integers(n, d_in, d_sae)
    threshold = torch.full((d_sae,), 2.0 * math.sqrt(d_in))
    W[:, 0] = W[:, 0].sign() + (W[:, 0] == 0)  # no zeros, which would make a NaN of an infinity
    {"x": x[:1, 0], "b_enc": b[3:4], "threshold": threshold[2:7]}[place].fill_(special)
    for given in (threshold, threshold[2]):
        values, indices = threshold_encode(x, W, b, given, k_max)
        wanted = reference.threshold_encode(x, W, b, given, k_max)
        torch.testing.assert_close(values, wanted[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices, wanted[1])


def test_half_precision_compares_before_it_rounds():
    x, W, b = torch.ones(1, 2).half(), torch.tensor([[1.0, 2.0**-11], [1.0, 0.0]]).half(), torch.zeros(2).half()
    values, indices = threshold_encode(x, W, b, torch.tensor(1.0), 2)
    assert values.tolist() == [[1.0, 0.0]]
    assert indices.tolist() == [[0, 0]]
    tiny = torch.full((1, 1), 2.0**-20).half()
    values, indices = threshold_encode(tiny, torch.cat([0 * tiny, tiny]), b, torch.tensor(0.0), 2)
    assert values.tolist() == [[0, 0]]
    assert indices.tolist() == [[0, 0]]


def test_non_contiguous_and_leading_dimensions():
    x, W, b = integers(12, 6, 40)
    threshold = torch.stack([torch.arange(40.0) / 8] * 2, dim=1)[:, 0]
    wanted = threshold_encode(x, W, b, threshold.contiguous(), 4)
    strided = x.T.contiguous().T, W.T.contiguous().T, torch.stack([b, b], dim=1)[:, 0]
    found = threshold_encode(strided[0].view(3, 4, 6), *strided[1:], threshold, 4)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.view(12, 4), want)
    assert torch.equal(threshold_encode(x[0], W, b, threshold, 4)[0], wanted[0][0])


def test_gradcheck():
    x, W, b = inputs(5, 4, 9, torch.float64)
    threshold = 0.2 * torch.ones(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: threshold_encode(*args, threshold, 3)[0], (x, W, b))


def test_autocast_computes_in_the_lower_dtype_and_gradients_keep_theirs():
    x, W, b = inputs(4, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = threshold_encode(x, W, b, torch.tensor(0.1), 3)
    assert values.dtype == torch.bfloat16
    values.sum().backward()
    assert x.grad.dtype == W.grad.dtype == b.grad.dtype == torch.float32


def test_opcheck():
    ops = torch.ops.csae
    for x, W, b in (inputs(5, 4, 9), inputs(0, 4, 9), inputs(3, 1, 1)):
        torch.library.opcheck(ops.threshold_encode.default, (x, W, b, torch.tensor(0.1), 1))
        torch.library.opcheck(ops.threshold_encode.default, (x, W, b, torch.rand(W.shape[0]), 1))
    x, W, b = (tensor.detach() for tensor in inputs(5, 4, 9))
    threshold = torch.rand(9)
    torch.library.opcheck(ops.near_threshold.default, (x, W, b, threshold, 0.5, 3))
    torch.library.opcheck(ops.threshold_and_near.default, (x, W, b, threshold, 0.5, 3))
    torch.library.opcheck(ops.threshold_encode_wide.default, (x.half(), W.half(), b.half(), threshold, 3))
    torch.library.opcheck(ops.threshold_encode_and_keep.default, (x, W, b, threshold, 3))
    kept = threshold_encode_and_keep(x, W, b, threshold, 3)[2]
    args = (kept, torch.randn(5, 2), torch.randn(9, 2), threshold, 3)
    torch.library.opcheck(ops.threshold_encode_again.default, args)
    values, indices = near_threshold(x, W, b, threshold, 0.5, 3)
    steps = torch.zeros_like(values).requires_grad_()
    torch.library.opcheck(ops.decode_steps.default, (steps, values, indices, torch.randn(9, 6)))


def test_compiles():
    x, W, b = inputs(6, 4, 9)

    def loss(x, W, b, threshold):
        values, indices = threshold_encode(x, W, b, threshold, 3)
        return (values * (indices + 1)).sum()

    wanted = loss(x, W, b, torch.tensor(0.1))
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, W, b, torch.tensor(0.1))
    assert torch.equal(found, wanted)
    for got, want in zip(*(torch.autograd.grad(of, (x, W, b)) for of in (found, wanted)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("shape", [(17, 6, 65, 20), (300, 130, 1100, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_threshold_gives_the_candidates_on_both_sides(dtype, shape, per_feature):
    n, d_in, d_sae, k_max = shape
    x, W, b = (of.to(dtype) for of in integers(n, d_in, d_sae))
    threshold = torch.randint(1, 8, (d_sae,)).to(dtype) * d_in**0.5 / 2
    threshold = threshold if per_feature else threshold[0]
    found = near_threshold(x, W, b, threshold, 5.0, k_max)
    wanted = reference.near_threshold(x, W, b, threshold, 5.0, k_max)
    assert (wanted[0] > 0).any()
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("k_max", [2, 12, 100])  # of the first nearly all rows are cut off
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_search_gives_the_code_and_what_is_near(dtype, k_max, per_feature):
    for n, d_in, d_sae in ((17, 6, 100), (300, 130, 1100)):
        x, W, b = (of.to(dtype) for of in integers(n, d_in, d_sae))
        x[3, 0] = math.nan
        threshold = torch.randint(-1, 8, (d_sae,)).to(torch.promote_types(dtype, torch.float32)) * d_in**0.5 / 2
        threshold[5:7] = torch.tensor([math.inf, math.nan])
        threshold = threshold if per_feature else threshold[0].abs()
        *code, values, indices = threshold_and_near(x, W, b, threshold, 5.0, k_max)
        x, W, b = (of.to(threshold.dtype) for of in (x, W, b))
        wanted = reference.threshold_encode(x, W, b, threshold, k_max)
        near = reference.near_threshold(x, W, b, threshold, 5.0, k_max)
        for found, expected in zip((*code, values, indices), (*wanted, *near), strict=True):
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scalar", [False, True])
def test_straight_through_gradient_is_that_of_the_reference(scalar):
    n, d_in, d_sae, d_out, bandwidth = 30, 6, 25, 7, 0.4
    x, W, b = (of.detach() for of in inputs(n, d_in, d_sae, torch.float64))
    threshold = (torch.tensor(0.5) if scalar else 0.1 + torch.rand(d_sae)).double().requires_grad_()
    W_dec = torch.randn(d_sae, d_out, dtype=torch.float64)
    d_out_of, d_l0 = torch.randn(n, d_out, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    near = near_threshold(x, W, b, threshold, bandwidth, d_sae)
    steps = threshold_steps(*near, threshold, bandwidth)
    out = decode_steps(steps, *near, threshold, W_dec)
    assert not steps.any()
    assert not out.any()
    found = torch.autograd.grad((out * d_out_of).sum() + (steps.sum(-1) * d_l0).sum(), threshold)[0]
    own = threshold.detach().expand(d_sae)
    wanted = reference.threshold_gradient(
        x @ W.T + b, own, bandwidth, d_out_of @ W_dec.T, d_l0[:, None].expand(n, d_sae)
    )
    assert wanted.abs().min() > 0 or not scalar
    torch.testing.assert_close(found, wanted.sum() if scalar else wanted)


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("n", [0, 3, 700])
@pytest.mark.parametrize("autocast", [False, True])
def test_encoder_is_threshold_encode(autocast, n, per_feature):
    torch.manual_seed(0)
    x, W, b = torch.randn(2, n, 130), torch.randn(1700, 130, requires_grad=True), torch.randn(1700)
    threshold = 20 + 10 * torch.rand(1700) if per_feature else torch.tensor(25.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        encode = threshold_encoder(W, b, threshold, 30)
        for _ in range(2):
            values, indices = encode(x)
            wanted = threshold_encode(x, W, b, threshold, 30)
            assert not values.requires_grad
            assert values.dtype == wanted[0].dtype
            torch.testing.assert_close(values, wanted[0].detach())
            assert torch.equal(indices, wanted[1])
    with pytest.raises(TypeError, match=r"W_enc: given dtype torch.\w+; needed torch.float64 as x has"):
        encode(x.double())


@pytest.mark.parametrize("dtype", ROUNDING)
def test_wide_values_are_those_of_the_selection(dtype):
    x, W, b = (of.detach() for of in inputs(30, 16, 90, dtype))
    values, indices = threshold_encode_wide(x, W, b, torch.tensor(0.5), 9)
    rounded = threshold_encode(x, W, b, torch.tensor(0.5), 9)
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(indices, rounded[1])
    assert torch.equal(values.to(dtype), rounded[0])


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_encoding_again_is_encoding_what_is_left(dtype, per_feature):
    x, W, b = integers(20, 8, 150)
    a, W_a, _ = integers(20, 5, 150, seed=2)
    x[3, 2] = math.nan
    threshold = torch.randint(0, 12, (150,)).float() if per_feature else torch.tensor(4.0)
    given = [tensor.to(dtype) for tensor in (x, W, b)]
    values, indices, kept = threshold_encode_and_keep(*given, threshold, 6)
    wanted = reference.threshold_encode(x, W, b, threshold, 6)
    assert kept.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(values.float(), wanted[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, wanted[1])
    values, indices = threshold_encode_again(kept, a.to(dtype), W_a.to(dtype), threshold, 6)
    wanted = reference.threshold_encode(torch.cat([x, a], 1), torch.cat([W, -W_a], 1), b, threshold, 6)
    assert values.dtype == dtype
    torch.testing.assert_close(values.float(), wanted[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, wanted[1])


X, W, B, T = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(9), torch.zeros(())


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (([1.0], W, B, T, 3), TypeError, "x: given a list; needed a torch.Tensor"),
        ((X, W.T, B, T, 3), ValueError, "W_enc: given shape [4, 9]; needed [d_sae, d_in] = [any, 4]"),
        ((X, W, B, 0.5, 3), TypeError, "threshold: given a float; needed a torch.Tensor"),
        ((X, W, B, T.double(), 3), TypeError, "threshold: given dtype torch.float64; needed torch.float32"),
        ((X, W, B, B[:5], 3), ValueError, "threshold: given shape [5]; needed [] or [d_sae] = [9]"),
        ((X, W, B, B.to("meta"), 3), ValueError, "threshold: given on meta; needed on cpu as x is"),
        ((X, W, B, T, 0), ValueError, "k_max: given 0; needed 1 <= k_max <= d_sae = 9"),
        ((X, W, B, T, 10), ValueError, "k_max: given 10; needed 1 <= k_max <= d_sae = 9"),
        ((X, W, B, T, 3.0), TypeError, "k_max: given a float; needed an int"),
    ],
)
def test_errors_name_the_argument(args, kind, message):
    with pytest.raises(kind) as error:
        threshold_encode(*args)
    assert message in str(error.value)


@pytest.mark.parametrize("bandwidth", [0, -1.0, math.nan, "1", True])
def test_a_bandwidth_is_a_number_above_zero(bandwidth):
    with pytest.raises(ValueError, match=r"bandwidth: given .*; needed a number above 0"):
        near_threshold(X, W, B, T, bandwidth, 3)
