"""What a user of PyTorch would write: dense, dense and compiled, and the best sparse combination of PyTorch's ops.

The sparse one selects without recording a graph, computes the k chosen pre-activations again from their rows, and
decodes with `embedding_bag`. So only the encoder's product is dense, and nothing is multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag, linear

from .data import Built, Data
from .step import LR, Step

Encoder = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
Autoencoder = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def product(data: Data) -> Built:
    """The encoder's product alone, in the dtype of the case."""
    out = torch.empty(data.shape.n, data.shape.d_sae, dtype=data.dtype, device=data.device)
    x, W_enc = data.x, data.W_enc
    return Built(lambda: torch.mm(x, W_enc.T, out=out), dict)


# --- encode ----------------------------------------------------------------------------------------------


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = linear(x, W_enc, b_enc).topk(k)
    return found.values.relu(), found.indices


def encode(encoder: Encoder) -> Callable[[Data], Built]:
    """The forward pass of a function with `topk_encode`'s signature."""

    def build(data: Data) -> Built:
        x, W_enc, b_enc, k = data.x, data.W_enc, data.b_enc, data.shape.k
        return Built(
            lambda: encoder(x, W_enc, b_enc, k),
            lambda: dict(zip(("values", "indices"), encoder(x, W_enc, b_enc, k), strict=True)),
        )

    return build


def compiled_encode(data: Data) -> Built:
    return encode(compiled(dense_encode))(data)


# --- decode ----------------------------------------------------------------------------------------------


def dense_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    acts = values.new_zeros(values.shape[0], W_dec.shape[0]).scatter(1, indices, values)
    return acts @ W_dec


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")


def decode(decoder: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Data], Built]:
    """The forward pass of a function with `sparse_decode`'s signature."""

    def build(data: Data) -> Built:
        (values, indices), W_dec = data.code, data.W_dec
        return Built(lambda: decoder(values, indices, W_dec), lambda: {"x_hat": decoder(values, indices, W_dec)})

    return build


# --- encode and decode, forward and backward ---------------------------------------------------------------


def dense_autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
    pre_acts = linear(x, W_enc, b_enc)
    found = pre_acts.topk(k)
    acts = torch.zeros_like(pre_acts).scatter(1, found.indices, found.values.relu())
    return acts @ W_dec


def sparse_autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
    return sparse_decode(*sparse_encode(x, W_enc, b_enc, k), W_dec)


def sparse_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        indices = linear(x, W_enc, b_enc).topk(k, sorted=False).indices
    chosen = embedding(indices, W_enc)  # [n, k, d_in]
    values = torch.bmm(chosen, x.to(W_enc.dtype).unsqueeze(2)).squeeze(2) + b_enc[indices]
    return values.relu(), indices


def forward_backward(autoencode: Autoencoder) -> Callable[[Data], Built]:
    """The reconstruction and the gradients of W_enc, b_enc, W_dec."""

    def build(data: Data) -> Built:
        x, grad, k = data.x, data.grad, data.shape.k
        weights = [tensor.detach().requires_grad_() for tensor in (data.W_enc, data.b_enc, data.W_dec)]
        W_enc, b_enc, W_dec = weights

        def run() -> tuple[Tensor, ...]:
            x_hat = autoencode(x, W_enc, b_enc, W_dec, k)
            return x_hat, *torch.autograd.grad(x_hat, weights, grad)

        return Built(run, lambda: _named(run()))

    return build


def backward(autoencode: Autoencoder) -> Callable[[Data], Built]:
    """The gradients of W_enc, b_enc, W_dec, without the forward pass, which runs once."""

    def build(data: Data) -> Built:
        weights = [tensor.detach().requires_grad_() for tensor in (data.W_enc, data.b_enc, data.W_dec)]
        W_enc, b_enc, W_dec = weights
        x_hat, grad = autoencode(data.x, W_enc, b_enc, W_dec, data.shape.k), data.grad

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(x_hat, weights, grad, retain_graph=True)

        return Built(run, lambda: _named((x_hat, *run())))

    return build


def compiled_forward_backward(data: Data) -> Built:
    return forward_backward(compiled(dense_autoencode))(data)


def _named(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("x_hat", "W_enc", "b_enc", "W_dec"), found, strict=True))


# --- training steps ----------------------------------------------------------------------------------------


def step(autoencode: Autoencoder, compile_it: bool = False) -> Callable[[Data], Built]:
    """A TopK training step with a fused Adam. compile_it: the loss and the norms of W_dec are compiled too."""

    def build(data: Data) -> Built:
        wrap = compiled if compile_it else (lambda function: function)
        state = Step(data.weights)
        W_enc, b_enc, W_dec, b_dec = state.own()
        loss, project, normalise = wrap(_loss(autoencode)), wrap(_project), wrap(_normalise)
        optimizer = torch.optim.Adam(state.parameters, lr=LR, fused=True)
        x, k = data.x.float(), data.shape.k

        def run() -> None:
            optimizer.zero_grad()
            loss(x, W_enc, b_enc, W_dec, b_dec, k, data.dtype).backward()
            with torch.no_grad():
                project(W_dec, W_dec.grad)
                optimizer.step()
                normalise(W_dec)

        return state.built(run)

    return build


@cache
def _loss(autoencode: Autoencoder) -> Callable[..., Tensor]:
    """The fraction of variance unexplained. One function for each autoencoder, so that it is compiled once."""

    def loss(
        x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, dtype: torch.dtype
    ) -> Tensor:
        x_hat = autoencode((x - b_dec).to(dtype), W_enc.to(dtype), b_enc.to(dtype), W_dec.to(dtype), k) + b_dec
        return (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()

    return loss


def _project(W_dec: Tensor, grad: Tensor) -> None:
    """Take from the gradient of unit rows what would only change their length."""
    grad.sub_((grad * W_dec).sum(dim=1, keepdim=True) * W_dec)


def _normalise(W_dec: Tensor) -> None:
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))


@cache
def compiled(function: Callable) -> Callable:
    """torch.compile, cached: an implementation that is built again for the same shapes is not compiled again."""
    return torch.compile(function, dynamic=False)
