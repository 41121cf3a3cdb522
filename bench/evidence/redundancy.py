"""How much activations repeat along the token axis, without any SAE.

Two measurements. How much of a position's activations does a linear map predict from earlier positions? And how many
dimensions does a window have, against as many tokens drawn from all windows?
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csae.data.activations import ActivationSource
from csae.errors import UserError
from csae.progress import Progress, quiet

LAGS = (1, 2, 4, 8, 16)
COMPONENTS = 64
# As a share of the predictors' mean variance.
RIDGE = 1e-3
VARIANCE = 0.9
WINDOWS_AT_ONCE = 16


def measure(
    source: ActivationSource,
    windows_fit: Sequence[int],
    windows_score: Sequence[int],
    progress: Progress = quiet,
    components: int = COMPONENTS,
    seed: int = 0,
) -> dict[str, Any]:
    """The redundancy of activations along the token axis.

    Args:
        windows_fit: the windows that the linear maps and the principal components are fitted on.
        windows_score: those that they are scored on, and whose dimension is measured.
        components: how many principal components of each earlier position a map sees; d_in at most.
        seed: of the draw of tokens.

    Returns:
        predicted: what `predicted` gives. dimension: what `dimension` gives. seconds: how long it took.

    Raises UserError where no position has a past of max(LAGS) positions, or the windows do not vary.
    """
    began = time.perf_counter()
    return {
        "predicted": predicted(source, windows_fit, windows_score, progress, components),
        "dimension": dimension(source, windows_score, progress, seed),
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def predicted(
    source: ActivationSource,
    windows_fit: Sequence[int],
    windows_score: Sequence[int],
    progress: Progress = quiet,
    components: int = COMPONENTS,
) -> dict[str, Any]:
    """The share of the variance of x_t that a ridge regression predicts from the past.

    Fitted on some windows, scored on others. The positions are the same for every predictor: those whose last
    max(LAGS) positions are of the same document, and with it in the mask.

    Returns:
        r2: 1 - residual / variance, around the mean of the positions scored, all dimensions together. Of the
            predictors `previous`, x_{t-1} whole; `last_1` ... `last_16`, the first `components` principal components
            of each of the last positions; `mean`, those of the mean of all earlier positions of the document in the
            window; `last_16_and_mean`, both.
        components, and components_variance: how many, and the share of the variance that they hold.
        tokens_fit, tokens_score: positions fitted on and scored on. windows_fit, windows_score: how many windows.
    """
    components = min(components, source.d_in)
    mean, basis, held = _principal_components(source, windows_fit, progress)
    basis = basis[:, :components]
    fit_previous, fit = _moments(source, windows_fit, mean, basis, progress, "redundancy, fitting")
    score_previous, score = _moments(source, windows_score, mean, basis, progress, "redundancy, scoring")
    furthest = max(LAGS)
    lags = torch.arange(furthest * components)
    the_mean = torch.arange(components) + len(lags)
    r2 = {"previous": _r2(fit_previous, score_previous, torch.arange(source.d_in))}
    r2 |= {f"last_{m}": _r2(fit, score, lags[: m * components]) for m in LAGS}
    r2["mean"] = _r2(fit, score, the_mean)
    r2[f"last_{furthest}_and_mean"] = _r2(fit, score, torch.cat([lags, the_mean]))
    return {
        "r2": r2,
        "components": components,
        "components_variance": float(held[:components].sum() / held.sum()),
        "windows_fit": len(windows_fit),
        "windows_score": len(windows_score),
        "tokens_fit": fit.count,
        "tokens_score": score.count,
    }


@torch.no_grad()
def dimension(
    source: ActivationSource, windows: Sequence[int], progress: Progress = quiet, seed: int = 0
) -> dict[str, Any]:
    """The dimension of a window, and of as many tokens drawn from all windows.

    Computed for the positions in the mask, minus their mean, and averaged over windows. A window of n positions has at
    most n - 1 dimensions, and so have the tokens that it is compared with.

    Returns:
        window and shuffled, each with
            participation_ratio: (sum of l)^2 / sum of l^2, over the eigenvalues l of the covariance.
            components_90: principal components that hold 90% of the variance.
            two_nn: the dimension of what may be a curved surface, from how much further the second nearest
                neighbour is than the nearest (Facco et al. 2017, arXiv 1803.06992).
        windows: how many were measured; those with fewer than 3 positions in the mask are left out.
    """
    rows, lengths = [], []
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = source.read(windows[start : start + WINDOWS_AT_ONCE])
        for acts, mask in zip(batch.acts.cpu(), batch.mask.cpu(), strict=True):
            if int(mask.sum()) >= 3:
                rows.append(acts[mask])
                lengths.append(int(mask.sum()))
    if not rows:
        raise UserError(f"the mask leaves fewer than 3 positions in each of the {len(windows)} windows")
    tokens = torch.cat(rows)
    shuffled = tokens[torch.from_numpy(np.random.default_rng(seed).permutation(len(tokens)))].split(lengths)
    sums: dict[str, dict[str, float]] = {"window": {}, "shuffled": {}}
    for pair in progress(list(zip(rows, shuffled, strict=True)), "redundancy, dimension"):
        for name, tokens in zip(sums, pair, strict=True):
            for figure, value in _dimensions(tokens.double()).items():
                sums[name][figure] = sums[name].get(figure, 0.0) + value
    means = {name: {figure: total / len(rows) for figure, total in of.items()} for name, of in sums.items()}
    return {**means, "windows": len(rows)}


def _dimensions(tokens: Tensor) -> dict[str, float]:
    """tokens [n, d_in] -> the three estimates of their dimension."""
    centred = tokens - tokens.mean(dim=0)
    n, d_in = centred.shape
    smaller = centred @ centred.T if n < d_in else centred.T @ centred  # both have the same non-zero eigenvalues
    variances = torch.linalg.eigvalsh(smaller).flip(0).clamp_min(0)
    if not variances.sum() > 0:
        raise UserError("the activations of a window are all the same: they have no dimension")
    held = variances.cumsum(0) / variances.sum()
    return {
        "participation_ratio": float(variances.sum().square() / variances.square().sum()),
        "components_90": float((held < VARIANCE).sum() + 1),
        "two_nn": _two_nn(tokens),
    }


def _two_nn(tokens: Tensor) -> float:
    """tokens [n, d_in] -> the dimension d by two nearest neighbours (Facco et al. 2017).

    In d dimensions the second nearest neighbour is more than r times as far as the nearest for a share r^-d of the
    tokens. d is fitted through zero, without the tenth of the tokens with the largest r; zero if nothing can be fitted.
    """
    distances = torch.cdist(tokens, tokens).fill_diagonal_(float("inf"))
    first, second = distances.topk(2, largest=False).values.unbind(dim=1)
    ratios = (second / first)[first > 0].log().sort().values  # equal tokens have no ratio
    above = 1 - torch.arange(1, len(ratios) + 1, dtype=ratios.dtype) / len(ratios)
    kept = int(0.9 * len(ratios))
    x, y = ratios[:kept], -above[:kept].log()
    return float((x * y).sum() / x.square().sum()) if x.square().sum() > 0 else 0.0


def _principal_components(
    source: ActivationSource, windows: Sequence[int], progress: Progress
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [d_in] of the positions in the mask; their principal components [d_in, d_in], one in each column, the
    largest first; and the variance of each, [d_in]."""
    total = torch.zeros(source.d_in, dtype=torch.float64)
    squares = torch.zeros(source.d_in, source.d_in, dtype=torch.float64)
    count = 0
    for start in progress(range(0, len(windows), WINDOWS_AT_ONCE), "redundancy, principal components"):
        batch = source.read(windows[start : start + WINDOWS_AT_ONCE])
        acts = batch.acts[batch.mask].cpu()
        total += acts.double().sum(dim=0)
        squares += (acts.T @ acts).double()
        count += len(acts)
    if count == 0:
        raise UserError(f"the mask leaves out every position of the {len(windows)} windows: nothing to fit on")
    mean = total / count
    variances, basis = torch.linalg.eigh(squares / count - mean.outer(mean))
    return mean.float(), basis.flip(1).float(), variances.flip(0).clamp_min(0)


class _Moments:
    """Sums over positions that a regression of y [d_in] on z [columns] and a constant needs, in float64."""

    def __init__(self, columns: int, d_in: int) -> None:
        self.zz = torch.zeros(columns + 1, columns + 1, dtype=torch.float64)  # the last column is the constant
        self.zy = torch.zeros(columns + 1, d_in, dtype=torch.float64)
        self.yy = 0.0

    def add(self, z: Tensor, y: Tensor) -> None:
        z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        self.zz += (z.T @ z).double()
        self.zy += (z.T @ y).double()
        self.yy += float(y.double().square().sum())

    @property
    def count(self) -> int:
        return round(float(self.zz[-1, -1]))


def _moments(
    source: ActivationSource,
    windows: Sequence[int],
    mean: Tensor,
    basis: Tensor,
    progress: Progress,
    description: str,
) -> tuple[_Moments, _Moments]:
    """The moments of x_t on x_{t-1}, and of x_t on [last 1, ..., last max(LAGS), mean of the past], these in the
    components `basis` [d_in, components]. `mean` [d_in] is subtracted. Only positions with max(LAGS) before them count.
    """
    furthest, width = max(LAGS), basis.shape[1]
    previous = _Moments(source.d_in, source.d_in)
    components = _Moments((furthest + 1) * width, source.d_in)
    for start in progress(range(0, len(windows), WINDOWS_AT_ONCE), description):
        batch = source.read(windows[start : start + WINDOWS_AT_ONCE])
        acts, mask, documents = (batch.acts.cpu() - mean, batch.mask.cpu(), batch.documents.cpu())
        has_past = mask[:, furthest:].clone()
        for lag in range(1, furthest + 1):
            has_past &= mask[:, furthest - lag : -lag]
            has_past &= documents[:, furthest - lag : -lag] == documents[:, furthest:]
        here = acts[:, furthest:][has_past]
        previous.add(acts[:, furthest - 1 : -1][has_past], here)
        seen = acts @ basis  # [B, T, components]
        past = [seen[:, furthest - lag : -lag][has_past] for lag in range(1, furthest + 1)]
        past.append(_mean_of_the_past(seen, mask, documents)[:, furthest:][has_past])
        components.add(torch.cat(past, dim=1), here)
    if components.count == 0:
        raise UserError(
            f"no position of the {len(windows)} windows has {furthest} positions of its document before it, all in "
            "the mask: give longer windows"
        )
    return previous, components


def _mean_of_the_past(seen: Tensor, mask: Tensor, documents: Tensor) -> Tensor:
    """seen [B, T, width] -> the mean over the positions before each one, in its document and the mask; zero if none."""
    position = torch.arange(mask.shape[1])
    begins = torch.ones_like(mask)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(begins, position, 0).cummax(dim=1).values  # [B, T]
    # Sums before each position, minus those before its document.
    sums = torch.nn.functional.pad((seen * mask[..., None]).double().cumsum(dim=1), (0, 0, 1, 0))[:, :-1]
    counts = torch.nn.functional.pad(mask.double().cumsum(dim=1), (1, 0))[:, :-1]
    sums = sums - sums.gather(1, start[..., None].expand_as(sums))
    counts = counts - counts.gather(1, start)
    return (sums / counts.clamp_min(1)[..., None]).to(seen.dtype)


def _r2(fit: _Moments, score: _Moments, predictors: Tensor) -> float:
    """The share of the variance of y that a ridge regression on the columns `predictors` of z explains."""
    constant = torch.tensor([len(fit.zz) - 1])
    mean_z, mean_y = fit.zz[predictors][:, constant] / fit.count, fit.zy[constant] / fit.count  # [p, 1], [1, d_in]
    # Around the means, so that the ridge doesn't shrink the constant.
    within = fit.zz[predictors][:, predictors] / fit.count - mean_z @ mean_z.T
    across = fit.zy[predictors] / fit.count - mean_z @ mean_y
    ridge = RIDGE * within.diagonal().mean()
    if not ridge > 0:
        raise UserError("the activations to fit on are all the same: there is nothing to predict from")
    weights = torch.linalg.solve(within + ridge * torch.eye(len(predictors), dtype=within.dtype), across)
    weights = torch.cat([weights, mean_y - mean_z.T @ weights])
    given = torch.cat([predictors, constant])
    explained = (weights * (2 * score.zy[given] - score.zz[given][:, given] @ weights)).sum()
    variance = score.yy - float(score.zy[constant].square().sum()) / score.count
    if not variance > 0:
        raise UserError("the activations to score on are all the same: there is no variance to predict")
    return 1 - (score.yy - float(explained)) / variance
