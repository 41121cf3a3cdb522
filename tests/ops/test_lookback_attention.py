import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csae import reference
from csae.ops import lookback_attention
from csae.ops.lookback_attention import document_starts

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
NAMES = ("q", "k", "v", "slope", "null")
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 3, 4, 5), (1, 2, 1, 3, 2), (2, 17, 3, 5, 7), (3, 65, 2, 33, 16), (1, 130, 1, 8, 8)]


def inputs(B, T, H, d_head, d_value, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = ((B, T, H, d_head), (B, T, H, d_head), (B, T, H, d_value), (H,), (H,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def holes(B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) > 0.3
    documents = torch.randint(0, 3, (B, T), generator=generator).sort(dim=1).values
    return mask, documents


def check(tensors, mask, documents, tolerance):
    out = lookback_attention(*tensors, mask, documents)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = reference.lookback_attention(*wide, mask, documents)
    assert out.dtype == tensors[2].dtype
    grad = torch.randn(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, tensors, grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    names = ("out", *(f"d {name}" for name in NAMES))
    for name, got, want in zip(names, (out, *found), (expected, *wanted), strict=True):
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("bounds", [False, True], ids=["open", "mask+documents"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_forward_and_every_gradient(shape, dtype, bounds):
    mask, documents = holes(*shape[:2]) if bounds else (None, None)
    check(inputs(*shape, dtype), mask, documents, ROUNDING[dtype])


@settings(deadline=None, max_examples=40)
@given(
    B=st.integers(0, 3),
    T=st.integers(1, 12),
    H=st.integers(1, 3),
    d_head=st.integers(1, 6),
    d_value=st.integers(1, 6),
    masked=st.booleans(),
    divided=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_boundary(B, T, H, d_head, d_value, masked, divided, strided, seed):
    tensors = inputs(B, T, H, d_head, d_value, seed=seed)
    mask, documents = holes(B, T, seed)
    if strided:  # as they come from one table [W_K | W_V], or transposed
        tensors[0] = tensors[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        tensors[1] = torch.cat([tensors[1], tensors[1]], dim=-1).detach()[..., :d_head].requires_grad_()
    check(tensors, mask if masked else None, documents if divided else None, 2e-5)


def test_many_blocks_give_what_one_gives(monkeypatch):
    from csae.kernels.portable import lookback_attention as portable

    monkeypatch.setattr(portable, "WORKSPACE_BYTES", 4 * 2 * 2 * 29 * 5)
    check(inputs(2, 29, 2, 4, 3), *holes(2, 29), 2e-5)


def test_position_zero_sees_nothing_and_nobody_sees_the_future():
    tensors = inputs(1, 6, 2, 3, 4)
    before = lookback_attention(*tensors)
    assert before[:, 0].abs().max() == 0
    changed = [tensor.detach().clone() for tensor in tensors]
    for tensor in changed[:3]:
        tensor[:, 4:] += 1
    after = lookback_attention(*changed)
    assert torch.equal(after[:, :4], before[:, :4])
    # Position 4 has a query of its own, but keys and values only from before: strictly earlier.
    changed[0] = tensors[0].detach()
    assert torch.equal(lookback_attention(*changed)[:, 4], before[:, 4])


def test_a_document_that_returns_is_a_new_one():
    tensors = inputs(1, 6, 1, 3, 4)
    out = lookback_attention(*tensors, documents=torch.tensor([[7, 7, 2, 2, 7, 7]]))
    assert out[0, [0, 2, 4]].abs().max() == 0
    alone = lookback_attention(*(tensor[:, 4:] if tensor.dim() == 4 else tensor for tensor in tensors))
    torch.testing.assert_close(out[:, 4:], alone)


def test_masked_positions_are_neither_looked_at_nor_looking():
    tensors = inputs(1, 7, 2, 3, 4)
    mask = torch.tensor([[True, False, True, True, False, True, True]])
    out = lookback_attention(*tensors, mask)
    assert out[0, [1, 4]].abs().max() == 0
    with torch.no_grad():
        for tensor in tensors[:3]:
            tensor[:, ~mask[0]] = 100.0
    assert torch.equal(lookback_attention(*tensors, mask), out)


def test_large_scores_do_not_overflow():
    tensors = inputs(1, 9, 1, 4, 4)
    with torch.no_grad():
        tensors[0] *= 1e4
        tensors[1] *= 1e3
    check(tensors, None, None, 1e-3)  # rounding a score near 1e7 moves it by about 1: only clear winners agree
    assert lookback_attention(*tensors).isfinite().all()


def test_gradcheck():
    tensors = inputs(2, 5, 2, 3, 2, torch.float64)
    mask, documents = holes(2, 5)
    assert torch.autograd.gradcheck(lambda *args: lookback_attention(*args, mask, documents), tensors)


def test_nan_reaches_the_positions_that_look_at_it():
    tensors = inputs(1, 5, 1, 3, 4)
    with torch.no_grad():
        tensors[1][0, 2] = math.nan
    out = lookback_attention(*tensors)
    assert out[0, 3:].isnan().all()
    assert out[0, :3].isfinite().all()


def test_autocast():
    tensors = inputs(1, 5, 2, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lookback_attention(*tensors)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slope_and_null_stay_in_float32(dtype):
    """Under autocast, and where they are given so: not rounded, and with gradients that are not."""
    tensors = [tensor.detach().float() for tensor in inputs(2, 9, 3, 4, 6)]
    found = []
    for form in (tensors, [*(of.to(dtype) for of in tensors[:3]), *tensors[3:]]):
        leaves = [of.clone().requires_grad_() for of in form]
        with torch.autocast("cpu", dtype=dtype, enabled=form is tensors):
            out = lookback_attention(*leaves)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        assert [of.dtype for of in grads] == [of.dtype for of in form]
        found.append([out, *grads[3:]])
    wide = [of.to(dtype).double().requires_grad_() for of in tensors[:3]]
    wide += [of.double().requires_grad_() for of in tensors[3:]]
    wanted = reference.lookback_attention(*wide)
    expected = [wanted, *torch.autograd.grad(wanted.square().sum(), wide)[3:]]
    for one, other, want in zip(*found, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (3, 1), (3, 2), (4, 40)])
def test_where_documents_begin(B, T, kind):
    documents = torch.randint(0, 3, (B, T), generator=torch.Generator().manual_seed(0)).to(kind)
    wanted = [[0] * T for _ in range(B)]
    for b in range(B):
        for t in range(1, T):
            wanted[b][t] = wanted[b][t - 1] if documents[b, t] == documents[b, t - 1] else t
    found = document_starts(documents)
    assert found.dtype == torch.int32
    assert found.shape == (B, T)
    assert found.tolist() == wanted


def test_opcheck():
    mask, documents = holes(2, 5)
    starts = reference.document_starts(documents).int()
    for B in (2, 0):
        tensors = inputs(B, 5, 2, 3, 4)
        torch.library.opcheck(torch.ops.csae.lookback_attention.default, (*tensors, mask[:B], starts[:B]))
    tensors = inputs(2, 5, 2, 3, 4)
    torch.library.opcheck(torch.ops.csae.lookback_attention.default, (*tensors, None, None))
    tensors = [tensor.detach() for tensor in tensors]
    out, lse = torch.ops.csae.lookback_attention(*tensors, mask, starts)
    args = (torch.ones_like(out), *tensors, mask, starts, out, lse)
    torch.library.opcheck(torch.ops.csae.lookback_attention_backward.default, args)


def args_with(**changed):
    args = dict(zip(NAMES, (t.detach() for t in inputs(2, 5, 3, 4, 6)), strict=True))
    return args | changed


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"q": 3}, TypeError, "q: given a int; needed a torch.Tensor"),
        ({"q": torch.zeros(2, 5, 3)}, ValueError, "q: given shape [2, 5, 3]; needed [B, T, H, d_head]"),
        (
            {"k": torch.zeros(2, 5, 3, 5)},
            ValueError,
            "k: given shape [2, 5, 3, 5]; needed [B, T, H, d_head] = [2, 5, 3, 4]",
        ),
        (
            {"v": torch.zeros(2, 4, 3, 6)},
            ValueError,
            "v: given shape [2, 4, 3, 6]; needed [B, T, H, d_value] = [2, 5, 3, any]",
        ),
        (
            {"v": torch.zeros(2, 5, 3, 6).half()},
            TypeError,
            "v: given dtype torch.float16; needed torch.float32 as q has",
        ),
        (
            {"slope": torch.zeros(3).half()},
            TypeError,
            "slope: given dtype torch.float16; needed torch.float32 as q has",
        ),
        ({"null": torch.zeros(3).double()}, TypeError, "null: given dtype torch.float64; needed torch.float32"),
        ({"null": torch.zeros(3, device="meta")}, ValueError, "null: given on meta; needed on cpu as q is"),
        ({"slope": torch.zeros(2)}, ValueError, "slope: given shape [2]; needed [H] = [3]"),
        ({"null": torch.zeros(4)}, ValueError, "null: given shape [4]; needed [H] = [3]"),
        ({"mask": torch.ones(2, 5)}, TypeError, "mask: given dtype torch.float32; needed torch.bool"),
        ({"mask": torch.ones(5).bool()}, ValueError, "mask: given shape [5]; needed [B, T] = [2, 5]"),
        ({"documents": torch.ones(2, 5)}, TypeError, "documents: given dtype torch.float32; needed integer ids"),
        ({"documents": torch.ones(2, 6).int()}, ValueError, "documents: given shape [2, 6]; needed [B, T] = [2, 5]"),
        ({"mask": torch.ones(2, 5, device="meta").bool()}, ValueError, "mask: given on meta; needed on cpu as q is"),
    ],
)
def test_errors_name_the_argument(changed, kind, message):
    with pytest.raises(kind) as error:
        lookback_attention(**args_with(**changed))
    assert message in str(error.value)
