"""The dense products of float32 that have a native form on a CPU."""

from __future__ import annotations

from torch import Tensor


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] -> [m, n]."""
    return a @ b
