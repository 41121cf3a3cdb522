"""Native look-back attention against the reference in float64, forward and every gradient."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from csae import reference
from csae.kernels import cpu
from csae.kernels.cpu import library, lookback_attention
from csae.ops.lookback_attention import document_starts

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))

ROUNDING, ROUNDING_OF_SUMS = 3e-6, 5e-7
NAMES = ("out", "d_q", "d_k", "d_v", "d_slope", "d_null")


def isas() -> list[str]:
    """The sets of instructions that this CPU has."""
    if not cpu.available():
        return []
    return list(library.ISAS[: library.ISAS.index(str(cpu.describe()["isa"])) + 1])


def inputs(B: int, T: int, H: int, d_head: int, d_value: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, d_head), (B, T, H, d_head), (B, T, H, d_value), (H,), (H,))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def holes(B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) > 0.3
    documents = torch.randint(0, 4, (B, T), generator=generator).sort(dim=1).values
    return mask, documents


def native(
    tensors: list[Tensor], mask: Tensor | None, documents: Tensor | None, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """out and the gradients of q, k, v, slope, null."""
    starts = None if documents is None else document_starts(documents)
    out, lse = lookback_attention.forward(*tensors, mask, starts)
    return out, *lookback_attention.backward(grad_out, *tensors, mask, starts, out, lse)


def defined(
    tensors: list[Tensor], mask: Tensor | None, documents: Tensor | None, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """The same by the reference, in float64."""
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    out = reference.lookback_attention(*wide, mask, documents)
    return out.detach(), *torch.autograd.grad(out, wide, grad_out.double())


def assert_defined(
    tensors: list[Tensor],
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    many_terms: bool = False,
) -> None:
    """many_terms: of d_slope and d_null, more than the bounds of fixed shapes allow for."""
    grad_out = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(9))
    found = native(tensors, mask, documents, grad_out)
    sizes = sizes_of_sums(tensors, mask, documents, grad_out)
    for name, got, want in zip(NAMES, found, defined(tensors, mask, documents, grad_out), strict=True):
        assert got.dtype == torch.float32
        largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        bound = torch.tensor((2e-5 if name == "d_slope" else ROUNDING) * largest)
        if name in sizes:
            of_sum = ROUNDING_OF_SUMS * (1 + sizes[name])
            bound = of_sum if many_terms else of_sum.clamp(max=bound.item())
        assert ((got.double() - want).abs() <= bound).all(), f"{name}: {got}, but it is {want}, to {bound}"


def sizes_of_sums(
    tensors: list[Tensor], mask: Tensor | None, documents: Tensor | None, grad_out: Tensor
) -> dict[str, Tensor]:
    """[H] each: how large the terms of d_slope and of d_null are, which nearly cancel.

    Those of one query share the rounding of its softmax, those of different queries don't: so they are added up by
    query, and the sums by the root of their squares. Of 250 random shapes, float32 was off in d_slope by at most
    2.7e-7 of this in the native kernel and by 2.9e-7 in plain PyTorch; of 600, in d_null by 2.4e-7 of one more than
    this, and by 1.8e-7.
    """
    q, k, v, slope, null = (tensor.double() for tensor in tensors)
    t = torch.arange(q.shape[1])
    distance = t[:, None] - t  # [T, T]
    seen = (distance > 0).expand(len(q), 1, -1, -1)
    if mask is not None:
        seen = seen & mask[:, None, None, :] & mask[:, None, :, None]
    if documents is not None:
        starts = document_starts(documents)  # [B, T]
        seen = seen & (t >= starts[:, None, :, None])
    log = distance.clamp(min=1).log()
    scores = torch.einsum("bthd,bjhd->bhtj", q, k) / math.sqrt(q.shape[-1]) - slope[:, None, None] * log
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.cat([scores, null[:, None, None].expand(*scores.shape[:3], 1)], dim=-1).softmax(-1)
    weights, of_null = weights[..., :-1], weights[..., -1]  # [B, H, T, T], [B, H, T]
    d_weights = torch.einsum("bthd,bjhd->bhtj", grad_out.double(), v)
    delta = (weights * d_weights).sum(dim=-1, keepdim=True)
    d_out = (torch.einsum("bhtj,bjhd->bthd", weights, v) * grad_out).abs().sum(dim=-1).transpose(1, 2)  # [B, H, T]
    by_query = {
        "d_slope": (weights * log * (d_weights.abs() + delta.abs())).sum(dim=-1),
        "d_null": of_null * d_out,
    }
    return {name: torch.linalg.vector_norm(sums, dim=(0, 2)) for name, sums in by_query.items()}


# --- the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", ["open", "mask", "documents", "both"])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
def test_every_length(isa: str, T: int, bounds: str) -> None:
    mask, documents = holes(2, T)
    assert_defined(
        inputs(2, T, 3, 8, 17),
        mask if bounds in ("mask", "both") else None,
        documents if bounds in ("documents", "both") else None,
    )


@pytest.mark.parametrize("d_value", [1, 3, 8, 17, 33, 64])
@pytest.mark.parametrize("d_head", [1, 3, 8, 17, 33, 64])
def test_every_width(isa: str, d_head: int, d_value: int) -> None:
    assert_defined(inputs(1, 67, 1, d_head, d_value), *holes(1, 67))


@settings(deadline=None, max_examples=60)
@example(B=2, T=65, H=1, d_head=19, d_value=18, masked=False, divided=False, seed=8605)
@example(B=2, T=137, H=2, d_head=11, d_value=10, masked=True, divided=False, seed=160)
@given(
    B=st.integers(0, 2),
    T=st.one_of(st.integers(0, 20), st.integers(60, 70), st.integers(120, 140)),
    H=st.integers(1, 3),
    d_head=st.integers(1, 20),
    d_value=st.integers(0, 20),
    masked=st.booleans(),
    divided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(B: int, T: int, H: int, d_head: int, d_value: int, masked: bool, divided: bool, seed: int) -> None:
    mask, documents = holes(B, T, seed)
    tensors = inputs(B, T, H, d_head, d_value, seed)
    # With as many terms as there may be here, float32 is off by more.
    assert_defined(tensors, mask if masked else None, documents if divided else None, many_terms=True)


def test_lse_is_the_log_of_the_denominator(isa: str) -> None:
    q, k, v, slope, null = inputs(2, 70, 2, 4, 5)
    lse = lookback_attention.forward(q, k, v, slope, null, None, None)[1]
    # The weights add up to one: with v = 1 the output is the share that is not null's.
    share = reference.lookback_attention(*(x.double() for x in (q, k, torch.ones_like(v), slope, null)))[..., 0]
    torch.testing.assert_close(
        lse.double().exp() * (1 - share.transpose(1, 2)),
        null.double().exp()[:, None].expand(2, 2, 70),
        rtol=1e-5,
        atol=0,
    )


def test_starts_may_be_any_number(isa: str) -> None:
    tensors = inputs(1, 130, 2, 4, 5)
    starts = torch.randint(-200, 300, (1, 130), dtype=torch.int32)
    starts[0, :4] = torch.tensor([2**31 - 1, -(2**31), 0, 130])
    out, lse = lookback_attention.forward(*tensors, None, starts)
    gradients = lookback_attention.backward(torch.ones_like(out), *tensors, None, starts, out, lse)
    q, k, v, slope, null = (x.double().requires_grad_() for x in tensors)
    t = torch.arange(130)
    distance = t[:, None] - t
    scores = torch.einsum("bthd,bjhd->bhtj", q, k) / 2 - slope[:, None, None] * distance.clamp(min=1).log()
    scores = scores.masked_fill((distance <= 0) | (t < starts[0, :, None]), -math.inf)
    scores = torch.cat([scores, null[None, :, None, None].expand(1, 2, 130, 1)], dim=-1)
    want = torch.einsum("bhtj,bjhd->bthd", scores.softmax(-1)[..., :-1], v)
    torch.testing.assert_close(out.double(), want.detach(), rtol=0, atol=ROUNDING)
    for got, wanted in zip(gradients, torch.autograd.grad(want.sum(), (q, k, v, slope, null)), strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5 * scale)


def test_a_masked_query_gets_nothing_and_gives_nothing(isa: str) -> None:
    tensors = inputs(2, 70, 2, 4, 5)
    mask = holes(2, 70)[0]
    out, lse = lookback_attention.forward(*tensors, mask, None)
    assert (out[~mask] == 0).all()
    null = tensors[4].expand(2, 70, 2)
    assert torch.equal(lse.transpose(1, 2)[~mask], null[~mask])
    d_q, d_k, d_v, _, _ = lookback_attention.backward(torch.ones_like(out), *tensors, mask, None, out, lse)
    assert all((gradient[~mask] == 0).all() for gradient in (d_q, d_k, d_v))


@pytest.mark.parametrize("null", [-200.0, 0.0, 200.0, -math.inf])
def test_any_null(isa: str, null: float) -> None:
    tensors = inputs(1, 70, 1, 4, 5)
    tensors[4].fill_(null)
    out = lookback_attention.forward(*tensors, None, None)[0]
    want = reference.lookback_attention(*(x.double() for x in tensors))
    torch.testing.assert_close(out.double(), want, rtol=0, atol=ROUNDING, equal_nan=True)
    assert out[0, 0].isnan().all() == (null == -math.inf)  # then position 0 has nothing at all


def test_weights_are_exact_to_a_few_ulp(isa: str) -> None:
    # One key, value 1: out = 1 / (1 + exp(null - score)), which is exp(score - null) where that is small.
    scores = torch.linspace(-86, -20, 5000)
    k = torch.ones(5000, 2, 1, 1)
    q, v = scores[:, None, None, None].expand(5000, 2, 1, 1), torch.ones(5000, 2, 1, 1)
    out = lookback_attention.forward(q, k, v, torch.zeros(1), torch.zeros(1), None, None)[0][:, 1, 0, 0]
    torch.testing.assert_close(out.double(), scores.double().exp(), rtol=4e-7, atol=0)


def test_large_scores(isa: str) -> None:
    q, k, v, slope, null = inputs(1, 130, 2, 4, 5)
    tensors = [q * 1e4, k * 1e3, v, slope, null]
    grad_out = torch.ones_like(v)
    found = native(tensors, None, None, grad_out)
    assert all(tensor.isfinite().all() for tensor in found)
    want = reference.lookback_attention(*(x.double() for x in tensors))
    torch.testing.assert_close(found[0].double(), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("d_value", [3, 33])
def test_a_weight_of_one_leaves_no_gradient_to_its_score(isa: str, d_value: int) -> None:
    # Each query sees one key far above all others: out is exactly its value.
    tensors = inputs(1, 70, 1, 70, d_value)
    tensors[0][0, :, 0] = 1e6 * torch.eye(70)
    tensors[1][0, :, 0] = torch.eye(70).roll(1, dims=1)
    grad_out = torch.randn(1, 70, 1, d_value)
    out, d_q, d_k, *_ = native(tensors, None, None, grad_out)
    assert torch.equal(out[0, 1:], tensors[2][0, :-1])
    assert (d_q == 0).all()
    assert (d_k == 0).all()


# --- NaN and infinity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [3, 63, 70])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_bad_key_or_value_reaches_those_that_look_at_it(isa: str, name: str, value: float, position: int) -> None:
    tensors = inputs(1, 140, 1, 3, 4)
    good = lookback_attention.forward(*tensors, None, None)[0]
    tensors["qkv".index(name)][0, position] = value
    out = lookback_attention.forward(*tensors, None, None)[0]
    # Sums over finite values only; they are rounded in another way where a tile has others.
    torch.testing.assert_close(out[:, : position + 1], good[:, : position + 1], rtol=0, atol=ROUNDING)
    if name == "v" or math.isnan(value):  # an infinite key has score infinity or -infinity: the latter is no error
        assert not out[:, position + 1 :].isfinite().any()
    # Another document doesn't look at it, and neither does anyone where it is out of the mask.
    documents = (torch.arange(140) > position)[None]
    found = lookback_attention.forward(*tensors, None, document_starts(documents))[0]
    assert found.isfinite().all()
    mask = torch.arange(140)[None] != position
    grad_out = torch.ones_like(out)
    assert all(tensor.isfinite().all() for tensor in native(tensors, mask, None, grad_out))


@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out"])
def test_nan_is_in_each_gradient_that_it_belongs_to_and_in_no_other_position(isa: str, name: str) -> None:
    tensors = inputs(1, 140, 1, 3, 4)
    grad_out = torch.ones(1, 140, 1, 4)
    bad = 70
    dict(zip(("q", "k", "v", "grad_out"), [*tensors[:3], grad_out], strict=True))[name][0, bad] = math.nan
    _, d_q, d_k, d_v, d_slope, d_null = native(tensors, None, None, grad_out)
    nan_q, nan_k, nan_v = (gradient.isnan().any(dim=-1)[0, :, 0] for gradient in (d_q, d_k, d_v))
    t = torch.arange(140)
    if name in ("q", "grad_out"):  # a query: itself, and the keys before it
        assert torch.equal(nan_q, t == bad)
        assert torch.equal(nan_k, t < bad)
        assert torch.equal(nan_v, t < bad)
    else:  # a key or value: the queries after it, and all that they see, which is every position but the last
        assert torch.equal(nan_q, t > bad)
        assert torch.equal(nan_k, t < 139)
        assert torch.equal(nan_v, (t < 139) if name == "k" else torch.zeros(140, dtype=torch.bool))
    assert d_slope.isnan().all()
    assert d_null.isnan().all()


@pytest.mark.parametrize("index", [3, 4])
def test_a_nan_slope_or_null_is_nan_out(isa: str, index: int) -> None:
    tensors = inputs(1, 70, 2, 3, 4)
    tensors[index][1] = math.nan
    out = lookback_attention.forward(*tensors, None, None)[0]
    assert out[:, 1:, 1].isnan().all()
    assert out[:, :, 0].isfinite().all()


# --- strides, threads, instructions ----------------------------------------------------------------------


def test_keys_and_values_from_one_table() -> None:
    q, k, v, slope, null = inputs(2, 70, 3, 5, 6)
    table = torch.cat([k.flatten(2), v.flatten(2)], dim=-1)
    strided_k, strided_v = table[..., :15].unflatten(-1, (3, 5)), table[..., 15:].unflatten(-1, (3, 6))
    assert not strided_k.is_contiguous()
    grad_out = torch.randn(2, 70, 3, 6)
    mask, documents = holes(2, 70)
    found = native([q, strided_k, strided_v, slope, null], mask, documents, grad_out)
    for got, want in zip(found, native([q, k, v, slope, null], mask, documents, grad_out), strict=True):
        assert torch.equal(got, want)


def test_any_strides() -> None:
    tensors = inputs(2, 70, 3, 5, 6)
    mask, documents = holes(2, 70)
    grad_out = torch.ones(2, 70, 3, 6)
    wanted = native(tensors, mask, documents, grad_out)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors[:3]]
    turned += [torch.stack([x, x], dim=-1)[:, 0] for x in tensors[3:]]
    starts = document_starts(documents).T.contiguous().T
    mask = mask.T.contiguous().T
    expanded = torch.ones(1).expand(2, 70, 3, 6)
    out, lse = lookback_attention.forward(*turned, mask, starts)
    out, lse = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (out, lse))
    found = out, *lookback_attention.backward(expanded, *turned, mask, starts, out, lse)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(3, 130, 3, 8, 9), (1, 200, 1, 8, 9)])
def test_same_bits_for_any_number_of_threads(isa: str, shape: tuple[int, ...]) -> None:
    tensors = inputs(*shape)
    mask, documents = holes(*shape[:2])
    grad_out = torch.randn(tensors[2].shape)
    torch.set_num_threads(1)
    wanted = native(tensors, mask, documents, grad_out)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for got, want in zip(native(tensors, mask, documents, grad_out), wanted, strict=True):
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))


# --- what is refused -------------------------------------------------------------------------------------

SHAPE = (2, 5, 3, 4, 6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": 3}, TypeError, "q: given int; needed a torch.Tensor"),
        ({"q": torch.zeros(2, 5, 3, 4).double()}, TypeError, "q: given torch.float64; needed torch.float32"),
        ({"q": torch.zeros(2, 5, 3)}, ValueError, "q: given shape [2, 5, 3]; needed [any, any, any, any]"),
        ({"q": torch.zeros(2, 5, 3, 0)}, ValueError, "q: given shape [2, 5, 3, 0]; needed d_head of 1 or more"),
        ({"k": torch.zeros(2, 5, 3, 5)}, ValueError, "k: given shape [2, 5, 3, 5]; needed [2, 5, 3, 4]"),
        ({"v": torch.zeros(2, 4, 3, 6)}, ValueError, "v: given shape [2, 4, 3, 6]; needed [2, 5, 3, any]"),
        ({"v": torch.zeros(2, 5, 3, 6, device="meta")}, ValueError, "v: given a torch.strided tensor on meta"),
        ({"slope": torch.zeros(2)}, ValueError, "slope: given shape [2]; needed [3]"),
        ({"null": torch.zeros(3, 1)}, ValueError, "null: given shape [3, 1]; needed [3]"),
        ({"mask": torch.zeros(2, 5)}, TypeError, "mask: given torch.float32; needed torch.bool"),
        ({"mask": torch.zeros(5).bool()}, ValueError, "mask: given shape [5]; needed [2, 5]"),
        ({"starts": torch.zeros(2, 5).long()}, TypeError, "starts: given torch.int64; needed torch.int32"),
        ({"grad_out": torch.zeros(2, 5, 3, 5)}, ValueError, "grad_out: given shape [2, 5, 3, 5]; needed [2, 5, 3, 6]"),
        ({"out": torch.zeros(2, 5, 3, 5)}, ValueError, "out: given shape [2, 5, 3, 5]; needed [2, 5, 3, 6]"),
        ({"lse": torch.zeros(2, 5, 3)}, ValueError, "lse: given shape [2, 5, 3]; needed [2, 3, 5]"),
    ],
)
def test_errors_name_the_argument(changed: dict[str, object], error: type[Exception], message: str) -> None:
    tensors = dict(zip(("q", "k", "v", "slope", "null"), inputs(*SHAPE), strict=True))
    arguments = {**tensors, "mask": None, "starts": None}
    backward = {"grad_out": torch.zeros(2, 5, 3, 6), "out": torch.zeros(2, 5, 3, 6), "lse": torch.zeros(2, 3, 5)}
    with pytest.raises(error) as raised:
        lookback_attention.backward(**(backward | arguments | changed))
    assert message in str(raised.value)
    if not changed.keys() & backward.keys():
        with pytest.raises(error) as raised:
            lookback_attention.forward(**(arguments | changed))
        assert message in str(raised.value)


@pytest.mark.parametrize("field", ["B", "T", "H", "d_head", "d_value", "k.stride_t", "v.x", "slope"])
def test_the_library_refuses_what_makes_no_sense(field: str) -> None:
    tensors = inputs(*SHAPE)
    heads = [library.Heads(x.data_ptr(), *x.stride()[:3]) for x in tensors[:3]]
    given = library.Attention(*heads, tensors[3].data_ptr(), tensors[4].data_ptr(), None, None, *SHAPE)
    out, lse = torch.empty(2, 5, 3, 6), torch.empty(2, 3, 5)
    call = library.native().csae_lookback_forward
    assert call(ctypes.byref(given), out.data_ptr(), lse.data_ptr(), 1) == 0
    assert call(ctypes.byref(given), out.data_ptr(), lse.data_ptr(), 0) != 0
    assert call(ctypes.byref(given), None, lse.data_ptr(), 1) != 0
    owner, _, name = field.rpartition(".")
    setattr(getattr(given, owner) if owner else given, name, None if name in ("x", "slope") else -1)
    assert call(ctypes.byref(given), out.data_ptr(), lse.data_ptr(), 1) != 0
