"""The specification itself: that it says what the design says."""

import math

import pytest
import torch

from csae import reference


def weights(d_in=5, d_sae=11, H=2, d_head=3, d_value=4, seed=0):
    torch.manual_seed(seed)
    d_memory = 6
    shapes = [(d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,), (d_sae, d_memory), (H * d_head, d_in)]
    shapes += [(H * d_head, d_memory), (H * d_value, d_memory), (d_in, H * d_value), (H,), (H,), (H,)]
    return reference.ContextualWeights(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def windows(B=2, T=9, d_in=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, d_in, dtype=torch.float64, generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.2
    documents = torch.randint(0, 3, (B, T), generator=generator).sort(dim=1).values
    return x, mask, documents


@pytest.mark.parametrize("bounds", [False, True], ids=["open", "mask+documents"])
@pytest.mark.parametrize("query", ["current", "past"])
def test_T_sweeps_equal_the_recurrence(query, bounds):
    x, mask, documents = windows()
    where = (mask, documents) if bounds else (None, None)
    T = x.shape[1]
    exact = reference.contextual_exact(x, weights(), 3, query, *where)
    for sweeps in (T, T + 2):
        for swept, recurred in zip(
            reference.contextual_sweeps(x, weights(), 3, query, sweeps, *where), exact, strict=True
        ):
            torch.testing.assert_close(swept, recurred, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("query", ["current", "past"])
def test_each_sweep_makes_one_more_position_exact(query):
    x, _, _ = windows()
    exact = reference.contextual_exact(x, weights(), 3, query)
    for sweeps in range(4):
        swept = reference.contextual_sweeps(x, weights(), 3, query, sweeps)
        torch.testing.assert_close(swept.x_hat[:, : sweeps + 1], exact.x_hat[:, : sweeps + 1])
    assert (reference.contextual_sweeps(x, weights(), 3, query, 1).x_hat - exact.x_hat).abs().max() > 1e-3


def test_no_sweep_is_the_per_token_sae():
    x, _, _ = windows()
    w = weights()
    plain = reference.topk_sae(x, w.W_enc, w.b_enc, w.W_dec, w.b_dec, 3)
    swept = reference.contextual_sweeps(x, w, 3, "current", 0)
    for one, other in zip(plain, swept, strict=True):
        assert torch.equal(one, other)


def test_strict_form_depends_on_x_through_the_codes_only():
    """query="past": c at t is a function of the codes before t; with query="current" it is not."""
    x, _, _ = windows()
    other = x.clone()
    other[:, -1] += 1
    for query, same in (("past", True), ("current", False)):
        c, c_other = (reference.contextual_exact(inputs, weights(), 3, query).c for inputs in (x, other))
        assert torch.equal(c[:, -1], c_other[:, -1]) == same


def test_attention_by_hand():
    q, k = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -1.0, 9.0])
    v, slope, null = torch.tensor([10.0, 20.0, 99.0]), 0.7, 0.3
    out = reference.lookback_attention(
        q.view(1, 3, 1, 1), k.view(1, 3, 1, 1), v.view(1, 3, 1, 1), torch.tensor([slope]), torch.tensor([null])
    ).flatten()
    far, near, nothing = math.exp(3 * 0.5 - slope * math.log(2)), math.exp(3 * -1.0), math.exp(null)
    wanted = [0.0, 10 * math.exp(1.0) / (math.exp(1.0) + nothing), (10 * far + 20 * near) / (far + near + nothing)]
    torch.testing.assert_close(out, torch.tensor(wanted))


def test_encode_by_hand():
    values, indices = reference.topk_encode(
        torch.tensor([[1.0]]), torch.tensor([[2.0], [5.0], [2.0], [-1.0]]), torch.tensor([0.0, 0.0, 0.0, 0.0]), 4
    )
    assert values.tolist() == [[5.0, 2.0, 2.0, 0.0]]
    assert indices.tolist() == [[1, 0, 2, 3]]


def test_document_starts():
    starts = reference.document_starts(torch.tensor([[4, 4, 4, 1, 1, 4], [0, 1, 2, 2, 2, 2]]))
    assert starts.tolist() == [[0, 0, 0, 3, 3, 5], [0, 1, 2, 2, 2, 2]]
    assert reference.document_starts(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_an_unknown_query_is_refused():
    with pytest.raises(ValueError, match="query: given 'next'; needed 'current' or 'past'"):
        reference.contextual_sweeps(windows()[0], weights(), 3, "next", 1)
