"""Training in one process and over several, on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csae import SAE, Adam, ContextualSAE, TopKSAE
from csae.distributed import Ranks, sharded
from csae.sae import Sweeps

D_IN, T = 20, 12


class Case(NamedTuple):
    """What is trained, and how; small enough for a second."""

    arch: str = "topk"
    sae: dict[str, Any] = {}  # noqa: RUF012
    d_out: int | None = None
    windows: int = 12
    steps: int = 50
    moments: torch.dtype = torch.float32
    lazy: bool = False
    from_exact: bool = False
    autocast: bool = False
    broken: bool = False
    """whether a token is NaN"""
    masked: bool = True
    dead_after: int = 100
    d_sae: int = 70
    k: int = 4
    eps: float = 1e-8
    """of Adam"""


class Trained(NamedTuple):
    """What training left: whole tables, in one process or of all."""

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    tokens_since_fired: Tensor
    losses: Tensor  # [steps, 3]
    codes: list[tuple[Tensor, Tensor]]  # of each step, of the windows of this process


def make(case: Case) -> SAE:
    sizes: dict[str, Any] = {"d_in": D_IN, "d_sae": case.d_sae, "k": case.k, "k_aux": 6, "dead_after": case.dead_after}
    sizes |= {"d_out": case.d_out} | case.sae
    torch.manual_seed(3)
    if case.arch == "topk":
        return TopKSAE(**sizes)
    return ContextualSAE(**sizes, n_heads=2, d_head=3, d_value=5, d_memory=9)


def batch(case: Case, step: int) -> dict[str, Tensor]:
    """Windows of few directions each, so that features are found and others die."""
    random = torch.Generator().manual_seed(100 + step)
    B = case.windows
    directions = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(1))
    strengths = torch.rand(B, T, 40, generator=random) * (torch.rand(B, T, 40, generator=random) < 0.1)
    acts = 3 * strengths @ directions + 0.1 * torch.randn(B, T, D_IN, generator=random) + 0.5
    mask = torch.rand(B, T, generator=random) > (0.2 if case.masked else -1)
    documents = torch.where(torch.arange(T) < torch.randint(0, T, (B, 1), generator=random), 0, 7)
    given = {"acts": acts, "mask": mask, "documents": documents}
    if case.d_out is not None:
        given["target"] = acts @ torch.randn(D_IN, case.d_out, generator=torch.Generator().manual_seed(2)) + 1
    if case.broken and step == case.steps - 1:
        given["acts"][1, 3, 2] = torch.nan
        mask[1, 3] = True
    return given


def share(given: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """A rank's windows; what is missed at the end is all masked."""
    B = len(given["acts"])
    own = -(-B // ranks.size)
    found = {}
    for name, tensor in given.items():
        here = tensor[ranks.rank * own : (ranks.rank + 1) * own]
        found[name] = torch.cat([here, here.new_zeros(own - len(here), *here.shape[1:])])
    return found


def train(case: Case, ranks: Ranks | None, started: Callable[[SAE], None] = lambda sae: None) -> Trained:
    """Train the case for its steps."""
    sae = make(case) if ranks is None else sharded(lambda: make(case), ranks)
    of_target = {} if case.d_out is None else {"target_mean": torch.ones(case.d_out), "target_scale": 2.0}
    sae.initialise(torch.full((D_IN,), 0.4), 1.7, **of_target)
    started(sae)
    optimizer = Adam(sae, 3e-3, eps=case.eps, lazy=case.lazy, moments=case.moments)
    losses, codes, dead = [], [], None
    for step in range(case.steps):
        given = batch(case, step)
        given = given if ranks is None else share(given, ranks)
        sweeps = None if case.arch == "topk" else Sweeps(1 + step % 2, from_exact=case.from_exact)
        dead = sae.dead_features() if step % 5 == 0 else dead
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
            found, gradients = sae.gradients(**given, dead=dead, sweeps=sweeps)
        optimizer.update(gradients)
        sae.track(found.code, given["mask"])
        losses.append(torch.stack(found[:3]))
        codes.append(tuple(found.code))
    return trained(sae, optimizer)._replace(losses=torch.stack(losses), codes=codes)


def trained(sae: SAE, optimizer: Adam) -> Trained:
    """What is here of them; no losses, no codes."""
    parameters = {name: of.detach() for name, of in sae.named_parameters()}
    moments = {
        f"{optimizer.names[of]}.{name}": state[name]
        for of, state in optimizer.state.items()
        for name in ("exp_avg", "exp_avg_sq", "step")
    }
    return Trained(parameters, moments, sae.tokens_since_fired, torch.empty(0, 3), [])
