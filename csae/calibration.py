"""Calibration: the threshold with which an SAE in use has k features a token on average, found on a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csae.errors import UserError

if TYPE_CHECKING:
    from csae.data.activations import Batch
    from csae.sae import SAE

NEAR = 0.002  # how near to k the mean is to come, as a share
RUNS = 40  # of the sample, at most
GRID = torch.linspace(0, 3, 193)  # in multiples of the mean size of a feature


def calibrate(sae: SAE, batches: Sequence[Batch]) -> float:
    """See `SAE.calibrate`.

    The mean L0 of a contextual SAE is that of its recurrence, in which codes depend on those before them. So each
    threshold that is tried takes a run of the sample. What the features that are active exceed their threshold by says
    about where the next one is to be; then it lies between two that are known, one too low and one too high.
    """
    threshold = sae.threshold
    if sae.selection == "topk" or threshold is None:
        raise UserError(f'calibrate: given an SAE with selection="{sae.selection}"; needed one with a threshold')
    _check_threshold(sae, threshold)
    # Of one threshold the shift is the threshold itself; a threshold a feature is moved with all others.
    base = torch.zeros_like(threshold) if threshold.dim() == 0 else threshold.detach().clone()
    shift = float(threshold) if threshold.dim() == 0 else 0.0
    low, high = (-math.inf, math.inf), (math.inf, 0.0)  # a shift that is too low, one that is too high, with their L0
    best = (math.inf, shift, 0.0)
    for run in range(RUNS):
        threshold.copy_(base + shift)
        found, above = _measured(sae, batches, base, shift)
        best = min(best, (abs(found / sae.k - 1), shift, found))
        if best[0] <= NEAR or (found < sae.k and _is_least(sae, base, shift)):
            break
        if found > sae.k:
            low = (shift, found)
        else:
            high = (shift, found)
        shift = _next(low, high, above, sae.k, run)
    threshold.copy_(base + best[1])
    return best[2]


def _check_threshold(sae: SAE, threshold: Tensor) -> None:
    """Raise UserError, on all ranks, where nothing can be found from this threshold; a feature's may be infinite."""
    broken = threshold.isnan() if threshold.dim() else ~threshold.isfinite()
    count = broken.sum().double()
    if (count if sae.shard is None else sae.shard.total(count)) > 0:
        raise UserError("calibrate: threshold holds NaN or Inf; needed finite numbers, such as zero")


def _measured(sae: SAE, batches: Sequence[Batch], base: Tensor, shift: float) -> tuple[float, Tensor]:
    """The mean L0 of the sample as the SAE is, and how many features a token exceed the threshold by how much.

    The second is [2, m] float64: shifts above this one, and the L0 that would be there if codes didn't change.
    """
    tokens = active = total = broken = torch.zeros((), dtype=torch.float64, device=base.device)
    margins = []
    for batch in batches:
        mask = batch.mask.to(base.device)
        code = sae.code_in_use(batch.acts.to(base.device), mask, batch.documents.to(base.device))
        own = base if base.dim() == 0 else _of_features(sae, base)[code.indices]
        counts = (code.values > 0) & mask.unsqueeze(-1)
        margins.append((code.values - own - shift)[counts].double())
        tokens = tokens + mask.sum()
        active = active + counts.sum()
        total = total + code.values[counts].double().sum()
        broken = broken + ((~code.values.isfinite()).any(dim=-1) & mask).sum()
    summed = torch.stack([tokens, active, total, broken])
    tokens, active, total, broken = summed if sae.shard is None else sae.shard.total(summed)
    if broken > 0:
        raise UserError(
            f"calibrate: the codes of {int(broken)} of {int(tokens)} tokens of the sample hold NaN or Inf; needed "
            "finite activations and weights"
        )
    if tokens == 0:
        raise UserError("calibrate: the mask leaves out every position of the sample; needed some")
    steps = GRID.to(base.device, torch.float64) * (total / active.clamp_min(1))
    flat = torch.cat(margins).sort().values
    exceeding = (flat.numel() - torch.searchsorted(flat, steps, right=True)).double()
    exceeding = exceeding if sae.shard is None else sae.shard.total(exceeding)
    return float(active / tokens), torch.stack([shift + steps, exceeding / tokens]).cpu()


def _of_features(sae: SAE, own: Tensor) -> Tensor:
    """[rows] of this rank -> [d_sae]."""
    return own if sae.shard is None else sae.shard.of_all_features(own)


def _is_least(sae: SAE, base: Tensor, shift: float) -> bool:
    """Whether all thresholds are zero or less on all ranks: then each positive pre-activation is above its own."""
    above = (base + shift > 0).any().double()
    return not bool(above if sae.shard is None else sae.shard.total(above))


def _next(low: tuple[float, float], high: tuple[float, float], above: Tensor, k: int, run: int) -> float:
    """The next shift to try. low, high: (shift, L0) that are known, or infinite. above: of the last run."""
    shifts, l0 = above
    if math.isinf(high[0]):  # the features that are active say how much higher
        at = int((l0 > k).sum().clamp(1, len(l0) - 1))
        between = float((l0[at - 1] - k) / (l0[at - 1] - l0[at]).clamp_min(1e-9))
        return float(shifts[at - 1]) + min(max(between, 0.05), 1.0) * float(shifts[at] - shifts[at - 1])
    if math.isinf(low[0]):  # their density says how much lower
        at = int((l0 > 0.8 * l0[0]).sum().clamp(1, len(l0) - 1))
        density = float((l0[0] - l0[at]) / (shifts[at] - shifts[0]).clamp_min(1e-9))
        step = 1.2 * (k - high[1]) / max(density, 1e-9)
        widest = 2**run * 0.25 * float(shifts[-1] - shifts[0])
        return high[0] - (min(step, widest) if widest > 0 else 2**run * max(abs(high[0]), 1e-3))
    share = 0.5
    if run % 3 and high[1] > 0:  # by its logarithm, which is nearly straight; every third time halves, which is sure
        share = math.log(low[1] / k) / math.log(low[1] / high[1])
        share = min(max(share, 0.02), 0.98)
    return low[0] + share * (high[0] - low[0])
