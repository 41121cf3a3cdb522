"""Which windows of a source are trained on, in which order, and which are held out."""

from __future__ import annotations

import numpy as np

from csae.errors import UserError


def window_order(n_windows: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch goes through the windows: a permutation of 0 to n_windows - 1."""
    return np.random.default_rng([seed, epoch]).permutation(n_windows).tolist()


def held_out(n_windows: int, amount: int | float) -> tuple[range, range]:
    """The windows to train on and those held out: the last ones, a number (int) or a share (float) of them.

    A share is one window at least. The documents were shuffled before they were packed, so the last windows are
    like the others; a document on the border may be in both. Raises UserError where the share is none, or where either
    part would be empty.
    """
    if isinstance(amount, float):
        check_share(amount)
    count = max(1, round(amount * n_windows)) if isinstance(amount, float) else amount
    if not 1 <= count < n_windows:
        raise UserError(
            f"held out: {amount} of {n_windows} windows leaves {max(n_windows - count, 0)} to train on and {count} to "
            "evaluate on; needed at least one each: give more text, or another amount"
        )
    return range(n_windows - count), range(n_windows - count, n_windows)


def check_share(amount: float) -> None:
    """Raises UserError where an amount to hold out is no share of the windows."""
    if not 0 < amount < 1:
        raise UserError(f"--held-out: given {amount}; needed a share of the windows, above 0 and below 1")
