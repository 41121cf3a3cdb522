"""The figures of training steps: kept on the device, and read from there once for each line of metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csae.config import TrainConfig
from csae.distributed.collectives import total
from csae.distributed.ranks import Ranks
from csae.sae import Losses

NAMES = ("loss", "fvu", "aux", "l0")


def logged_steps(config: TrainConfig, done: int, ends: Sequence[int] = ()) -> list[int]:
    """Of the first `done` steps those that have a line of metrics: each `log_every`-th, and the last.

    ends: after how many steps it had ended, each time before it was extended.
    """
    last = {end - 1 for end in (*ends, config.steps) if end <= done}
    return sorted({*range(config.log_every - 1, done, config.log_every), *last})


class Figures:
    """loss, fvu, aux and l0 of the steps since the last line of metrics. A step that was skipped adds nothing."""

    def __init__(self, log_every: int, device: torch.device, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self.rows = torch.zeros(log_every, len(NAMES), device=device)
        self.steps: list[int] = []
        """of which step each row is"""

    @torch.no_grad()
    def add(self, step: int, losses: Losses, mask: Tensor) -> None:
        """Those of a step. mask [B, T] bool: l0 is the mean over its positions, of all ranks."""
        counts = torch.stack([((losses.code.values > 0).sum(dim=-1) * mask).sum(), mask.sum()])
        if self.ranks is not None:
            counts = total(counts, self.ranks.world)
        active = counts[0] / counts[1].clamp_min(1)
        found = (losses.loss, losses.fvu, losses.aux, active)
        self.rows[len(self.steps)] = torch.stack([figure.to(self.rows.dtype) for figure in found])
        self.steps.append(step)

    def read(self) -> list[dict[str, float]]:
        """One dictionary a step; waits for the device."""
        return [dict(zip(NAMES, row, strict=True)) for row in self.rows[: len(self.steps)].cpu().tolist()]

    def clear(self) -> None:
        self.steps.clear()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint between two lines of metrics keeps."""
        return {"figures": self.rows[: len(self.steps)], "figures_steps": torch.tensor(self.steps, dtype=torch.int64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.steps = state["figures_steps"].tolist()
        self.rows[: len(self.steps)] = state["figures"].to(self.rows.device)


def mean(rows: list[dict[str, float]]) -> dict[str, float | None]:
    """The mean of each figure; None where there is no row."""
    return {name: sum(row[name] for row in rows) / len(rows) if rows else None for name in NAMES}
