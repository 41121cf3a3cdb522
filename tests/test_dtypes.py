"""Activations and weights of any two floating dtypes, by the rule in `SAE`'s docstring, with and without autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from csae import SAE, Code, ContextualSAE, Output, TopKSAE, reference
from csae.attribution import attribute
from csae.interop.dense import DenseSAE

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}


def make(kind: str, scale: float = 1.7) -> SAE:
    torch.manual_seed(0)
    if kind == "topk":
        sae: SAE = TopKSAE(16, 64, 4)
    else:
        sae = ContextualSAE(16, 64, 4, n_heads=2, d_head=4, d_value=6, d_memory=8, query=kind)
        with torch.no_grad():
            sae.W_O.mul_(10)
    sae.initialise(torch.randn(16), scale)
    return sae.eval()


KINDS = ["topk", "current", "past"]


def acts(B: int = 2, T: int = 9, size: float = 2.0) -> Tensor:
    return size * torch.randn(B, T, 16, generator=torch.Generator().manual_seed(1))


def forms(sae: SAE) -> dict[str, Callable[[Tensor], Output]]:
    """Each way to an Output."""
    found: dict[str, Callable[[Tensor], Output]] = {"forward": sae}
    if isinstance(sae, ContextualSAE):
        found["sweeps"] = lambda x: sae(x, exact=False)
        found["stream"] = lambda x: sae.stream(x, sae.initial_state(len(x)))[0]
    return found


@torch.no_grad()
@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_in_the_dtypes_of_the_rule(kind: str, given: torch.dtype, weights: torch.dtype) -> None:
    sae = make(kind).to(weights)
    assert sae.scale.dtype == weights
    x = acts().to(given)
    for name, form in forms(sae).items():
        out, wide = form(x), form(x.double())
        assert (out.x_hat.dtype, out.c.dtype) == (given, given), name
        assert (out.code.values.dtype, out.code.indices.dtype) == (weights, torch.int64), name
        # The numbers are what counts, not the dtype that they come in.
        assert torch.equal(out.code.values, wide.code.values), name
        assert torch.equal(out.code.indices, wide.code.indices), name
        torch.testing.assert_close(out.x_hat.double(), wide.x_hat, rtol=CLOSE[given], atol=CLOSE[given])
    code = sae.encode(x)
    c = () if kind == "topk" else (sae(x).c,)
    decoded = sae.decode(code, *c)
    assert decoded.dtype == weights
    rough = max(CLOSE[given], CLOSE[weights])
    torch.testing.assert_close(decoded.double(), sae(x.double()).x_hat, rtol=rough, atol=rough)
    if kind == "past":
        torch.testing.assert_close(sae.decode(code).double(), sae(x.double()).x_hat, rtol=rough, atol=rough)


@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind: str, given: torch.dtype, weights: torch.dtype) -> None:
    sae, x, dead = make(kind).to(weights), acts().to(given), torch.tensor([1, 5, 30])
    wide = torch.promote_types(weights, torch.float32)
    losses, gradients = sae.gradients(x, None, None, dead)
    again = sae.loss(x, None, None, dead)
    again.loss.backward()
    for loss in (*losses[:3], *again[:3]):
        assert loss.dtype == wide
        assert loss.isfinite()
    assert torch.equal(losses.code.indices, sae.loss(x.double()).code.indices)
    assert gradients.keys() == {name for name, parameter in sae.named_parameters() if parameter.grad is not None}
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters() if parameter.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overflows_on_the_way(kind: str) -> None:
    """Activations that fit their dtype, over a scale that brings them out of it; or too large for the weights'."""
    sae, small = make(kind, 0.01), 1000 * acts()
    wanted = sae(small)
    for form in forms(sae).values():
        out = form(small.half())
        assert out.x_hat.isfinite().all()
        assert out.code.values.isfinite().all()
    torch.testing.assert_close(sae(small.half()).code.values, sae(small.half().float()).code.values, rtol=0, atol=0)
    assert wanted.x_hat.isfinite().all()
    large = 1e5 * acts()
    out = make(kind, 3e4).half()(large)
    assert out.x_hat.isfinite().all()
    assert (out.x_hat - make(kind, 3e4)(large).x_hat).norm() < 0.05 * large.norm()


def test_the_loss_of_many_tokens_in_half_precision() -> None:
    """Neither their number nor the sum of squares fits float16."""
    sae, x = make("topk"), acts(8, 1000)
    wanted = sae.loss(x).fvu
    for dtype in (torch.float16, torch.bfloat16):
        found = make("topk").to(dtype).loss(x).fvu
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_in_evaluation(kind: str, given: torch.dtype, dtype: torch.dtype) -> None:
    sae, x = make(kind), acts().to(given)
    wanted = {name: form(x) for name, form in forms(sae).items()}
    with torch.autocast("cpu", dtype=dtype):
        found = {name: form(x) for name, form in forms(sae).items()}
        code = sae.encode(x)
        decoded = sae.decode(code, *(() if kind == "topk" else (sae(x).c,)))
        dense = DenseSAE(sae)
        feature_acts = dense.encode(x)
        rebuilt = dense.decode(feature_acts)
    for name, out in found.items():
        assert (out.x_hat.dtype, out.c.dtype, out.code.values.dtype) == (given, given, torch.float32)
        if name == "sweeps" or kind == "topk":
            assert out.x_hat.isfinite().all()
            assert (out.x_hat - wanted[name].x_hat).norm() < 0.2 * wanted[name].x_hat.norm(), name
        else:  # the exact form takes no notice
            for got, want in zip((out.x_hat, out.c, *out.code), (*wanted[name][::2], *wanted[name].code), strict=True):
                assert torch.equal(got, want), name
    for tensor in (decoded, rebuilt, feature_acts):
        assert tensor.isfinite().all()
    assert decoded.dtype == torch.float32
    assert (decoded - wanted["forward"].x_hat.float()).norm() < 0.2 * wanted["forward"].x_hat.float().norm()
    if kind == "past":
        with torch.autocast("cpu", dtype=dtype):
            strict = sae.decode(sae.encode(x))
        assert torch.equal(strict, sae.decode(sae.encode(x)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["current", "past"])
def test_steps_and_attribution_take_no_notice_of_autocast(kind: str) -> None:
    sae, x = make(kind), acts()

    def stepped() -> list[Code]:
        state, codes = sae.initial_state(2), []
        for t in range(9):
            code, state = sae.step(x[:, t], state)
            codes.append(code)
        return codes

    def attributed() -> list[Tensor]:
        found = attribute(sae, x[0].half())
        return [found.weights, found.norm, found.share, found.parts(5), found.remainder(), *found.written()]

    wanted = stepped(), attributed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stepped(), attributed()
    for got, want in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True):
        assert torch.equal(got, want)
    assert wanted[1][4].max() < 1e-4  # nothing is left over


@torch.no_grad()
@pytest.mark.parametrize("kind", ["current", "past"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_documents_of_any_integer_dtype(dtype: torch.dtype, kind: str) -> None:
    """Also where it changes from step to step: 300 is no 44 in uint8."""
    sae, x = make(kind), acts()
    ids = torch.tensor([0] * 4 + [44] * 5).expand(2, 9)
    wanted = reference_codes(sae, x, ids)
    for exact in (True, False):
        assert torch.equal(sae(x, None, ids.to(dtype), exact=exact).c, sae(x, None, ids, exact=exact).c)
    assert torch.equal(sae(x, None, ids.to(dtype)).code.indices, wanted)
    _, state = sae.step(x[:, :4], sae.initial_state(2), documents=ids[:, :4] + 300)
    code, _ = sae.step(x[:, 4:], state, documents=ids[:, 4:].to(dtype))
    assert torch.equal(code.indices, wanted[:, 4:])


def reference_codes(sae: ContextualSAE, x: Tensor, documents: Tensor) -> Tensor:
    weights = reference.ContextualWeights(*(getattr(sae, name) for name in reference.ContextualWeights._fields))
    return reference.contextual_exact(x / sae.scale, weights, sae.k, sae.query, None, documents).indices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"mask": torch.ones(2, 9, dtype=torch.int64)}, "mask: given dtype torch.int64; needed torch.bool"),
        ({"mask": torch.ones(2, 9, dtype=torch.uint8)}, "mask: given dtype torch.uint8; needed torch.bool"),
        ({"documents": torch.ones(2, 9)}, "documents: given dtype torch.float32; needed integer ids"),
        ({"documents": torch.ones(2, 9, dtype=torch.bool)}, "documents: given dtype torch.bool; needed integer ids"),
        ({"documents": torch.ones(2, 9, dtype=torch.uint16)}, "documents: given dtype torch.uint16; needed integer"),
        ({"mask": [[True] * 9] * 2}, "mask: given a list; needed a torch.Tensor"),
    ],
)
def test_other_dtypes_of_mask_and_documents_are_refused(kind: str, where: dict[str, Tensor], words: str) -> None:
    sae = make(kind)
    for call in (sae, sae.loss, sae.gradients):
        with pytest.raises(TypeError, match=words):
            call(acts(), **where)


def test_a_scale_that_does_not_fit_is_refused() -> None:
    for scale in (1e5, 1e-9):
        sae = make("topk", scale)
        with pytest.raises(ValueError, match=r"scale: 1.* does not fit torch.float16; needed a wider dtype"):
            sae.half()
        assert sae.W_enc.dtype == torch.float32
        assert sae.bfloat16()(acts()).x_hat.isfinite().all()
