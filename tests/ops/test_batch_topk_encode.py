import math

import pytest
import torch
from test_threshold_encode import LARGE, ROUNDING, inputs, integers

from csae import reference
from csae.ops import batch_topk_encode
from csae.ops.batch_topk_encode import batch_encode_again, batch_encode_and_keep

# n, d_in, d_sae, k, k_max
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 1, 5, 2, 5),
    (1, 7, 2, 1, 1),
    (17, 33, 65, 3, 8),
    (9, 17, 129, 129, 129),
    (0, 4, 9, 2, 3),
]
SHAPES += [(*LARGE[:3], 4, 12), (40, 3, 1000, 31, 31)]
GUESSES = [None, 0.0, 0.5, 1.0, 3.0, math.inf, -1.0, math.nan]


def equal(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k", "k_max"), SHAPES)
def test_matches_reference_forward_and_every_gradient(n, d_in, d_sae, k, k_max, dtype, masked):
    x, W, b = inputs(n, d_in, d_sae, dtype)
    mask = torch.rand(n) < 0.7 if masked else None
    values, indices, threshold = batch_topk_encode(x, W, b, k, k_max, mask)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, W, b)]
    expected, _, expected_threshold = reference.batch_topk_encode(*wide, k, k_max, mask)
    rounding = ROUNDING[dtype]
    assert values.dtype == dtype
    assert indices.dtype == torch.int64
    assert threshold.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(threshold.double(), expected_threshold.detach(), rtol=1e-5, atol=1e-5)
    pre_acts = wide[0] @ wide[1].T + wide[2]
    chosen = torch.where(values > 0, pre_acts.gather(1, indices), 0)
    torch.testing.assert_close(chosen, values.double(), rtol=rounding, atol=rounding)
    # Near-ties at the border may fall either way.
    torch.testing.assert_close(
        chosen.flatten().sort().values, expected.flatten().sort().values, rtol=rounding, atol=rounding
    )
    assert (indices[values == 0] == 0).all()
    grad = torch.randn(n, k_max).to(dtype)
    found = torch.autograd.grad(values, (x, W, b), grad)
    wanted = torch.autograd.grad(chosen, wide, grad.double())
    for name, got, want in zip(("x", "W_enc", "b_enc"), found, wanted, strict=True):
        tolerance = rounding * max(1.0, want.abs().max().item() if want.numel() else 0)
        torch.testing.assert_close(
            got.double(), want, rtol=rounding, atol=tolerance, msg=lambda m, name=name: f"d {name}: {m}"
        )


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k", "k_max"), SHAPES)
def test_selects_what_the_reference_selects_whatever_the_guess(n, d_in, d_sae, k, k_max, guess):
    """With ties at the border, rows that hit k_max, and rows out of the mask."""
    x, W, b = integers(n, d_in, d_sae)
    mask = torch.rand(n) < 0.7
    guess = None if guess is None else torch.tensor(guess * 2 * math.sqrt(d_in))
    for given in (None, mask, mask & False):
        wanted = reference.batch_topk_encode(x.double(), W.double(), b.double(), k, k_max, given)
        equal(batch_topk_encode(x, W, b, k, k_max, given, guess), wanted)


def test_fewer_positives_than_the_budget():
    x, W, b = integers(30, 6, 40)
    b -= 14
    values, indices, threshold = batch_topk_encode(x, W, b, 5, 9, None, torch.tensor(1.0))
    assert 0 < (values > 0).sum() < 150
    assert threshold == 0
    equal((values, indices, threshold), reference.batch_topk_encode(x, W, b, 5, 9))


@pytest.mark.parametrize("shape", [(30, 6, 40, 5, 9), (*LARGE[:3], 4, 12)])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["x", "masked x", "b_enc"])
def test_nan_and_infinities(shape, special, place):
    x, W, b = integers(*shape[:3])
    W[:, 0] = W[:, 0].sign() + (W[:, 0] == 0)  # no zeros, which would make a NaN of an infinity
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[4:7] = False
    {"x": x[2:4, 0], "masked x": x[4:6, 0], "b_enc": b[3:4]}[place].fill_(special)
    for guess in (None, torch.tensor(2.0 * shape[1] ** 0.5)):
        found = batch_topk_encode(x, W, b, *shape[3:], mask, guess)
        equal(found, reference.batch_topk_encode(x, W, b, *shape[3:], mask))


def test_leading_dimensions():
    x, W, b = integers(12, 6, 40)
    mask = torch.rand(12) < 0.8
    wanted = batch_topk_encode(x, W, b, 3, 8, mask)
    values, indices, threshold = batch_topk_encode(x.view(3, 4, 6), W, b, 3, 8, mask.view(3, 4))
    equal((values.view(12, 8), indices.view(12, 8), threshold), wanted)


def test_the_threshold_of_one_step_is_the_guess_of_the_next():
    x, W, b = (of.detach() for of in inputs(200, 20, 300))
    guess = None
    for step in range(3):
        here = x + 0.01 * step
        found = batch_topk_encode(here, W, b, 4, 16, guess=guess)
        equal(found, batch_topk_encode(here, W, b, 4, 16))
        guess = found[2]
        assert (found[0] > 0).sum() == 800
        assert found[0][found[0] > 0].min() == guess


def test_autocast_computes_in_the_lower_dtype():
    x, W, b = inputs(4, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _, threshold = batch_topk_encode(x, W, b, 2, 3)
    assert values.dtype == torch.bfloat16
    assert threshold.dtype == torch.float32
    values.sum().backward()
    assert x.grad.dtype == W.grad.dtype == b.grad.dtype == torch.float32


def test_opcheck():
    ops = torch.ops.csae
    for x, W, b in (inputs(5, 4, 9), inputs(0, 4, 9)):
        mask = torch.rand(len(x)) < 0.8
        torch.library.opcheck(ops.batch_topk_encode.default, (x, W, b, 2, 4, mask, torch.tensor(0.3)))
        torch.library.opcheck(ops.batch_topk_encode.default, (x, W, b, 2, 4, None, None))
    x, W, b = (tensor.detach() for tensor in inputs(5, 4, 9))
    torch.library.opcheck(ops.batch_encode_and_keep.default, (x, W, b, 2, 3, None, torch.tensor(0.3)))
    kept = batch_encode_and_keep(x, W, b, 2, 3)[3]
    args = (kept, torch.randn(5, 2), torch.randn(9, 2), 2, 3, None, None)
    torch.library.opcheck(ops.batch_encode_again.default, args)


def test_compiles():
    x, W, b = inputs(6, 4, 9)

    def loss(x, W, b, guess):
        values, indices, threshold = batch_topk_encode(x, W, b, 2, 4, None, guess)
        return (values * (indices + 1)).sum(), threshold

    wanted = loss(x, W, b, torch.tensor(0.1))
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, W, b, torch.tensor(0.1))
    equal(found, wanted)
    equal(*(torch.autograd.grad(of[0], (x, W, b)) for of in (found, wanted)))


@pytest.mark.parametrize("guess", [None, 3.0, 100.0])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_encoding_again_is_encoding_what_is_left(dtype, guess):
    x, W, b = integers(20, 8, 150)
    a, W_a, _ = integers(20, 5, 150, seed=2)
    mask = torch.rand(20) < 0.8
    guess = None if guess is None else torch.tensor(guess)
    given = [tensor.to(dtype) for tensor in (x, W, b)]
    *found, kept = batch_encode_and_keep(*given, 3, 9, mask, guess)
    equal(found, reference.batch_topk_encode(x, W, b, 3, 9, mask))
    found = batch_encode_again(kept, a.to(dtype), W_a.to(dtype), 3, 9, mask, guess)
    assert found[0].dtype == dtype
    equal(found, reference.batch_topk_encode(torch.cat([x, a], 1), torch.cat([W, -W_a], 1), b, 3, 9, mask))
    equal([kept], [x @ W.T + b - a @ W_a.T])


X, W, B = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(9)


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (([1.0], W, B, 2, 3), TypeError, "x: given a list; needed a torch.Tensor"),
        ((X, W, B, 2, 10), ValueError, "k_max: given 10; needed 1 <= k_max <= d_sae = 9"),
        ((X, W, B, 4, 3), ValueError, "k: given 4; needed 1 <= k <= k_max = 3"),
        ((X, W, B, 2.5, 3), TypeError, "k: given a float; needed an int"),
        ((X, W, B, 2, 3, torch.ones(2)), TypeError, "mask: given dtype torch.float32; needed torch.bool"),
        ((X, W, B, 2, 3, torch.ones(3) > 0), ValueError, "mask: given shape [3]; needed [...] as x"),
        ((X, W, B, 2, 3, None, 0.5), TypeError, "guess: given a float; needed a torch.Tensor"),
        ((X, W, B, 2, 3, None, B), ValueError, "guess: given shape [9]; needed a scalar = []"),
        ((X, W, B, 2, 3, None, B.sum().double()), TypeError, "guess: given dtype torch.float64; needed torch.float32"),
    ],
)
def test_errors_name_the_argument(args, kind, message):
    with pytest.raises(kind) as error:
        batch_topk_encode(*args)
    assert message in str(error.value)
