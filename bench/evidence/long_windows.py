"""Does the exact recurrence hold on windows longer than those it was trained on? FVU along long windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from csae.data.activations import ActivationSource
from csae.evaluate import run_form
from csae.progress import Progress, quiet
from csae.sae import SAE

BATCH_WINDOWS = 4


@torch.no_grad()
def measure(
    sae: SAE, source: ActivationSource, windows: Sequence[int], trained_on: int, progress: Progress = quiet
) -> dict[str, Any]:
    """The FVU of an SAE, in the exact form, in consecutive stretches of long windows; the result is JSON.

    Args:
        source: its windows are several times as long as those trained on.
        trained_on: positions of a window in training; the length of a stretch.

    Returns:
        n_ctx, trained_on, tokens; stretches: for each trained_on positions `first` and `last` position, fvu (of its
        own tokens: squared error over variance), and carried, the mean squared length of c over that of x - b_dec.
    """
    was_training = sae.training
    sae.eval()
    count = -(-source.n_ctx // trained_on)
    error, carried, squares = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    total, tokens = torch.zeros(count, source.d_in, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    device = sae.W_dec.device
    try:
        for start in progress(range(0, len(windows), BATCH_WINDOWS), "long windows"):
            acts, mask, documents = source.read(windows[start : start + BATCH_WINDOWS])[:3]
            acts, mask, documents = acts.to(device), mask.to(device), documents.to(device)
            out = run_form(sae, acts, mask, documents, exact=True)
            for number in range(count):
                part = slice(number * trained_on, (number + 1) * trained_on)
                here = mask[:, part]
                x, x_hat, c = (tensor[:, part][here].double().cpu() for tensor in (acts, out.x_hat, out.c))
                centred = x - (sae.b_dec * sae.scale).double().cpu()
                error[number] += (x - x_hat).square().sum()
                carried[number] += c.square().sum()
                squares[number] += centred.square().sum()
                total[number] += centred.sum(dim=0)
                tokens[number] += len(x)
    finally:
        sae.train(was_training)
    variance = squares - total.square().sum(dim=1) / tokens
    return {
        "n_ctx": source.n_ctx,
        "trained_on": trained_on,
        "tokens": int(tokens.sum()),
        "stretches": [
            {
                "first": number * trained_on,
                "last": min((number + 1) * trained_on, source.n_ctx) - 1,
                "fvu": float(error[number] / variance[number]),
                "carried": float(carried[number] / squares[number]),
            }
            for number in range(count)
        ],
    }
