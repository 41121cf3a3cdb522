"""The Triton look-back attention against the reference and its gradients in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, DTYPES, eps, needs_triton, only_listed_variants, random_normal

from csae import reference

pytestmark = needs_triton

SHAPES = [  # B, T, H, d_head, d_value
    pytest.param(1, 1, 1, 1, 1, id="one position"),
    pytest.param(1, 2, 1, 8, 8, id="two positions"),
    pytest.param(2, 3, 3, 5, 7, id="tiny"),
    pytest.param(1, 66, 1, 8, 8, id="a block of keys and two positions"),
    pytest.param(2, 17, 2, 16, 8, id="one block"),
    pytest.param(1, 129, 2, 17, 65, id="a block of queries and one position"),
    pytest.param(1, 65, 1, 33, 129, id="wide values"),
    pytest.param(1, 40, 1, 200, 3, id="wide heads"),
    pytest.param(1, 300, 1, 8, 8, id="several blocks", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import lookback_attention

    only_listed_variants(lookback_attention, monkeypatch)


def inputs(B: int, T: int, H: int, d_head: int, d_value: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "q": random_normal(B, T, H, d_head, dtype=dtype, seed=1),
        "k": random_normal(B, T, H, d_head, dtype=dtype, seed=2),
        "v": random_normal(B, T, H, d_value, dtype=dtype, seed=3),
        "slope": random_normal(H, dtype=dtype, seed=4).abs(),
        "null": random_normal(H, dtype=dtype, seed=5),
    }


def some_mask(B: int, T: int) -> Tensor:
    """A tenth of the positions left out, among them the first of the first window."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(6)) > 0.1
    mask[0, 0] = False
    return mask.to(DEVICE)


def some_documents(B: int, T: int) -> Tensor:
    """Documents of 20 positions on average; the ids come back."""
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(7)) < 0.05
    return (begins.cumsum(1) % 3).to(DEVICE)


def magnitudes(grad: Tensor, wide: dict[str, Tensor], mask: Tensor | None, documents: Tensor | None) -> list[Tensor]:
    """For out and each gradient, the sum of the magnitudes of the terms that it is a sum of: what errors are
    relative to. In float64."""
    q, k, v = wide["q"], wide["k"], wide["v"]
    B, T, H, d_head = q.shape
    # With the unit vectors as values, the output is the weights [B, T, H, T].
    unit = torch.eye(T, dtype=torch.float64, device=q.device)[None, :, None].expand(B, T, H, T)
    weights = reference.lookback_attention(q, k, unit, wide["slope"], wide["null"], mask, documents)
    dweights = torch.einsum("bthd,bjhd->bthj", grad.abs(), v.abs())
    delta = (weights * dweights).sum(-1, keepdim=True)
    dscores = weights * (dweights + delta)
    position = torch.arange(T, device=q.device)
    log_distance = (position[:, None] - position[None]).clamp(min=1).double().log()
    # The weight of the null score, from the largest one: 1 - their sum would be rounding where the null score is low.
    scores = torch.einsum("bthd,bjhd->bthj", q, k) / math.sqrt(d_head) - wide["slope"][:, None] * log_distance[:, None]
    largest, at = weights.max(-1, keepdim=True)
    nothing = torch.where(largest > 0, largest * (wide["null"][:, None] - scores.gather(-1, at)).exp(), 1.0)
    return [
        torch.einsum("bthj,bjhd->bthd", weights, v.abs()),
        torch.einsum("bthj,bjhd->bthd", dscores, k.abs()) / math.sqrt(d_head),
        torch.einsum("bthj,bthd->bjhd", dscores, q.abs()) / math.sqrt(d_head),
        torch.einsum("bthj,bthd->bjhd", weights, grad.abs()),
        (dscores * log_distance[None, :, None]).sum((0, 1, 3)),
        (nothing * delta)[..., 0].sum((0, 1)),
    ]


def assert_equals_reference(
    tensors: dict[str, Tensor], mask: Tensor | None = None, documents: Tensor | None = None
) -> list[Tensor]:
    from csae.kernels.triton import lookback_attention

    dtype = tensors["q"].dtype
    wide = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    want_out = reference.lookback_attention(**wide, mask=mask, documents=documents)
    grad = random_normal(*want_out.shape, dtype=dtype, seed=8)
    wants = [want_out.detach(), *torch.autograd.grad(want_out, list(wide.values()), grad.double())]
    with torch.no_grad():
        terms = magnitudes(grad.double(), wide, mask, documents)

    starts = None if documents is None else reference.document_starts(documents).to(torch.int32)
    out, lse = lookback_attention.forward(*tensors.values(), mask, starts)
    gradients = lookback_attention.backward(grad, *tensors.values(), mask, starts, out, lse)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert [tensor.dtype for tensor in gradients] == [tensor.dtype for tensor in tensors.values()]
    # In 16 bits the roundings are those of the weights or their gradients, of out (in delta), and of the result. In
    # float32 they are those of 2^x and of the scores: a score of size s is off by s * eps.
    largest_score = 16 + float(wide["null"].detach().abs().max()) if lse.numel() else 0.0
    rounding = (3 if dtype != torch.float32 else largest_score) * eps(dtype)
    for name, got, want, magnitude in zip(("out", *tensors), (out, *gradients), wants, terms, strict=True):
        error = (got.double() - want).abs()
        assert got.shape == want.shape
        assert (error <= rounding * magnitude).all(), f"{name}: {(error / magnitude).nan_to_num().max() / eps(dtype)}"
    return [out, lse, *gradients]


def lookback_forward_and_backward(tensors: dict[str, Tensor]) -> None:
    from csae.kernels.triton import lookback_attention

    out, lse = lookback_attention.forward(*tensors.values(), None, None)
    lookback_attention.backward(torch.ones_like(out), *tensors.values(), None, None, out, lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "H", "d_head", "d_value"), SHAPES)
def test_equals_reference(B: int, T: int, H: int, d_head: int, d_value: int, dtype: torch.dtype) -> None:
    assert_equals_reference(inputs(B, T, H, d_head, d_value, dtype))


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "mask"])
def test_mask_and_documents(mask: bool, documents: bool) -> None:
    B, T = 2, 100
    assert_equals_reference(
        inputs(B, T, 2, 8, 8, torch.float32),
        some_mask(B, T) if mask else None,
        some_documents(B, T) if documents else None,
    )


def test_a_document_that_begins_amid_blocks_that_are_seen_whole() -> None:
    T = 200
    documents = (torch.arange(T, device=DEVICE) >= 70).long()[None]
    assert_equals_reference(inputs(1, T, 1, 4, 4, torch.float32), some_mask(1, T), documents)


@pytest.mark.slow
def test_documents_that_end_at_blocks_and_inside_them() -> None:
    T = 290
    for begins in ([64, 128], [63, 129], [1, 2, 289], list(range(T))):
        documents = torch.zeros(1, T, dtype=torch.int64, device=DEVICE)
        documents[0, begins] = 1
        assert_equals_reference(inputs(1, T, 1, 4, 4, torch.float32), some_mask(1, T), documents.cumsum(1))


def test_lse_is_of_the_scores_and_the_null_score() -> None:
    tensors = inputs(1, 70, 2, 8, 8, torch.float32)
    mask = some_mask(1, 70)
    _, lse, *_ = assert_equals_reference(tensors, mask)
    # weight of the null slot = exp(null - lse)
    ones = torch.ones(1, 70, 2, 1, dtype=torch.float64, device=DEVICE)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    weight = 1 - reference.lookback_attention(**{**wide, "v": ones}, mask=mask)[..., 0].transpose(1, 2)
    torch.testing.assert_close((wide["null"][None, :, None] - lse).exp(), weight, rtol=1e-5, atol=1e-5)


def test_a_masked_position_gives_nothing_and_takes_nothing() -> None:
    tensors = inputs(1, 20, 1, 8, 8, torch.float32)
    mask = torch.ones(1, 20, dtype=torch.bool, device=DEVICE)
    mask[0, [0, 7, 19]] = False
    out, lse, dq, dk, dv, *_ = assert_equals_reference(tensors, mask)
    for tensor in (out, dq, dk, dv):
        assert (tensor[~mask] == 0).all()
    torch.testing.assert_close(lse[:, 0][~mask], tensors["null"].expand(3))


def test_all_positions_masked() -> None:
    out, *_, dslope, dnull = assert_equals_reference(
        inputs(2, 5, 2, 8, 8, torch.float32), torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
    )
    assert (out == 0).all()
    assert (dslope == 0).all()
    assert (dnull == 0).all()


@pytest.mark.parametrize("null", [-60.0, 60.0])
def test_null_scores_far_from_the_others(null: float) -> None:
    tensors = inputs(1, 33, 1, 8, 8, torch.float32)
    assert_equals_reference({**tensors, "null": torch.full_like(tensors["null"], null)})


def test_keys_and_values_side_by_side_in_one_tensor_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import lookback_attention

    both = random_normal(2, 19, 2 * 8 + 2 * 12, seed=9)
    k, v = both[..., :16].unflatten(-1, (2, 8)), both[..., 16:].unflatten(-1, (2, 12))
    q = random_normal(2, 2, 8, 19, seed=10).permute(0, 3, 1, 2)
    assert lookback_attention._in_units(k) is k
    assert lookback_attention._in_units(v) is v
    assert_equals_reference({**inputs(2, 19, 2, 8, 12, torch.float32), "q": q, "k": k, "v": v})


@pytest.mark.parametrize("shape", [(0, 5, 2, 8, 8), (2, 0, 2, 8, 8)], ids=["no windows", "no positions"])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    from csae.kernels.triton import lookback_attention

    tensors = inputs(*shape, torch.float32)
    out, lse = lookback_attention.forward(*tensors.values(), None, None)
    assert out.shape == tensors["v"].shape
    gradients = lookback_attention.backward(out, *tensors.values(), None, None, out, lse)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors.values()]
    assert (gradients[3] == 0).all()


def test_heads_wider_than_the_tiles() -> None:
    assert_equals_reference(inputs(1, 9, 1, 300, 4, torch.float32))


@pytest.mark.parametrize(("d", "wanted"), [(64, "tf32"), (65, "ieee")])
def test_what_tiles_of_the_tensor_cores_do_not_hold_is_multiplied_in_float32(
    d: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csae.kernels.triton import lookback_attention
    from csae.kernels.triton.variant import Variant

    launch, precisions = Variant.launch, set()

    def record(self: Variant, *arguments: Any) -> None:
        precisions.add(self.constants["PRECISION"])
        launch(self, *arguments)

    monkeypatch.setattr(Variant, "launch", record)
    monkeypatch.setattr(lookback_attention, "dot_precision", lambda dtype: "tf32")
    tensors = inputs(1, 20, 1, d, 8, torch.float32)
    if DEVICE == "cpu":  # the interpreter multiplies in float32 all the same
        assert_equals_reference(tensors)
    else:
        lookback_forward_and_backward(tensors)
    assert precisions == {wanted}


def test_every_candidate_of_the_tuner_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import lookback_attention, tuning

    tensors = inputs(1, 140, 1, 8, 8, torch.float16)
    defaults = [v for v in lookback_attention.variants() if v.tensors["q_ptr"] == torch.float16]
    defaults = [v for v in defaults if v.constants["SIZE"] == 16]
    assert len(defaults) == 3
    offered = [lookback_attention.candidates(variant) for variant in defaults]
    monkeypatch.setattr(lookback_attention, "variants", lambda: [other for of in offered for other in of])
    for others in list(zip(*offered, strict=True))[:: 4 if DEVICE == "cuda" else 8]:
        entries = {
            str(default): tuning.changes(default, other) for default, other in zip(defaults, others, strict=True)
        }
        monkeypatch.setitem(tuning.table(), tuning.device_name(torch.device(DEVICE)), entries)
        assert_equals_reference(tensors, some_mask(1, 140))


def test_the_same_bits_twice() -> None:
    tensors = inputs(1, 129, 2, 8, 8, torch.float32)
    first, second = assert_equals_reference(tensors), assert_equals_reference(tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_in_nan_out() -> None:
    from csae.kernels.triton import lookback_attention

    tensors = inputs(1, 20, 1, 8, 8, torch.float32)
    tensors["q"][0, 5] = math.nan
    out, _ = lookback_attention.forward(*tensors.values(), None, None)
    assert out[0, 5].isnan().all()
    assert not out[0, torch.arange(20) != 5].isnan().any()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_slope_and_null_in_float32(dtype: torch.dtype) -> None:
    """Beside narrower queries, as autocast leaves them: their gradients are in float32 too."""
    tensors = inputs(2, 40, 2, 16, 16, dtype)
    tensors |= {name: of.float() * 1.001 for name, of in tensors.items() if name in ("slope", "null")}
    assert_equals_reference(tensors, some_mask(2, 40), some_documents(2, 40))
