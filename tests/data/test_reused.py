from __future__ import annotations

import copy

import torch

from csae.data.reused import KEPT, Reused


def test_memory_is_used_again_when_nobody_has_it() -> None:
    reused = Reused()
    first = reused.empty(2, 3)
    assert (first.shape, first.dtype) == ((2, 3), torch.float32)
    where = first.data_ptr()
    assert reused.empty(2, 3).data_ptr() != where
    del first
    assert reused.empty(3, 2).data_ptr() == where


def test_not_while_a_view_of_it_or_a_graph_is_there() -> None:
    reused = Reused()
    for keep in (lambda made: made[1, 1:], lambda made: made.numpy(), lambda made: made.detach().t()):
        kept = keep(reused.empty(2, 3).fill_(7))
        others = [reused.empty(2, 3).fill_(index) for index in range(9)]
        assert (torch.as_tensor(kept) == 7).all()
        del others
    weight = torch.ones(3, requires_grad=True)
    loss = (reused.empty(2, 3).fill_(7) * weight).sum()  # what backward needs lives in the graph alone
    others = [reused.empty(2, 3).fill_(index) for index in range(9)]
    loss.backward()
    assert weight.grad.tolist() == [14, 14, 14]
    assert len({other.data_ptr() for other in others}) == 9


def test_little_is_kept() -> None:
    reused = Reused()
    made = [reused.empty(4) for _ in range(20)]
    del made
    reused.empty(4)
    assert len(reused._free) <= KEPT
    five = reused.empty(5)
    assert not any(memory.numel() == 4 for memory in reused._free)
    assert torch.equal(copy.deepcopy(five.zero_()), torch.zeros(5))
