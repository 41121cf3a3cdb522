"""Training steps on several processes: ours, DistributedDataParallel of the same TopK SAE, and sparsify under it.

Each rank is given its own windows of one batch, the same for all implementations and numbers of ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from csae import SAE, ContextualSAE, TopKSAE
from csae.config import TrainConfig
from csae.data.activations import Batch
from csae.distributed import Ranks, sharded
from csae.step import adam, train_step

from .data import Skip
from .peers import needs
from .step import LR


class Sizes(NamedTuple):
    """Of a step."""

    n: int
    """tokens of all ranks together"""
    T: int
    """positions a window"""
    d_in: int
    d_sae: int
    k: int
    precision: str = "float32"

    @property
    def windows(self) -> int:
        return self.n // self.T


class Step(NamedTuple):
    """A step of training, ready to run on a rank."""

    run: Callable[[], float]
    """takes the step; gives the FVU before it, of this rank's tokens or of all"""
    held: Callable[[], dict[str, int]]
    """bytes between two steps: of weights, moments and gradients"""


Build = Callable[[Sizes, Ranks | None], Step]


def acts_of(sizes: Sizes, ranks: Ranks | None) -> Tensor:
    """This rank's windows of the batch, [windows / ranks, T, d_in]. Raises Skip where they can't be shared evenly."""
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    if sizes.windows % size:
        raise Skip(f"{sizes.windows} windows can't be shared by {size} ranks")
    whole = torch.randn(sizes.windows, sizes.T, sizes.d_in, generator=torch.Generator().manual_seed(1))
    return whole.chunk(size)[rank].contiguous()


def csae_topk(sizes: Sizes, ranks: Ranks | None) -> Step:
    return _ours(lambda: TopKSAE(sizes.d_in, sizes.d_sae, sizes.k), sizes, ranks)


def csae_contextual(sizes: Sizes, ranks: Ranks | None) -> Step:
    return _ours(lambda: ContextualSAE(sizes.d_in, sizes.d_sae, sizes.k), sizes, ranks)


def _ours(make: Callable[[], SAE], sizes: Sizes, ranks: Ranks | None) -> Step:
    """The step of `csae train`: sharded where there are several ranks."""
    torch.manual_seed(0)
    sae = make() if ranks is None else sharded(make, ranks)
    config = TrainConfig(steps=100, lr=LR, precision=sizes.precision)
    optimizer = adam(sae, config)
    acts = acts_of(sizes, ranks)
    whole = acts.new_ones(acts.shape[:-1], dtype=torch.bool)
    batch = Batch(acts, whole, whole.long(), None)

    def run() -> float:
        with optimizer.copies.used():
            losses, _ = train_step(sae, optimizer, batch, 50, config)  # neither warming up nor decaying
        return float(losses.fvu)

    return Step(run, lambda: _held(sae, optimizer))


class _Loss(nn.Module):
    """The loss as a module's forward pass, which is where DistributedDataParallel looks."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, acts: Tensor) -> tuple[Tensor, Tensor]:
        losses = self.sae.loss(acts)
        return losses.loss, losses.fvu.detach()


def ddp_topk(sizes: Sizes, ranks: Ranks | None) -> Step:
    """Plain data parallelism: each rank holds the whole SAE, and dense gradients are averaged over ranks."""
    torch.manual_seed(0)
    sae = TopKSAE(sizes.d_in, sizes.d_sae, sizes.k)
    module: nn.Module = _Loss(sae)
    if ranks is not None:
        # Buffers are not averaged: the count of dead features stays each rank's own, as cheap as it can be.
        module = DistributedDataParallel(module, broadcast_buffers=False)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    acts = acts_of(sizes, ranks)

    def run() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=sizes.precision == "bfloat16"):
            loss, fvu = module(acts)
        loss.backward()
        sae.remove_parallel_gradient()
        optimizer.step()
        sae.normalise_decoder()
        return float(fvu)

    return Step(run, lambda: _held(sae, optimizer, buckets=ranks is not None))


def ddp_sparsify(sizes: Sizes, ranks: Ranks | None) -> Step:
    """EleutherAI's SparseCoder; what `sparsify.Trainer.fit` and its hook do for one hookpoint under torchrun."""
    needs("eai-sparsify")
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder can't run on a CPU
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(sizes.d_in, SparseCoderConfig(num_latents=sizes.d_sae, k=sizes.k), dtype=torch.float32)
    torch.manual_seed(0)
    start = TopKSAE(sizes.d_in, sizes.d_sae, sizes.k)
    own = {"W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            own[name].copy_(parameter)
    del start
    module: nn.Module = sae if ranks is None else DistributedDataParallel(sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    since_fired = torch.zeros(sizes.d_sae, dtype=torch.int64)
    fired = torch.zeros(sizes.d_sae, dtype=torch.bool)
    acts = acts_of(sizes, ranks).flatten(0, 1)

    def over_ranks(x: Tensor, op: str = "mean") -> Tensor:
        if ranks is not None:
            dist.all_reduce(x, op=dist.ReduceOp.SUM if op == "mean" else dist.ReduceOp.MAX)
            if op == "mean":
                x /= ranks.size
        return x

    def run() -> float:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (acts - acts.mean(0)).pow(2).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=sizes.precision == "bfloat16"):
            out = module(x=acts, y=acts, dead_mask=None, total_variance=total_variance)
        fired[out.latent_indices.flatten()] = True
        over_ranks(fired, "max")
        fvu = float(over_ranks(out.fvu.detach().clone()))
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            since_fired.add_(sizes.n)
            since_fired[fired] = 0
            fired.zero_()
        return fvu

    return Step(run, lambda: _held(sae, optimizer, buckets=ranks is not None))


def _held(module: nn.Module, optimizer: torch.optim.Optimizer, buckets: bool = False) -> dict[str, int]:
    """Bytes by what they hold. buckets: DDP keeps a second copy of the gradients."""
    weights = _bytes(module.parameters())
    moments = sum(
        _bytes(value for value in state.values() if torch.is_tensor(value)) for state in optimizer.state.values()
    )
    gradients = _bytes(parameter.grad for parameter in module.parameters() if parameter.grad is not None)
    return {"weights": weights, "moments": moments, "gradients": gradients + (weights if buckets else 0)}


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


SPARSIFY = "DDP, sparsify"
IMPLEMENTATIONS: dict[str, Build] = {
    "csae TopK": csae_topk,
    "csae contextual": csae_contextual,
    "DDP, the same TopK SAE": ddp_topk,
    SPARSIFY: ddp_sparsify,
}
