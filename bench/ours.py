"""The implementations of this package: the ops, and a whole training step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csae import SAE, ContextualSAE, TopKSAE
from csae.adam import Adam
from csae.graphs import CALLS, Graphs, Inputs
from csae.ops import batch_topk_encode, sparse_decode, threshold_encode, topk_encode
from csae.selection import slots

from .data import Built, Data, Skip
from .step import LR, SLOWER, Step


def autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
    return sparse_decode(*topk_encode(x, W_enc, b_enc, k), W_dec)


def topk_by_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Another exact selection, on CUDA: a threshold from a sample of columns, and a count that proves it low enough."""
    if x.device.type != "cuda":
        raise Skip("a Triton kernel: needs CUDA")
    try:
        module = importlib.import_module("csae.kernels.triton.topk_threshold")
    except ImportError as error:
        raise Skip(f"not in this build: {error}") from error
    return module.topk_encode(x, W_enc, b_enc, k)


def above_threshold(data: Data) -> Built:
    """`threshold_encode` with the threshold that leaves k features a token on average, as a BatchTopK SAE is used."""
    given, shape = (data.x, data.W_enc, data.b_enc), data.shape
    k_max = slots("batch", shape.k, None, shape.d_sae)
    threshold = batch_topk_encode(*given, shape.k, k_max)[2]
    return Built(lambda: threshold_encode(*given, threshold, k_max), dict)


def topk_sae(data: Data) -> tuple[SAE, dict[str, Tensor]]:
    shape = data.shape
    with data.device:
        return TopKSAE(shape.d_in, shape.d_sae, shape.k), data.weights


def shared_budget_sae(data: Data) -> tuple[SAE, dict[str, Tensor]]:
    shape = data.shape
    with data.device:
        return TopKSAE(shape.d_in, shape.d_sae, shape.k, selection="batch"), data.weights


def contextual_sae(data: Data) -> tuple[SAE, dict[str, Tensor]]:
    shape = data.shape
    heads = (shape.heads, shape.d_head, shape.d_value, shape.d_memory)
    with data.device:
        return ContextualSAE(shape.d_in, shape.d_sae, shape.k, *heads, sweeps=1), data.weights | data.look_back


def uncompared(build: Callable[[Data], Built]) -> Callable[[Data], Built]:
    """Timed beside the implementations of a case, without being compared with them."""
    return lambda data: build(data)._replace(outputs=dict)


MakeSAE = Callable[[Data], tuple[SAE, dict[str, Tensor]]]


def step(make: MakeSAE, **how: Any) -> Callable[[Data], Built]:
    """The step of `csae train`: gradients in factors, and `csae.Adam`, which is made with `how`.

    As there, dead features are looked for before, not in each step.
    """

    def build(data: Data) -> Built:
        sae, state, acts, mask, documents = _begin(make, data)
        optimizer = Adam(sae, LR, **{"eps": 1e-8} | how)  # as the other implementations, whose steps are compared
        dead = sae.dead_features()

        def run() -> None:
            with optimizer.copies.used(), data.autocast:
                losses, gradients = sae.gradients(acts, mask, documents, dead)
            optimizer.update(gradients)
            sae.track(losses.code, mask)

        return state.built(run)

    return build


def captured_step(make: MakeSAE) -> Callable[[Data], Built]:
    """The same step as one CUDA graph, as `csae train` runs it on CUDA; captured before it is timed."""

    def build(data: Data) -> Built:
        graphs = _graphs(data.device)
        sae, _, acts, mask, documents = _begin(make, data)
        optimizer = Adam(sae, LR, eps=1e-8)
        inputs = {"acts": acts, "mask": mask, "documents": documents, "dead": sae.dead_features()}

        def once(given: Inputs) -> None:
            with data.autocast:
                losses, gradients = sae.gradients(given["acts"], given["mask"], given["documents"], given["dead"])
            optimizer.update(gradients)
            sae.track(losses.code, given["mask"])

        def run() -> None:
            with optimizer.copies.used():
                graphs.run("step", once, inputs, optimizer.replayed, optimizer.copies.forget)

        for _ in range(CALLS + 1):
            run()
        if graphs.refused:
            raise Skip("a step can't be captured as a CUDA graph")
        return Built(run, dict)

    return build


def _graphs(device: torch.device) -> Graphs:
    if device.type != "cuda":
        raise Skip("a CUDA graph: needs CUDA")
    return Graphs(device)


def factors(make: MakeSAE) -> Callable[[Data], Built]:
    """The loss and its gradients in factors, without the optimizer."""

    def build(data: Data) -> Built:
        sae, _, acts, mask, documents = _begin(make, data)

        def run() -> None:
            with data.autocast:
                sae.gradients(acts, mask, documents)

        return Built(run, dict)

    return build


def autograd_step(make: MakeSAE) -> Callable[[Data], Built]:
    """The same step by `loss.backward()` and a fused `torch.optim.Adam`."""

    def build(data: Data) -> Built:
        sae, state, acts, mask, documents = _begin(make, data)
        groups: list[dict] = [{"params": [], "lr": LR}, {"params": [], "lr": SLOWER}]
        for name, parameter in sae.named_parameters():
            groups[name in sae.look_back]["params"].append(parameter)
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)

        def run() -> None:
            with data.autocast:
                losses = sae.loss(acts, mask, documents, sae.dead_features())
            optimizer.zero_grad()
            losses.loss.backward()
            sae.remove_parallel_gradient()
            optimizer.step()
            sae.normalise_decoder()
            sae.track(losses.code, mask)

        return state.built(run)

    return build


def _begin(make: MakeSAE, data: Data) -> tuple[SAE, Step, Tensor, Tensor, Tensor]:
    """The SAE with the data's weights, and acts [B, T, d_in], mask and documents [B, T]."""
    sae, weights = make(data)
    state = Step(weights)
    state.load(dict(sae.named_parameters()))
    shape = (data.shape.windows, data.shape.T)
    acts = data.x.float().view(*shape, data.shape.d_in)
    mask = torch.ones(shape, dtype=torch.bool, device=data.device)
    return sae, state, acts, mask, torch.zeros(shape, dtype=torch.int64, device=data.device)
