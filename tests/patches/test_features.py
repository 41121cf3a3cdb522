"""Tensors in the place of dense ones: they answer some questions themselves, and become dense for all others."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn.functional import linear

from csae.patches import topk_graph
from csae.patches.features import pre_acts, scattered

N, D_IN, D_SAE, K = 5, 7, 19, 3


@pytest.fixture
def weights():
    torch.manual_seed(0)
    shapes = (N, D_IN), (D_SAE, D_IN), (D_SAE,)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense_pre_acts(weights):
    return linear(*weights).relu()


def code():
    torch.manual_seed(1)
    values = torch.rand(N, K, dtype=torch.float64)
    return values.requires_grad_(), torch.rand(N, D_SAE).topk(K).indices


def dense_features(values, indices):
    return values.new_zeros(N, D_SAE).scatter(-1, indices, values)


@pytest.fixture
def never_dense(monkeypatch):
    """A test in which nothing becomes dense."""

    def refuse(self):
        raise AssertionError("became dense")

    monkeypatch.setattr("csae.patches.features.FEW_TOKENS", 0)
    monkeypatch.setattr("csae.patches.lazy.Content.dense", refuse)


READS = {
    "sum": lambda t: t.sum(),
    "method": lambda t: t.mul(2).amax(dim=0),
    "operator": lambda t: (t != 0).double() + 1,
    "right operator": lambda t: 1 - t,
    "index": lambda t: t[1:3, :4],
    "mask": lambda t: t[t > 0],
    "argument": lambda t: torch.maximum(torch.full((), 0.1, dtype=torch.float64), t),
    "list of arguments": lambda t: torch.cat([t, t]),
    "attribute": lambda t: t.T,
    "product": lambda t: torch.ones(2, N, dtype=torch.float64) @ t,
    "topk": lambda t: t.topk(2, dim=0).values,
    "smallest": lambda t: t.topk(2, largest=False).values,
    "where": lambda t: torch.where(t > 0.2, t, 0),
    "other where": lambda t: torch.where(torch.arange(D_SAE) > 4, 7.0, t),
    "zeros_like": lambda t: torch.zeros_like(t, dtype=torch.float32),
    "layer": lambda t: torch.nn.functional.linear(t, torch.ones(2, D_SAE).double(), torch.ones(2).double()),
    "copy": lambda t: copy.deepcopy(t.detach()),
    "pickle": lambda t: pickle.loads(pickle.dumps(t.detach())),
    "numpy": lambda t: torch.from_numpy(t.detach().numpy()),
    "list": lambda t: torch.tensor(t.tolist(), dtype=torch.float64),
}


@pytest.mark.parametrize("name", READS)
def test_whoever_reads_gets_what_the_dense_tensor_gives(name, weights):
    values, indices = code()
    pairs = (pre_acts(*weights), dense_pre_acts(weights)), (scattered(values, indices, D_SAE), dense_features(*code()))
    for found, wanted in pairs:
        result = READS[name](found)
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, READS[name](wanted), rtol=0, atol=0)


def test_the_text_of_it_is_that_of_the_dense_tensor(weights):
    assert repr(pre_acts(*weights).detach()) == repr(dense_pre_acts(weights).detach())


def test_metadata_needs_no_dense_tensor(weights, never_dense):
    for found in (pre_acts(*weights), scattered(*code(), D_SAE)):
        assert isinstance(found, torch.Tensor)
        assert found.shape == found.size() == (N, D_SAE)
        assert (found.dim(), found.ndim, len(found), found.numel()) == (2, 2, N, N * D_SAE)
        assert (found.dtype, found.device.type, found.is_floating_point()) == (torch.float64, "cpu", True)
        assert {found: 1}[found] == 1


def test_the_gradient_is_that_of_the_dense_tensor(weights):
    values, indices = code()
    scale = torch.rand(N, D_SAE, dtype=torch.float64)
    for found, wanted, inputs in (
        (pre_acts(*weights), dense_pre_acts(weights), weights),
        (scattered(values, indices, D_SAE), dense_features(values, indices), [values]),
    ):
        gradients = (torch.autograd.grad((of * scale).sum(), inputs) for of in (found, wanted))
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_gradient_is_recorded_as_where_it_was_made(weights):
    recorded = pre_acts(*weights)
    with torch.no_grad():
        assert recorded.sum() > 0  # it becomes dense here
        not_recorded = pre_acts(*weights)
    assert (recorded * 2).requires_grad
    assert not (not_recorded * 2).requires_grad


def test_what_is_written_stays():
    found, wanted = scattered(*code(), D_SAE), dense_features(*code())
    with torch.no_grad():
        for tensor in (found, wanted):
            tensor[:, 4] = 3
            tensor.mul_(2)
        W_dec = torch.rand(D_IN, D_SAE, dtype=torch.float64)
        torch.testing.assert_close(linear(found, W_dec), linear(wanted, W_dec), rtol=0, atol=0)


def test_the_decoders_product_is_sparse(never_dense):
    W_dec = torch.rand(D_IN, D_SAE, dtype=torch.float64, requires_grad=True)
    values, indices = code()
    found = torch.nn.functional.linear(scattered(values, indices, D_SAE), W_dec)
    wanted = dense_features(values, indices) @ W_dec.T
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(of, (values, W_dec), grad) for of in (found, wanted))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [1, 4, torch.tensor(2)])
@pytest.mark.parametrize("only", [None, 4, D_SAE])
def test_topk_of_pre_activations_is_encoded(k, only, weights, never_dense):
    chosen = torch.zeros(D_SAE, dtype=torch.bool)
    chosen[torch.randperm(D_SAE)[:only]] = True
    lazy_acts, wanted = pre_acts(*weights), linear(*weights)  # not relu'd: no ties at zero
    if only is not None:
        lazy_acts = torch.where(chosen[None], lazy_acts, -math.inf)
        wanted = torch.where(chosen, wanted, -math.inf)
    values, indices = lazy_acts.topk(k, sorted=False)
    found = wanted.topk(int(k))
    assert torch.equal(indices, found.indices)
    torch.testing.assert_close(values, found.values.relu(), rtol=1e-13, atol=0)
    grad = torch.randn_like(values)
    gradients = torch.autograd.grad(values, weights, grad), torch.autograd.grad(found.values.relu(), weights, grad)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_more_than_there_are_is_the_dense_tensors_business(weights):
    few = torch.where(torch.arange(D_SAE)[None] < 2, pre_acts(*weights), -math.inf)
    assert few.topk(3).values[:, 2].eq(-math.inf).all()
    with pytest.raises(RuntimeError, match="out of range"):
        pre_acts(*weights).topk(D_SAE + 1)


def test_a_code_scattered_into_zeros_is_a_code(weights, never_dense):
    values, indices = code()
    features = torch.zeros_like(pre_acts(*weights))
    assert features.scatter_(dim=-1, index=indices, src=values) is features
    W_dec = torch.rand(D_IN, D_SAE, dtype=torch.float64)
    wanted = dense_features(values, indices) @ W_dec.T
    torch.testing.assert_close(torch.nn.functional.linear(features, W_dec), wanted, rtol=1e-13, atol=0)


def test_a_feature_scattered_twice_counts_once(weights):
    values, indices = code()
    indices[:, 1] = indices[:, 0]
    features = torch.zeros_like(pre_acts(*weights)).scatter_(-1, indices, values.detach())
    wanted = torch.zeros(N, D_SAE, dtype=torch.float64).scatter_(-1, indices, values.detach())
    torch.testing.assert_close(features, wanted, rtol=0, atol=0)


def test_pre_activations_of_weights_that_changed_are_an_error(weights):
    lazy_acts = pre_acts(*weights)
    with torch.no_grad():
        weights[1].mul_(2)
    for read in (lambda: lazy_acts.sum(), lambda: lazy_acts.topk(2)):
        with pytest.raises(RuntimeError, match="weights that were changed since they encoded"):
            read()


def test_the_gradient_after_writing_into_pre_activations(weights):
    gradients = []
    for of in (pre_acts(*weights), dense_pre_acts(weights).clone()):
        of.mul_(-2)
        gradients.append(torch.autograd.grad(of.square().sum(), weights))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("changed", [0, 1])
def test_features_stay_as_they_were_made_when_their_code_changes(changed, monkeypatch):
    monkeypatch.setattr("csae.patches.features.FEW_TOKENS", 0)
    held, wanted = code(), dense_features(*code())
    made = scattered(*held, D_SAE)
    put_in = torch.zeros_like(made).scatter_(-1, *reversed(held))
    with torch.no_grad():
        held[changed].zero_()
    W_dec = torch.rand(2, D_SAE, dtype=torch.float64)
    for features in (made, put_in):
        torch.testing.assert_close(linear(features, W_dec), linear(wanted, W_dec), rtol=1e-13, atol=0)
        torch.testing.assert_close(features + 0, wanted, rtol=0, atol=0)


def test_autocast_holds_where_it_was_on_when_they_were_made(weights):
    weights = [tensor.detach().float() for tensor in weights]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy_acts, wanted = pre_acts(*weights), linear(*weights).relu()
    assert lazy_acts.dtype == lazy_acts.sum().dtype == torch.bfloat16
    torch.testing.assert_close(lazy_acts.topk(2).values, wanted.topk(2).values, rtol=0, atol=0)
    torch.testing.assert_close(lazy_acts + 0, wanted, rtol=0, atol=0)
    with torch.no_grad():
        stale = pre_acts(*weights)
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="changed since they encoded"):
        stale.sum()


def test_inference_mode(weights):
    with torch.inference_mode():
        lazy_acts = pre_acts(weights[0] - 1, *weights[1:])
        wanted = linear(weights[0] - 1, *weights[1:]).relu()
    torch.testing.assert_close(lazy_acts + 0, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("only_code", [False, True])
@pytest.mark.parametrize("make", ["features", "hidden_pre"])
def test_one_token_that_is_in_no_batch(make, only_code):
    """All gradients, through what is dense and through the k largest."""
    torch.manual_seed(0)
    given = [torch.randn(of, dtype=torch.float64).requires_grad_() for of in ((D_IN,), (D_SAE, D_IN), (D_SAE,))]
    norms = (torch.rand(D_SAE, dtype=torch.float64) + 0.5).requires_grad_()

    def ours():
        x, W_enc, b_enc = given
        return pre_acts(*given) if make == "features" else topk_graph.PreActs.apply(x, None, W_enc.T, b_enc, norms)

    def theirs():
        return dense_pre_acts(given) if make == "features" else linear(*given) * norms

    leaves = given if make == "features" else [*given, norms]
    found, wanted = (torch.autograd.grad(taken(of(), only_code), leaves) for of in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def taken(acts, only_code):
    weight = torch.arange(1.0, D_SAE + 1, dtype=torch.float64)
    return acts.topk(K).values.mul(weight[:K]).sum() if only_code else (acts * weight).sum()
