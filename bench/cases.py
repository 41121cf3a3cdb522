"""What is measured: each case with its implementations, its reference in float64, and its floor.

The floor is a time that no implementation can go below on the device. A part of the work takes the longer of two
times: its operations at the rate of a matrix product, and its bytes at the rate of a copy. Parts that need each other's
results add up. Gathered rows count as read from memory each time. Where a cache serves them, an implementation can be
faster than the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from csae import reference
from csae.ops import lookback_attention, sparse_decode, topk_encode

from . import attention, ours, peers, plain
from .data import Built, Data, Shape
from .peer_topk import TOPK
from .step import LR, SLOWER, direction

Build = Callable[[Data], Built]
OURS = "csae"


class Work(NamedTuple):
    """A part of a case's work. Its operations and its bytes can overlap; those of two parts can't."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """A thing to measure."""

    name: str
    floor: Callable[[Shape, int], list[Work]]
    """given the shape, and the bytes of a number in the dtype of the products"""
    reference: Callable[[Data], dict[str, Tensor]]
    """what the implementations' `outputs` have to be, computed in float64"""
    implementations: dict[str, Build]
    """by name; ours first: the others are compared with it at full size"""


# --- references ------------------------------------------------------------------------------------------------


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def _encode_reference(data: Data) -> dict[str, Tensor]:
    x, W_enc, b_enc = _wide(data.x, data.W_enc, data.b_enc)
    return dict(zip(("values", "indices"), reference.topk_encode(x, W_enc, b_enc, data.shape.k), strict=True))


def _decode_reference(data: Data) -> dict[str, Tensor]:
    values, indices = data.code
    return {"x_hat": reference.sparse_decode(values.double(), indices, data.W_dec.double())}


def _autoencode_reference(data: Data) -> dict[str, Tensor]:
    x, grad = _wide(data.x, data.grad)
    W_enc, b_enc, W_dec = weights = [tensor.requires_grad_() for tensor in _wide(data.W_enc, data.b_enc, data.W_dec)]
    values, indices = reference.topk_encode(x, W_enc, b_enc, data.shape.k)
    x_hat = reference.sparse_decode(values, indices, W_dec)
    found = (x_hat, *torch.autograd.grad(x_hat, weights, grad))
    return dict(zip(("x_hat", "W_enc", "b_enc", "W_dec"), found, strict=True))


def _look_back_reference(data: Data) -> dict[str, Tensor]:
    inputs = [tensor.requires_grad_() for tensor in _wide(*data.qkv, data.slope, data.null)]
    out = reference.lookback_attention(*inputs)
    found = (out, *torch.autograd.grad(out, inputs, data.grad_look_back.double()))
    return dict(zip(("out", "q", "k", "v", "slope", "null"), found, strict=True))


def _topk_step_reference(data: Data) -> dict[str, Tensor]:
    """Also with the step of a decoder whose rows don't keep unit norm: SAELens has such a decoder."""
    x = data.x.double()

    def forward(W: dict[str, Tensor]) -> Tensor:
        return reference.topk_sae(x, W["W_enc"], W["b_enc"], W["W_dec"], W["b_dec"], data.shape.k).x_hat

    free = _first_step(data.weights, forward, x, unit_rows=False)
    return _first_step(data.weights, forward, x) | {peers.FREE_ROWS: free["W_dec"]}


def _contextual_step_reference(data: Data) -> dict[str, Tensor]:
    shape = data.shape
    x = data.x.double().view(shape.windows, shape.T, shape.d_in)

    def forward(W: dict[str, Tensor]) -> Tensor:
        weights = reference.ContextualWeights(**W)
        return reference.contextual_sweeps(x, weights, shape.k, "current", sweeps=1).x_hat

    return _first_step(data.weights | data.look_back, forward, x, slower=tuple(data.look_back))


def _first_step(
    weights: dict[str, Tensor],
    forward: Callable[[dict[str, Tensor]], Tensor],
    x: Tensor,
    slower: tuple[str, ...] = (),
    unit_rows: bool = True,
) -> dict[str, Tensor]:
    """The direction in which Adam's first step moves each weight; the loss is the fraction of variance unexplained.

    slower: names of the weights with the learning rate SLOWER. unit_rows: W_dec's rows keep unit norm.
    """
    start = {name: tensor.double() for name, tensor in weights.items()}
    moved = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    groups = [{"params": [moved[name]], "lr": SLOWER if name in slower else LR} for name in moved]
    optimizer = torch.optim.Adam(groups)
    mean = x.flatten(0, -2).mean(dim=0)
    ((x - forward(moved)).square().sum() / (x - mean).square().sum()).backward()
    W_dec = moved["W_dec"]
    with torch.no_grad():
        if unit_rows:
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
        optimizer.step()
        if unit_rows:
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    return {name: direction(moved[name].detach() - start[name]) for name in moved}


# --- floors ------------------------------------------------------------------------------------------------


def _encode_floor(shape: Shape, itemsize: int) -> list[Work]:
    """The product in the dtype of the case. In float32, a CPU with bfloat16 units is faster, with the same result."""
    n, d, F = shape.n, shape.d_in, shape.d_sae
    return [Work(2 * n * d * F, (n * d + F * d) * itemsize + n * shape.k * (itemsize + 8))]


def _gather(shape: Shape, itemsize: int, d: int) -> Work:
    """k rows of width d read for each token, and one row written."""
    return Work(2 * shape.n * shape.k * d, (shape.n * shape.k * d + shape.n * d) * itemsize)


def _decode_floor(shape: Shape, itemsize: int) -> list[Work]:
    return [_gather(shape, itemsize, shape.d_in)]


def _backward_floor(shape: Shape, itemsize: int) -> list[Work]:
    """Two gathers (d values; the rows of both gradients), and both gradients written."""
    gathers = [_gather(shape, itemsize, shape.d_in)] * 2
    return [*gathers, Work(0, 2 * shape.d_sae * shape.d_in * itemsize)]


def _forward_backward_floor(shape: Shape, itemsize: int) -> list[Work]:
    return [*_encode_floor(shape, itemsize), *_decode_floor(shape, itemsize), *_backward_floor(shape, itemsize)]


def _look_back_floor(shape: Shape, itemsize: int) -> list[Work]:
    """Products for the pairs j < t: 4 of width d_head, 3 of width d_value. Each tensor is read or written once."""
    pairs = shape.n * shape.T / 2 * shape.heads
    forward = Work(
        2 * pairs * (shape.d_head + shape.d_value),
        2 * shape.n * shape.heads * (shape.d_head + shape.d_value) * itemsize,
    )
    backward = Work(
        2 * pairs * (3 * shape.d_head + 2 * shape.d_value),
        4 * shape.n * shape.heads * (shape.d_head + shape.d_value) * itemsize,
    )
    return [forward, backward]


def _adam(shape: Shape, width: int) -> Work:
    """A row of weights and two of moments for each feature, float32, read and written once. No gradient is read."""
    return Work(0, 6 * 4 * shape.d_sae * width)


def _topk_step_floor(shape: Shape, itemsize: int) -> list[Work]:
    gathers = [_gather(shape, itemsize, shape.d_in)] * 3
    return [*_encode_floor(shape, itemsize), *gathers, _adam(shape, 2 * shape.d_in)]


def _contextual_step_floor(shape: Shape, itemsize: int) -> list[Work]:
    """A TopK step, the second encode (by the cheaper of two products), the memory, the look-back, and Adam for these.

    The first code gets its gradient through the memory only: one more gather, for its part of W_enc's gradient.
    """
    n, d, F = shape.n, shape.d_in, shape.d_sae
    values = shape.heads * shape.d_value
    both = values + shape.heads * shape.d_head
    second = Work(2 * min(n * F * d, n * F * values + F * d * values), n * shape.k * (itemsize + 8))
    memory = [_gather(shape, itemsize, shape.d_memory)] * 3
    small = Work(3 * 2 * n * (d + shape.d_memory) * both, 0)
    rest = [_gather(shape, itemsize, d), *_look_back_floor(shape, itemsize), small, _adam(shape, shape.d_memory)]
    return [*_topk_step_floor(shape, itemsize), second, *memory, *rest]


# --- the registry --------------------------------------------------------------------------------------------

ENCODE = Case(
    "topk_encode forward",
    _encode_floor,
    _encode_reference,
    {
        OURS: plain.encode(topk_encode),
        "csae threshold": plain.encode(ours.topk_by_threshold),
        "csae, above a threshold": ours.above_threshold,
        "mm": plain.product,
        "PyTorch dense": plain.encode(plain.dense_encode),
        "PyTorch dense, compiled": plain.compiled_encode,
        **TOPK,
    },
)
DECODE = Case(
    "sparse_decode forward",
    _decode_floor,
    _decode_reference,
    {
        OURS: plain.decode(sparse_decode),
        "PyTorch dense": plain.decode(plain.dense_decode),
        "PyTorch sparse": plain.decode(plain.sparse_decode),
    },
)
FORWARD_BACKWARD = Case(
    "encode + decode forward + backward",
    _forward_backward_floor,
    _autoencode_reference,
    {
        OURS: plain.forward_backward(ours.autoencode),
        "mm": plain.product,
        "PyTorch dense": plain.forward_backward(plain.dense_autoencode),
        "PyTorch dense, compiled": plain.compiled_forward_backward,
        "PyTorch sparse": plain.forward_backward(plain.sparse_autoencode),
    },
)
BACKWARD = Case(
    "encode + decode backward",
    _backward_floor,
    _autoencode_reference,
    {
        OURS: plain.backward(ours.autoencode),
        "PyTorch dense": plain.backward(plain.dense_autoencode),
        "PyTorch sparse": plain.backward(plain.sparse_autoencode),
    },
)
LOOK_BACK = Case(
    "look-back forward + backward",
    _look_back_floor,
    _look_back_reference,
    {
        OURS: attention.look_back(lookback_attention),
        "FlexAttention, compiled": attention.look_back(attention.flex),
        "FlexAttention, compiled, null as a key": attention.look_back(attention.flex_null_key),
        "SDPA": attention.look_back(attention.sdpa),
    },
)
TOPK_STEP = Case(
    "TopK training step",
    _topk_step_floor,
    _topk_step_reference,
    {
        OURS: ours.step(ours.topk_sae),
        "csae, captured": ours.captured_step(ours.topk_sae),
        "csae, shared budget": ours.uncompared(ours.step(ours.shared_budget_sae)),
        # SparseAdam adds eps before the correction by beta2, not after. With this eps its first step is Adam's.
        "csae, lazy Adam": ours.step(ours.topk_sae, lazy=True, eps=1e-8 * (1 - 0.999) ** 0.5),
        "csae, bfloat16 moments": ours.step(ours.topk_sae, moments=torch.bfloat16),
        "csae, plain autograd + torch Adam": ours.autograd_step(ours.topk_sae),
        "mm": plain.product,
        "PyTorch dense": plain.step(plain.dense_autoencode),
        "PyTorch dense, compiled": plain.step(plain.dense_autoencode, compile_it=True),
        "PyTorch sparse": plain.step(plain.sparse_autoencode),
        "sparsify": peers.sparsify,
        "sparsify, patched": peers.sparsify_patched,
        "SAELens": peers.sae_lens,
        "SAELens, sparse activations": peers.sae_lens_sparse,
        "SAELens, patched": peers.sae_lens_patched,
        "dictionary_learning": peers.dictionary_learning,
        "dictionary_learning, patched": peers.dictionary_learning_patched,
    },
)
CONTEXTUAL_STEP = Case(
    "contextual training step, one sweep",
    _contextual_step_floor,
    _contextual_step_reference,
    {
        OURS: ours.step(ours.contextual_sae),
        "csae, captured": ours.captured_step(ours.contextual_sae),
        "csae, plain autograd + torch Adam": ours.autograd_step(ours.contextual_sae),
        "csae TopK step": ours.uncompared(ours.step(ours.topk_sae)),
        "mm": plain.product,
        "PyTorch sparse + SDPA": attention.contextual_step,
    },
)
CASES = {
    case.name: case for case in (ENCODE, DECODE, FORWARD_BACKWARD, BACKWARD, LOOK_BACK, TOPK_STEP, CONTEXTUAL_STEP)
}
