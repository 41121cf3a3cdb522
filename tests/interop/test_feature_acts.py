"""Feature activations of a contextual SAE are decoded with what was carried to their positions, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from interop_saes import D_SAE, activations, contextual
from torch import Tensor

from csae.interop.dense import DenseSAE
from csae.interop.feature_acts import FeatureActs, carried_of

B, T = 3, 9
ROWS = torch.tensor([2, 0])
PLACES = torch.zeros(B, T, dtype=torch.bool)
PLACES[0, 2] = PLACES[2, 5:] = True


@pytest.fixture(params=["current", "past"])
def dense(request: pytest.FixtureRequest) -> DenseSAE:
    return DenseSAE(contextual(request.param))


def set_feature(acts: Tensor) -> Tensor:
    edited = acts.clone()
    edited[..., 3] = 2.0
    return edited


def set_place(acts: Tensor) -> Tensor:
    edited = acts.clone()
    edited[PLACES] = 0
    return edited


def in_place(acts: Tensor) -> Tensor:
    acts = acts.clone().mul_(2)
    acts[:, :, 1:4].zero_()
    acts *= 0.5
    return acts.clamp_(min=0.1).add_(torch.ones(D_SAE))


def window_in_place(acts: Tensor) -> Tensor:
    acts = acts.clone()
    acts[1] *= 2
    acts[:, 2:4] = acts[:, 2:4] + 1
    return acts + acts[:]


# What a user may do, of which the reconstruction is that of the same done to a tensor, plus c done to likewise.
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda acts: acts,
    "clone": lambda acts: acts.clone(),
    "detach": lambda acts: acts.detach(),
    "set a feature": set_feature,
    "set some places": set_place,
    "in place": in_place,
    "arithmetic": lambda acts: 2 * acts - acts / 3 + 1 + (1 - acts) * torch.ones(D_SAE),
    "with itself": lambda acts: acts + acts * acts.clone(),
    "where": lambda acts: torch.where(acts > 0.5, acts, 0),
    "masked_fill": lambda acts: acts.masked_fill(acts > 0.5, 0),
    "relu": lambda acts: torch.relu(acts - 0.1),
    "zeros_like": torch.zeros_like,
    "index_fill": lambda acts: acts.index_fill(-1, torch.tensor([1, 3]), 0.0),
    "copy_": lambda acts: acts.clone().copy_(torch.ones(B, T, D_SAE)),
    "to float64": lambda acts: acts.to(torch.float64),
    "double and float": lambda acts: acts.double().float(),
    "deepcopy": lambda acts: copy.deepcopy(acts),
    "data": lambda acts: acts.data,
    "by name": lambda acts: torch.relu_(input=torch.relu(input=acts - 0.1)),
    "a window in place": window_in_place,
    "contiguous": lambda acts: acts.contiguous(),
}
# What takes some of the positions, or has them in another shape.
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "window": lambda of: of[1],
    "slice": lambda of: of[:, 2:5],
    "steps": lambda of: of[::2, 1::3],
    "position": lambda of: of[:, -1],
    "ellipsis": lambda of: of[1:, ...],
    "whole slices": lambda of: of[1:, :, :],
    "none": lambda of: of[None, :, 1:],
    "rows": lambda of: of[ROWS],
    "list": lambda of: of[[2, 0]],
    "mask": lambda of: of[PLACES],
    "numpy's mask": lambda of: of[PLACES.numpy()],
    "positions": lambda of: of[:, ROWS],
    "flatten": lambda of: of.flatten(0, 1),
    "reshape": lambda of: of.reshape(B * T, -1),
    "view": lambda of: of.view(T, B, of.shape[-1]),
    "unsqueeze": lambda of: of.unsqueeze(0).squeeze(0),
    "cat": lambda of: torch.cat([of[:1], of[2:]]),
    "cat along positions": lambda of: torch.cat([of[:, 5:], of[:, :2]], dim=1),
    "stack": lambda of: torch.stack([of[2], of[0]]),
    "split": lambda of: torch.cat(of.split(2, dim=1)[1:3], dim=1),
    "chunk": lambda of: of.chunk(3)[2],
    "unbind": lambda of: of.unbind(1)[4],
    "index_select": lambda of: of.index_select(0, ROWS),
    "narrow": lambda of: of.narrow(1, 3, 4),
    "select": lambda of: of.select(0, 2),
    "along an axis": lambda of: torch.cat(of.unbind(axis=1)[2:4], axis=-2),
}
# What has other features, or of which the positions are not known.
LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda acts: acts.flip(0),
    "roll": lambda acts: acts.roll(1, 1),
    "transpose": lambda acts: acts[:, :B].transpose(0, 1),
    "permuted by an index": lambda acts: acts.gather(0, torch.tensor([2, 1, 0])[:, None, None].expand_as(acts)),
    "new": lambda acts: torch.ones(B, T, D_SAE),
    "through numpy": lambda acts: torch.from_numpy(acts.numpy().copy()),
    "sorted": lambda acts: acts.sort(dim=0).values,
    "repeated": lambda acts: acts.repeat(1, 1, 1),
    "index_copy": lambda acts: acts.index_copy(0, torch.tensor([2, 1, 0]), acts),
    "joined by name": lambda acts: torch.cat(tensors=[acts[:1], acts[1:]]),
    "taken by name": lambda acts: torch.index_select(input=acts, dim=0, index=ROWS),
    "features along an axis": lambda acts: torch.stack(acts.unbind(axis=-1), -1),
    "a feature along an axis": lambda acts: torch.stack([acts.select(axis=2, index=0)] * D_SAE, dim=2),
    "features joined along an axis": lambda acts: torch.cat([acts, acts], axis=-1)[..., :D_SAE],
    "in place transposed": lambda acts: acts[:, :B].clone().transpose_(0, 1),
}


def plain(acts: Tensor) -> Tensor:
    return acts.as_subclass(Tensor).clone()


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_decoded_with_their_own_c(edit: str, dense: DenseSAE) -> None:
    acts = dense.encode(activations(B, T))
    own, c = plain(acts), carried_of(acts)
    wanted = EDITS[edit](own.clone()).float() @ dense.W_dec + dense.b_dec + c
    edited = EDITS[edit](acts)
    dense.encode(activations(B, T) + 1)
    assert isinstance(edited, FeatureActs)
    torch.testing.assert_close(dense.decode(edited), wanted)
    torch.testing.assert_close(dense.decode(plain(edited), c), wanted)


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_decoded_with_their_part_of_c(part: str, dense: DenseSAE) -> None:
    acts = dense.encode(activations(B, T))
    own, c = plain(acts), carried_of(acts)
    wanted = PARTS[part](own) @ dense.W_dec + dense.b_dec + PARTS[part](c)
    taken = PARTS[part](acts)
    dense.encode(activations(B, T) + 1)
    torch.testing.assert_close(dense.decode(taken), wanted)


@pytest.mark.parametrize("edit", LOST)
def test_what_is_not_known_is_refused(edit: str, dense: DenseSAE) -> None:
    acts = LOST[edit](dense.encode(activations(B, T)))
    with pytest.raises(ValueError, match="what was carried there is not known"):
        dense.decode(acts)


def test_activations_of_two_windows_are_of_neither(dense: DenseSAE) -> None:
    one, other = dense.encode(activations(B, T)), dense.encode(activations(B, T) + 1)
    mixed = torch.zeros_like(one)
    mixed[0] = other[0]
    for acts in (one + other, torch.where(one > 0, one, other), one.clone().copy_(other), mixed):
        with pytest.raises(ValueError, match="what was carried there is not known"):
            dense.decode(acts)
    joined = torch.cat([one, other[:1]])
    c = torch.cat([carried_of(one), carried_of(other)[:1]])
    torch.testing.assert_close(dense.decode(joined), plain(joined) @ dense.W_dec + dense.b_dec + c)


OVERWRITE: dict[str, Callable[[Tensor, Tensor], object]] = {
    "detached": lambda one, other: one.detach().copy_(other),
    "data": lambda one, other: one.data.copy_(other),
    "data replaced": lambda one, other: setattr(one, "data", other.data),
    "window": lambda one, other: one[0].copy_(other[0]),
    "view": lambda one, other: one.view(-1, D_SAE).copy_(other.view(-1, D_SAE)),
    "view of a view": lambda one, other: one[1:][1].copy_(other[0]),
    "out": lambda one, other: torch.mul(other, 2, out=one),
    "out of a view": lambda one, other: torch.mul(other, 2, out=one.detach()),
    "out of an index": lambda one, other: torch.index_select(other, 0, ROWS, out=one[:2]),
    "positions exchanged": lambda one, other: one.__setitem__(0, one[1]),
    "list": lambda one, other: torch._foreach_copy_([one], [other]),
}


@pytest.mark.parametrize("way", OVERWRITE)
def test_what_is_overwritten_by_another_window_is_refused(way: str, dense: DenseSAE) -> None:
    one, other = dense.encode(activations(B, T)), dense.encode(activations(B, T) + 1)
    copied, c = one.clone(), carried_of(one)
    wanted = plain(copied) @ dense.W_dec + dense.b_dec + c
    OVERWRITE[way](one, other)
    with pytest.raises(ValueError, match="what was carried there is not known"):
        dense.decode(one)
    torch.testing.assert_close(dense.decode(copied), wanted)  # a copy has its own memory
    if way != "data replaced":
        assert other.carried is not None


def test_no_view_of_what_is_overwritten_knows_any_more(dense: DenseSAE) -> None:
    one, other = dense.encode(activations(B, T)), dense.encode(activations(B, T) + 1)
    views = one[1], one.view(-1, D_SAE), one.detach(), one.flatten(0, 1), *one.unbind()
    one.copy_(other)
    for view in views:
        with pytest.raises(ValueError, match="what was carried there is not known"):
            dense.decode(view)


def test_some_features_are_an_ordinary_tensor(dense: DenseSAE) -> None:
    acts = dense.encode(activations(B, T))
    found = acts[..., 3], acts[:, :, :5], acts[1, 2, 3], acts[acts > 0], acts.sum(-1), acts > 0, acts @ dense.W_dec
    assert all(type(of) is Tensor for of in found)
    assert acts[..., :].carried is not None
    with pytest.raises(ValueError, match=r"c is \[3, 8, 7\]"):
        dense.decode(acts, carried_of(acts)[:, 1:])
