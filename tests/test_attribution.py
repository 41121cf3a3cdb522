"""The parts of c: they sum to c, and each is what its formula says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csae import ContextualSAE, TopKSAE
from csae.attribution import Attribution, attribute
from csae.sae import Code, Output

T, D, F, K, H, DV = 13, 12, 30, 3, 2, 5


def make(query: str, k_mem: int = K) -> tuple[ContextualSAE, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sae = ContextualSAE(D, F, K, n_heads=H, d_head=4, d_value=DV, k_mem=k_mem, query=query).double().eval()
    with torch.no_grad():
        sae.W_O.mul_(5)
        sae.null.normal_()
        sae.b_dec.normal_()
    sae.scale.fill_(1.7)
    mask = torch.ones(T, dtype=torch.bool)
    mask[[0, 4]] = False
    documents = torch.arange(T) // 8
    return sae, torch.randn(T, D, dtype=torch.float64), mask, documents


@pytest.mark.parametrize("k_mem", [K, 1])
@pytest.mark.parametrize("query", ["current", "past"])
def test_the_parts_sum_to_c(query: str, k_mem: int) -> None:
    sae, acts, mask, documents = make(query, k_mem)
    found = attribute(sae, acts, mask, documents)
    c = sae(acts[None], mask[None], documents[None], exact=True).c[0]
    assert c.norm() > 1
    summed = torch.stack([found.parts(t).sum(dim=(0, 1)) for t in range(T)])
    torch.testing.assert_close(summed, c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.output.c, c, rtol=0, atol=0)
    assert not found.norm[..., k_mem:].any()


def test_shares_by_feature_and_a_known_output() -> None:
    sae, acts, mask, documents = make("current")
    alone = attribute(sae, acts, mask, documents)
    x_hat, code, c = sae(acts[None], mask[None], documents[None], exact=True)
    found = attribute(sae, acts, mask, documents, Output(x_hat[0], Code(code.values[0], code.indices[0]), c[0]))
    torch.testing.assert_close(found.share, alone.share)
    assert found.features.tolist() == sorted(set(code.indices.flatten().tolist()))
    by_feature = torch.zeros(T, F, dtype=torch.float64)
    by_feature.index_add_(1, code.indices.flatten(), alone.share.flatten(1))
    for start, end in ((0, 1), (3, 9), (0, T)):
        shares = found.share_by_feature(start, end)
        torch.testing.assert_close(shares, by_feature[start:end, found.features], rtol=1e-12, atol=1e-12)
    assert by_feature.any()


@pytest.mark.parametrize("query", ["current", "past"])
def test_norm_and_share_of_each_part(query: str) -> None:
    sae, acts, mask, documents = make(query)
    found = attribute(sae, acts, mask, documents)
    c = found.output.c
    for t in range(T):
        parts = found.parts(t)
        torch.testing.assert_close(found.norm[t], parts.norm(dim=-1), rtol=1e-8, atol=1e-8)
        if c[t].norm() > 0:
            torch.testing.assert_close(found.share[t], parts @ c[t] / c[t].square().sum(), rtol=1e-10, atol=1e-10)
            assert float(found.share[t].sum()) == pytest.approx(1)
        else:
            assert not found.share[t].any()
    # Nothing from itself or later, from out of the mask, or from another document.
    nothing = torch.ones(T, T).triu().bool() | ~mask[None, :] | ~mask[:, None]
    nothing |= documents[None, :] != documents[:, None]
    assert not found.norm[nothing].any()
    assert found.norm[~nothing].any(dim=-1).all()


def test_a_part_is_its_formula() -> None:
    sae, acts, mask, documents = make("current")
    found = attribute(sae, acts, mask, documents)
    t, j, slot = 6, 2, 1
    feature = found.output.code.indices[j, slot]
    value = found.output.code.values[j, slot]
    assert value > 0
    expected = torch.zeros(D, dtype=torch.float64)
    for h in range(H):
        head = slice(h * DV, (h + 1) * DV)
        written = sae.W_V[head] @ sae.W_mem[feature]
        remembered = sum(v * sae.W_mem[f] for v, f in zip(*(part[j] for part in found.output.code), strict=True))
        shrunk = (1 + (sae.W_V[head] @ remembered).square().mean() / 4.0**2).rsqrt()
        assert shrunk < 0.99
        expected += found.weights[h, t, j] * shrunk * value * sae.W_O[:, head] @ written
    torch.testing.assert_close(found.parts(t)[j, slot], expected * sae.scale, rtol=1e-12, atol=1e-12)


def test_top() -> None:
    sae, acts, mask, documents = make("current")
    found = attribute(sae, acts, mask, documents)
    t = 7
    top = found.top(t, 4)
    best = found.share[t].flatten().sort(descending=True).values[:4]
    assert [part.share for part in top] == pytest.approx(best.tolist())
    for part in top:
        assert part.position < t
        slot = found.output.code.indices[part.position].tolist().index(part.feature)
        assert part.share == float(found.share[t, part.position, slot])
        assert part.norm == float(found.norm[t, part.position, slot])
    assert found.top(0, 4) == []
    assert found.top(4, 4) == [], "out of the mask"
    assert all(part.share > 0 for part in found.top(t, 1000))


def test_without_mask_and_documents() -> None:
    sae, acts, _, _ = make("past")
    found: Attribution = attribute(sae, acts)
    torch.testing.assert_close(found.parts(5).sum(dim=(0, 1)), sae(acts[None], exact=True).c[0, 5])


def test_errors() -> None:
    sae, acts, _, _ = make("past")
    with pytest.raises(ValueError, match=r"acts: given shape \[1, 13, 12\]; needed one window"):
        attribute(sae, acts[None])
    with pytest.raises(TypeError, match="sae: given a TopKSAE; needed a ContextualSAE"):
        attribute(TopKSAE(4, 8, 2), acts)  # type: ignore[arg-type]


@pytest.mark.parametrize("k_mem", [K, 1])
@pytest.mark.parametrize("query", ["current", "past"])
def test_what_is_missed_and_what_each_feature_writes(query: str, k_mem: int) -> None:
    sae, acts, mask, documents = make(query, k_mem)
    found = attribute(sae, acts, mask, documents)
    assert found.remainder().max() < 1e-13
    found.output.c[7] *= 1.25
    assert float(found.remainder()[7]) == pytest.approx(0.2)
    parts = torch.stack([found.parts(t) for t in range(T)])  # [T, T, k, d_in]
    features, written = found.written()
    assert set(features.tolist()) == set(found.output.code.indices.flatten().tolist())
    for feature, row in zip(features, written, strict=True):
        wanted = parts[:, found.output.code.indices == feature].sum(dim=(0, 1))
        torch.testing.assert_close(row, wanted, rtol=1e-12, atol=1e-12)
