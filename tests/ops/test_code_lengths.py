"""Rows of a code end at their length: what stands behind it takes no part, forward and backward."""

import math

import pytest
import torch

from csae import reference
from csae.ops import sparse_decode, topk_encode

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
D_SAE = 23
# Some features that stand behind lengths only.
NEVER = slice(17, D_SAE)


def lengths_of(kind: str, n: int, k: int) -> torch.Tensor:
    ragged = torch.randint(0, k + 1, (n,))
    return {
        "full": torch.full((n,), k),
        "empty": torch.zeros(n, dtype=torch.int64),
        "ragged": ragged,
        "some full, some empty": torch.where(ragged % 2 == 0, 0, k),
    }[kind]


def code(kind: str, n: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in no order, zeros among them; behind the lengths 0 or -0, and features that are nowhere else."""
    torch.manual_seed(n + 31 * k)
    values = torch.randn(n, k, dtype=torch.float64)
    lengths = lengths_of(kind, n, k)[:, None]
    places = torch.arange(k)
    values[(torch.rand(n, k) < 0.2) & (places < lengths - 1)] = 0
    live = places < lengths
    indices = torch.where(live, torch.randint(0, NEVER.start, (n, k)), torch.randint(NEVER.start, D_SAE, (n, k)))
    return torch.where(live, values, torch.where(places % 2 == 0, 0.0, -0.0)).to(dtype), indices


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["full", "empty", "ragged", "some full, some empty"])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (7, 5, 33), (19, 16, 8), (40, 64, 17), (5, 200, 70), (3, 0, 4)])
def test_every_gradient_is_the_reference_and_what_stands_behind_is_not_read(n, k, d, kind, dtype):
    values, indices = code(kind, n, k, dtype)
    W, grad = torch.randn(D_SAE, d).to(dtype), torch.randn(n, d).to(dtype)
    wide = [tensor.double().clone().requires_grad_() for tensor in (values, W)]
    expected = reference.sparse_decode(wide[0], indices, wide[1])
    wanted = torch.autograd.grad(expected, wide, grad.double())

    W[NEVER] = math.nan  # whoever reads one of these rows has it in the result
    given = [tensor.requires_grad_() for tensor in (values, W)]
    out = sparse_decode(values, indices, W)
    found = torch.autograd.grad(out, given, grad)
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * scale)
    behind = ~reference.before_length(values)
    assert (found[0][behind] == 0).all()
    assert (found[1][NEVER] == 0).all()


def test_the_reference_reads_nothing_behind_the_lengths():
    values, indices = code("ragged", 9, 6)
    live = reference.before_length(values)
    indices = torch.where(live, indices.clamp(min=1), 10**9)
    W = torch.randn(D_SAE, 5, dtype=torch.float64)
    W[0] = W[NEVER] = math.nan
    values.requires_grad_()
    W.requires_grad_()
    out = reference.sparse_decode(values, indices, W)
    d_values, d_W = torch.autograd.grad(out, (values, W), torch.full_like(out, math.inf))
    assert out.isfinite().all()
    assert (d_values[~live] == 0).all()
    assert (d_W[NEVER] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_index_behind_the_length_is_not_looked_at(dtype):
    values, indices = code("ragged", 12, 9, dtype)
    W = torch.randn(D_SAE, 6).to(dtype).requires_grad_()
    values.requires_grad_()
    behind = ~reference.before_length(values)
    results = []
    for wrong in (0, -1, D_SAE, 2**40, -(2**62)):
        out = sparse_decode(values, torch.where(behind, wrong, indices), W)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (values, W))))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_a_nan_is_no_end():
    values, W = torch.tensor([[1.0, 0.0, math.nan, 0.0]]), torch.eye(4)
    out = sparse_decode(values, torch.tensor([[0, 1, 2, 3]]), W)
    assert out.isnan().all()
    values.requires_grad_()
    (d_values,) = torch.autograd.grad(sparse_decode(values, torch.tensor([[0, 1, 2, 3]]), W).sum(), values)
    assert d_values.tolist() == [[1, 1, 1, 0]]


def test_any_order_and_capacity_give_the_same():
    """Rows sorted and cut to the longest, or as they were with room behind: other orders of the same sums."""
    values, indices = code("ragged", 20, 12)
    W = torch.randn(D_SAE, 9, dtype=torch.float64)
    out = sparse_decode(values, indices, W)
    order = values.abs().argsort(dim=1, descending=True)
    torch.testing.assert_close(sparse_decode(values.gather(1, order), indices.gather(1, order), W), out)
    roomy = (torch.nn.functional.pad(of, (0, 50)) for of in (values, indices))
    assert torch.equal(sparse_decode(*roomy, W), out)


def test_the_encoder_sums_active_entries_only(monkeypatch):
    """Counted: the pairs that `topk_encode`'s backward pass sorts into runs."""
    from csae.kernels.cpu import feature_rows as native
    from csae.kernels.portable import feature_rows as portable

    counted = []
    for kernels in (native, portable):
        sort = kernels.sort_pairs

        def counting(*given, sort=sort):
            pairs = sort(*given)
            counted.append(int(pairs.ends[-1]))
            return pairs

        monkeypatch.setattr(kernels, "sort_pairs", counting)
    torch.manual_seed(0)
    x, W_enc = torch.randn(11, 8), torch.randn(D_SAE, 8, requires_grad=True)
    values, _ = topk_encode(x, W_enc, torch.zeros(D_SAE), 20)  # more than are positive
    active = int((values > 0).sum())
    assert 0 < active < values.numel()
    values.sum().backward()
    assert counted == [active]
