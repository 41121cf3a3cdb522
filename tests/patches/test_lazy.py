"""A lazy tensor reads like the dense one, is in autograd's graph, and is made only when it is read."""

import copy
import io

import numpy as np
import pytest
import torch
from torch.autograd import Function

from csae.patches.lazy import Code, Columns, Lazy, Sum, plain

D_SAE = 11


def make_code(*batch, k=3, grad=False):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(*batch, k, generator=generator)
    indices = torch.rand(*batch, D_SAE, generator=generator).argsort(dim=-1)[..., :k]
    return Code(values.requires_grad_(grad), indices, D_SAE)


class FromCode(Function):
    @staticmethod
    def forward(ctx, values, indices):
        ctx.indices = indices
        return Lazy.of(Code(values, indices, D_SAE))

    @staticmethod
    def backward(ctx, grad):
        return grad.gather(-1, ctx.indices), None


READINGS = {
    "indexing": lambda acts: acts[1, 3],
    "comparison": lambda acts: acts > 0.5,
    "product": lambda acts: acts @ torch.ones(D_SAE, 2),
    "into another": lambda acts: torch.zeros(5, D_SAE) + acts,
    "nonzero": lambda acts: acts.nonzero(),
    "to_sparse": lambda acts: acts.to_sparse().to_dense(),
    "topk": lambda acts: acts.topk(2).values,
    "as an index": lambda acts: torch.arange(2)[acts.bool().long()],
    "in a list": lambda acts: torch.stack([acts, acts]),
    "mean": lambda acts: acts.mean(),
    "sum": lambda acts: acts.sum(),
    "sum over tokens": lambda acts: acts.sum(0),
    "sum over tokens from the end": lambda acts: acts.sum(-2),
    "sum over features": lambda acts: acts.sum(-1),
    "sum over both": lambda acts: acts.sum((0, 1)),
    "sum in another dtype": lambda acts: acts.sum(0, dtype=torch.float64),
    "sum kept": lambda acts: acts.sum(1, keepdim=True),
    "bool": lambda acts: acts.bool(),
    "count": lambda acts: acts.bool().sum(0),
    "frequency": lambda acts: acts.bool().float().sum(0),
    "half": lambda acts: acts.half(),
    "double": lambda acts: acts.double(),
    "clone": lambda acts: acts.clone(),
    "view": lambda acts: acts.view(-1),
    "transpose": lambda acts: acts.T,
    "data": lambda acts: acts.data,
    "tolist": lambda acts: torch.tensor(acts.tolist()),
    "numpy": lambda acts: torch.from_numpy(acts.numpy().copy()),
    "asarray": lambda acts: torch.from_numpy(np.asarray(acts).copy()),
    "dlpack": lambda acts: torch.from_dlpack(acts).clone(),
    "deepcopy": lambda acts: copy.deepcopy(acts),
    "storage": lambda acts: torch.tensor(acts.untyped_storage().tolist()),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_it_reads_like_the_dense_tensor(read):
    code = make_code(5)
    torch.testing.assert_close(plain(read(Lazy.of(code))), read(code.dense()))


def test_what_it_is_is_known_without_making_it():
    lazy = Lazy.of(make_code(2, 4))
    assert (lazy.shape, lazy.dtype, lazy.device.type, lazy.ndim, lazy.is_sparse) == (
        (2, 4, D_SAE),
        torch.float32,
        "cpu",
        3,
        False,
    )
    assert isinstance(lazy, torch.Tensor)
    assert isinstance(lazy.detach(), Lazy)
    assert lazy.source is not None


def test_counts_of_features_make_no_dense_tensor(monkeypatch):
    monkeypatch.setattr(Code, "dense", lambda self: pytest.fail("it was made"))
    fired = Lazy.of(make_code(5)).bool().float()
    assert fired.sum(-2).bool().shape == (D_SAE,)
    assert fired.sum(0).sum() == 15
    assert fired.sum(0, dtype=torch.float32).sum() == 15  # as autocast on CUDA has it
    assert fired.sum(-1).to_dense().mean() == 3


def test_it_is_saved_as_an_ordinary_tensor():
    code = make_code(5)
    file = io.BytesIO()
    torch.save(Lazy.of(code), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, code.dense())
    assert repr(Lazy.of(code)) == repr(code.dense())


def test_what_is_written_into_it_stays():
    code = make_code(5)
    lazy, wanted = Lazy.of(code), code.dense()
    other = lazy.detach()
    for acts in (lazy, wanted):
        acts[0] = 7
        acts.mul_(2)
        acts[1:3].zero_()
        acts.data[4] = 3
        torch.add(acts, 1, out=acts)
    assert lazy.source is None
    assert torch.equal(plain(lazy), wanted)
    assert torch.equal(plain(other), wanted)  # it shares the memory
    assert lazy.add_(1) is lazy


@pytest.mark.parametrize("written", [False, True])
def test_gradients_go_through_it(written):
    found = []
    for lazily in (True, False):
        code = make_code(5, grad=True)
        if lazily:
            acts = FromCode.apply(code.values, code.indices)
            assert acts.requires_grad
        else:
            acts = torch.zeros(5, D_SAE).scatter(-1, code.indices, code.values)
        acts.retain_grad()
        loss = (acts * torch.arange(D_SAE)).square().sum() + acts.sum(-1).square().sum() + acts[2].exp().sum()
        if written:
            acts = acts * 1 if not lazily else acts
            changed = acts.clone()
            changed[:, 3] = 0
            loss = loss + changed.cos().sum()
        (by_acts,) = torch.autograd.grad(loss, acts, retain_graph=True) if not written else (torch.zeros(()),)
        loss.backward()
        found.append((loss.detach(), code.values.grad, plain(by_acts)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_plain_is_in_the_graph_and_a_tensor_with_a_gradient_is_no_array():
    code = make_code(5, grad=True)
    lazy = FromCode.apply(code.values, code.indices)
    ordinary = plain(lazy)
    assert type(ordinary) is torch.Tensor
    ordinary.square().sum().backward()
    torch.testing.assert_close(code.values.grad, 2 * code.values.detach())
    with pytest.raises(RuntimeError, match="requires grad"):
        FromCode.apply(code.values, code.indices).numpy()


def test_columns_and_sums():
    code, values, features = make_code(2, 5), torch.rand(2, 5, 3), torch.tensor([7, 0, 4])
    columns = Columns(values, features, D_SAE)
    wanted = torch.zeros(2, 5, D_SAE)
    wanted[..., features] = values
    assert torch.equal(plain(Lazy.of(columns)), wanted)
    both = Lazy.of(code) + Lazy.of(columns)
    assert isinstance(both.source, Sum)  # not made yet
    torch.testing.assert_close(plain(both), code.dense() + wanted)
    changed = Lazy.of(code)
    both = changed + Lazy.of(columns)
    changed.zero_()
    torch.testing.assert_close(plain(both), code.dense() + wanted)
    torch.testing.assert_close(plain(Lazy.of(code) + 1), code.dense() + 1)
    torch.testing.assert_close(plain(torch.add(Lazy.of(code), Lazy.of(columns), alpha=2)), code.dense() + 2 * wanted)


def test_it_is_made_in_its_own_precision():
    class Product:
        def dense(self):
            return torch.full((4, 4), 1.001) @ torch.eye(4)

    lazy = Lazy(Product(), (4, 4), torch.float32, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(lazy), torch.full((4, 4), 1.001))
