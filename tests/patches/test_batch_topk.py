"""The largest activations of a batch, against a search through all of them."""

import math

import pytest
import torch

from csae.patches.batch_topk import ROOM, above_threshold, batch_topk


@pytest.mark.parametrize("batch", [(9,), (2, 5), (1,), ()])
@pytest.mark.parametrize("k", [0.6, 1, 2.5, 8, 23])
def test_it_is_the_batchs_largest(batch, k):
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(*batch, 7), torch.randn(23, 7), torch.randn(23)
    pre_acts = (x @ W_enc.T + b_enc).relu()
    count = int(k * x.shape[:-1].numel())
    code = batch_topk(x, W_enc, b_enc, k)
    if count == 0:
        assert code is None
        return
    largest = pre_acts.flatten().topk(count)
    wanted = torch.zeros(pre_acts.numel()).scatter_(0, largest.indices, largest.values).view_as(pre_acts)
    if (wanted > 0).sum(-1).max() > math.ceil(ROOM * k):
        assert code is None
    elif code is not None:
        torch.testing.assert_close(code.dense(), wanted)
        assert code.values.shape[-1] == max(1, int((wanted > 0).sum(-1).max()))
    else:
        # It may only fail where a token's last value found is among the batch's largest.
        room = min(math.ceil(ROOM * k), 23)
        assert (pre_acts.topk(room).values[..., -1] > largest.values.min()).any()


def test_a_token_with_too_many_and_a_nan_are_seen():
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(20, 7), torch.randn(64, 7), torch.zeros(64)
    assert batch_topk(x, W_enc, b_enc, 2) is not None
    x[3] *= 1000
    assert batch_topk(x, W_enc, b_enc, 2) is None
    x[3] = torch.nan
    assert batch_topk(x, W_enc, b_enc, 2) is None
    assert batch_topk(x[:0], W_enc, b_enc, 2) is None


def test_of_equal_values_as_many_are_kept_as_there_is_room_for():
    """Whichever of them are chosen, first in their token or not."""
    W_enc = torch.ones(64, 1).index_fill_(0, torch.tensor([5]), 2.0)
    for n in range(1, 9):
        code = batch_topk(torch.ones(n, 1), W_enc, torch.zeros(64), 64 / 9)
        count = int(64 / 9 * n)
        if code is not None:
            assert (code.values > 0).sum() == count
            assert code.values.sum() == count + n


@pytest.mark.parametrize("batch", [(9,), (2, 5), (0,), ()])
@pytest.mark.parametrize("k", [1, 2.5, 23])
@pytest.mark.parametrize("threshold", [0.0, 0.8, 100.0])
def test_all_that_is_above_a_threshold(batch, k, threshold):
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(*batch, 7), torch.randn(23, 7), torch.randn(23)
    pre_acts = x @ W_enc.T + b_enc
    wanted = torch.where(pre_acts > threshold, pre_acts, 0)
    code = above_threshold(x, W_enc, b_enc, torch.tensor(threshold), k)
    most = max((wanted > 0).sum(dim=-1).flatten().tolist(), default=0)
    if code is None:
        assert most >= ROOM * k
        return
    torch.testing.assert_close(code.dense(), wanted)
    assert code.values.shape[-1] == max(1, most)


def test_a_threshold_that_is_unset_and_a_nan_are_left_alone():
    x, W_enc, b_enc = torch.randn(5, 7), torch.randn(23, 7), torch.zeros(23)
    assert above_threshold(x, W_enc, b_enc, torch.tensor(-1.0), 23) is None
    x[2] = torch.nan
    for k in (2, 23):
        assert above_threshold(x, W_enc, b_enc, torch.tensor(3.0), k) is None
