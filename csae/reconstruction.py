"""How well SAEs reconstruct windows of activations: running sums over batches, and the figures that they give."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csae.contextual_sae import ContextualSAE
from csae.data.activations import Batch
from csae.errors import UserError
from csae.sae import SAE, Output


def run_form(sae: SAE, acts: Tensor, mask: Tensor, documents: Tensor, exact: bool) -> Output:
    """The output of an SAE on windows [B, T, d_in], in the exact form or in sweeps where it has two forms."""
    if isinstance(sae, ContextualSAE):
        return sae(acts, mask, documents, exact=exact)
    return sae(acts, mask, documents)


class Summed(NamedTuple):
    """The sums of `Wanted`: what other ranks need of it."""

    tokens: int
    squares: float
    b: Tensor | None
    total: Tensor | None


class Wanted:
    """What is to be reconstructed at one place, and its variance around the mean of all positions."""

    def __init__(self) -> None:
        self.tokens, self.squares = 0, 0.0
        self.b: Tensor | None = None
        self.total: Tensor | None = None

    def add(self, batch: Batch) -> Tensor:
        """The positions of a batch that are in the mask: [tokens, d_out] float64."""
        wanted = (batch.acts if batch.target is None else batch.target)[batch.mask].double()
        # The sums for the variance are taken around the first batch's mean, so that a large mean costs no digits.
        self.b = wanted.mean(dim=0) if self.b is None and len(wanted) else self.b
        centred = wanted if self.b is None else wanted - self.b
        total = centred.sum(dim=0)
        self.total = total if self.total is None else self.total + total
        self.squares += float(centred.square().sum())
        self.tokens += len(wanted)
        return wanted

    def summed(self) -> Summed:
        """What other ranks need of it."""
        return Summed(self.tokens, self.squares, *(None if x is None else x.cpu() for x in (self.b, self.total)))

    @classmethod
    def of_ranks(cls, parts: Sequence[Summed]) -> Wanted:
        """What one process would have of the batches of all of them, but for rounding of float64."""
        whole = cls()
        for part in parts:  # in their order, so that all ranks have the same bits
            if part.b is None or part.total is None:
                continue
            if whole.b is None or whole.total is None:
                whole.b, whole.total = part.b, torch.zeros_like(part.total)
            moved = part.b - whole.b
            whole.total = whole.total + part.total + part.tokens * moved
            whole.squares += part.squares + float(2 * (moved @ part.total) + part.tokens * moved.square().sum())
            whole.tokens += part.tokens
        return whole

    def variance(self, n_windows: int) -> float:
        """The squared distances from the mean, summed. Raises UserError where there is none."""
        if self.tokens == 0 or self.total is None:
            raise UserError(f"the mask leaves out every position of the {n_windows} windows: nothing to evaluate on")
        variance = self.squares - float(self.total.square().sum()) / self.tokens
        if not variance > 1e-12 * self.squares:  # below this the difference is rounding only
            raise UserError("the activations to evaluate on are all the same: there is no variance to explain")
        return variance


class Reconstruction:
    """Of one SAE, in each of its forms."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.forms = [_Form(sae, exact=True)]
        if isinstance(sae, ContextualSAE):
            self.forms.append(_Form(sae, exact=False))

    def add(self, batch: Batch, wanted: Tensor) -> None:
        """wanted: what `Wanted.add` gave for this batch."""
        for form in self.forms:
            form.add(batch, wanted)

    def summed(self) -> list[tuple[Any, ...]]:
        """What other ranks need of it."""
        return [form.summed() for form in self.forms]

    @classmethod
    def of_ranks(cls, sae: SAE, parts: Sequence[list[tuple[Any, ...]]]) -> Reconstruction:
        """What one process would have of the batches of all of them, but for rounding of float64."""
        whole = cls(sae)
        for part in parts:
            for form, sums in zip(whole.forms, part, strict=True):
                form.take(*sums)
        return whole

    def figures(self, wanted: Wanted, n_windows: int) -> dict[str, Any]:
        """See `csae.evaluate.evaluate`. Raises UserError where a figure is not finite."""
        sae, tokens, variance = self.sae, wanted.tokens, wanted.variance(n_windows)
        exact = self.forms[0].figures(tokens, variance)
        result = {
            "arch": sae.arch,
            "k": sae.k,
            "selection": sae.selection,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "n_params": sae.n_params,
            "windows": n_windows,
            "tokens": tokens,
            **exact,
            "dead": sae.dead_features().numel() / sae.d_sae,
            "silent": 1 - int(self.forms[0].fired.sum()) / sae.d_sae,
        }
        if isinstance(sae, ContextualSAE):
            in_sweeps = self.forms[1].figures(tokens, variance)
            result |= {"query": sae.query, "sweeps": sae.sweeps, "fvu_exact": exact["fvu"]}
            result |= {f"{name}_sweeps": figure for name, figure in in_sweeps.items()}
            result["gap"] = exact["fvu"] / in_sweeps["fvu"] - 1 if in_sweeps["fvu"] > 0 else 0.0
        for name, figure in result.items():
            if isinstance(figure, float) and not math.isfinite(figure):
                raise UserError(
                    f"{name} is {figure}: the SAE's reconstruction overflows; train it again, at a lower lr"
                )
        return result


class _Form:
    """Running sums over batches for one form of an SAE: exact, or in sweeps."""

    def __init__(self, sae: SAE, exact: bool) -> None:
        self.sae, self.exact = sae, exact
        self.squared_error = self.cosines = self.seconds = 0.0
        self.active = 0
        self.fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_dec.device)

    def add(self, batch: Batch, wanted: Tensor) -> None:
        start = _now(batch.acts.device)
        out = run_form(self.sae, batch.acts, batch.mask, batch.documents, self.exact)
        self.seconds += _now(batch.acts.device) - start
        x_hat = out.x_hat[batch.mask].double()  # [tokens, d_out]
        self.squared_error += float((wanted - x_hat).square().sum())
        self.cosines += float(torch.cosine_similarity(wanted, x_hat, dim=1).sum())
        active = out.code.values[batch.mask] > 0  # [tokens, k]
        self.active += int(active.sum())
        self.fired[out.code.indices[batch.mask][active]] = True

    def summed(self) -> tuple[Any, ...]:
        return self.squared_error, self.cosines, self.seconds, self.active, self.fired.cpu()

    def take(self, squared_error: float, cosines: float, seconds: float, active: int, fired: Tensor) -> None:
        """More sums, of another rank."""
        self.squared_error += squared_error
        self.cosines += cosines
        self.seconds += seconds
        self.active += active
        self.fired |= fired.to(self.fired.device)

    def figures(self, tokens: int, variance: float) -> dict[str, float]:
        return {
            "fvu": self.squared_error / variance,
            "l0": self.active / tokens,
            "cosine": self.cosines / tokens,
            "tokens_per_s": tokens / max(self.seconds, 1e-9),
        }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
