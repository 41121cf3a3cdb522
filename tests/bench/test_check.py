"""The comparison of results: right ones pass, near ties pass, and a wrong tensor is named."""

import pytest
import torch

from csae import reference
from csae.bench.check import difference
from csae.bench.data import CHECK, Data

FLOAT = torch.float32


def code(n=4, k=3, d_sae=10, seed=0):
    torch.manual_seed(seed)
    pre_acts = torch.rand(n, d_sae) + 1
    found = pre_acts.topk(k)
    return pre_acts, {"values": found.values, "indices": found.indices}


def test_the_same_code_in_another_order_passes():
    _, wanted = code()
    other = {name: part.flip(1) for name, part in wanted.items()}
    assert difference(other, wanted, FLOAT) is None


def test_a_near_tie_for_the_last_place_may_go_either_way():
    pre_acts, wanted = code()
    last, spare = wanted["indices"][0, -1], pre_acts[0].topk(4).indices[-1]
    other = {name: part.clone() for name, part in wanted.items()}
    other["indices"][0, -1] = spare
    other["values"][0, -1] = pre_acts[0, last] * (1 - 1e-6)
    assert difference(other, wanted, FLOAT) is None
    other["values"][0, -1] = pre_acts[0, last] * 0.99
    assert f"token 0: feature {int(spare)}" in difference(other, wanted, FLOAT)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c["values"].__setitem__((1, 0), 5.0), "token 1"),
        (lambda c: c["values"].__setitem__((1, 0), float("nan")), "token 1"),
        (lambda c: c["indices"].__setitem__((2, 0), int(c["indices"][2, 1])), "chosen twice"),
        (lambda c: c["values"].copy_(c["values"].flip(1)), "token 0"),  # values that go with other features
    ],
    ids=["a wrong value", "NaN", "a feature twice", "values out of order"],
)
def test_a_wrong_code_is_named(spoil, said):
    _, wanted = code()
    got = {name: part.clone() for name, part in wanted.items()}
    spoil(got)
    assert said in difference(got, wanted, FLOAT)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t * 1.2, "norm is 1.2"),
        (lambda t: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)), "cosine"),
        (torch.zeros_like, "cosine"),
        (lambda t: t * float("nan"), "cosine"),
        (lambda t: t[:-1], "shape"),
    ],
    ids=["another size", "noise", "zero", "NaN", "another shape"],
)
def test_another_tensor_is_named(spoil, said):
    torch.manual_seed(0)
    wanted = {"W_enc": torch.randn(20, 30)}
    assert difference({"W_enc": wanted["W_enc"] * (1 + 1e-6)}, wanted, FLOAT) is None
    found = difference({"W_enc": spoil(wanted["W_enc"])}, wanted, FLOAT)
    assert found.startswith("W_enc")
    assert said in found


def test_where_there_is_nothing_to_compare_it_says_so():
    assert "nothing" in difference({"a": torch.ones(1)}, {"b": torch.ones(1)}, FLOAT)


def test_zero_and_zero_are_the_same():
    assert difference({"a": torch.zeros(3)}, {"a": torch.zeros(3)}, FLOAT) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_implementations_are_checked_no_two_features_tie(dtype):
    data = Data(CHECK, dtype, torch.device("cpu"))
    values, _ = reference.topk_encode(data.x.double(), data.W_enc.double(), data.b_enc.double(), CHECK.k + 1)
    gap = (values[:, -2] - values[:, -1]) / values[:, 0]
    assert gap.min() > 0.05  # several times what bfloat16 rounds
