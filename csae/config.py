"""What `csae train` is told: which SAE to make, and how to train it. Its options are made from these fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from csae.errors import UserError

if TYPE_CHECKING:
    from csae.sae import SAE

PRECISIONS = ("float32", "bfloat16")
SELECTIONS = ("topk", "batch", "jumprelu")
# The learning rate of a contextual SAE's look-back, as a share of that of the rest.
LOOK_BACK_LR = 0.5


def option(default: Any, help: str | None = None, choices: Sequence[str] | None = None) -> Any:
    """A field, with what the command line says of it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class SAEConfig:
    """Which SAE to make."""

    arch: str = option("contextual", choices=("contextual", "topk"))
    d_sae: int | None = option(None, "Number of features; 8 times the width if not given.")
    k: int = option(32, "Active features a token; on average, but for --selection topk.")
    selection: str = option("batch", choices=SELECTIONS)
    """which features are active: k for each token, as many of a batch together, or those above thresholds"""
    k_max: int | None = option(None, "The most a token can have; 4 k if not given.")
    heads: int = option(8, "Heads of the look-back.")
    d_head: int = option(32, "Width of a head's keys.")
    d_value: int = option(64, "Width of a head's values.")
    d_memory: int = option(256, "What a feature leaves in the memory.")
    k_mem: int | None = option(None, "Features of a code that are remembered; all if not given.")
    query: str = option("current", choices=("current", "past"))
    sweeps: int = option(3, "How often training looks back at its end.")
    dead_after: int = option(10_000_000, "Tokens without firing.")
    skip: bool = option(False, "Give a transcoder a linear skip connection (Paulo et al. 2025).")
    prefixes: tuple[int, ...] = option(
        (), "256,1024 trains the first 256 features, and the first 1024, to rebuild alone too (Matryoshka)."
    )

    def make(self, d_in: int, d_out: int | None = None) -> SAE:
        """The SAE for activations of this width, untrained; with d_out a transcoder, for a target of that width.

        Raises UserError where the sizes don't fit.
        """
        from csae.contextual_sae import ContextualSAE
        from csae.topk_sae import TopKSAE

        given = dataclasses.asdict(self)
        names = ("d_sae", "k", "selection", "k_max", "dead_after", "skip", "prefixes")
        sizes = {name: given.pop(name) for name in names}
        sizes["d_out"] = d_out
        sizes["d_sae"] = 8 * d_in if self.d_sae is None else self.d_sae
        if self.skip and d_out is None:
            raise UserError("skip: given for an SAE that rebuilds what it reads; needed a transcoder, with a target")
        try:
            if given.pop("arch") == "topk":
                return TopKSAE(d_in, **sizes)
            return ContextualSAE(d_in, **sizes, n_heads=given.pop("heads"), **given)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    steps: int
    batch_windows: int = option(8, "Windows a step.")
    lr: float = option(1e-3, "Peak learning rate of Adam.")
    look_back_lr: float = option(LOOK_BACK_LR, "The look-back's share of --lr.")
    warmup: float = option(0.05, "Share of the steps.")
    """in which the learning rate rises from zero"""
    decay: float = option(0.2, "Share of the steps, the last ones.")
    """in which it falls to zero"""
    early_sweeps: int = option(1, "How often before the decay.")
    """sweeps of a contextual SAE before the decay, where its own `sweeps` are more. That is cheaper; and in the decay,
    when it matters, it trains on the memory that it will run on"""
    exact_from: float = option(1.0, "Share of steps before exact starts.")
    """from there on a contextual SAE's sweeps start at its exact codes, and are as few as before the decay. Each step
    then runs the recurrence, and what is trained is what runs. For features that last so long that sweeps don't settle:
    see csae.bench.evidence.synthetic. On text it was no gain (from 0.8; layer 12 of SmolLM2-135M, k = 16: an exact FVU
    of 0.1509 against 0.1501 with query="past", 0.1348 both ways with "current")"""
    gap_every: int = option(100, "Steps; compares exact form and sweeps.")
    lazy: bool = option(False, "Don't move the rows of features that did not fire: cheaper, and not Adam.")
    moments: str = option("float32", choices=PRECISIONS)
    """of the tables; bfloat16 with stochastic rounding"""
    precision: str = option("float32", choices=PRECISIONS)
    """"bfloat16" for autocast with float32 parameters"""
    checkpoint_every: int = option(500, "Steps.")
    log_every: int = option(10, "Steps; a line of metrics.")
    """Only then a number is read from the device, and dead features are looked for: those that AuxK trains until the
    next line are those that were dead then"""
    seed: int = option(0, "Of initialisation and order.")
    start: int = 0
    """the step at which the learning rate begins to rise: of a run that was extended, how many it had before"""

    def __post_init__(self) -> None:
        counts = {"steps": 1, "batch_windows": 1, "early_sweeps": 0}
        counts |= dict.fromkeys(("gap_every", "checkpoint_every", "log_every"), 1)
        for name, least in counts.items():
            if not isinstance(getattr(self, name), int):
                raise UserError(f"{name}: given {getattr(self, name)!r}; needed a whole number, at least {least}")
            if getattr(self, name) < least:
                raise UserError(f"{name}: given {getattr(self, name)}; needed at least {least}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise UserError(f"seed: given {str(self.seed)[:40]}; needed a whole number, 0 to 2^63 - 1")
        for name in ("lr", "look_back_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}: given {getattr(self, name)}; needed a positive number")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):  # nor is NaN
            raise UserError(
                f"warmup, decay: given {self.warmup} and {self.decay}; needed shares that add up to 1 at most"
            )
        if not 0 <= self.exact_from <= 1:
            raise UserError(f"exact_from: given {self.exact_from}; needed a share of the steps, 0 to 1 (never)")
        for name in ("precision", "moments"):
            if getattr(self, name) not in PRECISIONS:
                raise UserError(
                    f"{name}: given {getattr(self, name)!r}; needed one of {', '.join(map(repr, PRECISIONS))}"
                )
