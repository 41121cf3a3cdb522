"""Sparse codes: values [n, k] and indices [n, k], rows whose lengths vary.

k is a capacity. A row's length is the place after its last non-zero value; NaN is non-zero. What stands at or behind it
takes no part: its index is not looked at, it adds nothing, and its gradient is zero. So the cost of a row follows its
length. A zero before the length is an entry like any other.
"""

import torch
from torch import Tensor


def before_length(values: Tensor) -> Tensor:
    """values [n, k] -> [n, k] bool: which entries stand before the length of their row."""
    places = torch.arange(1, values.shape[1] + 1, dtype=torch.int32, device=values.device)
    if values.numel() == 0:
        return values != 0
    return places <= ((values != 0) * places).amax(dim=1, keepdim=True)


def check_indices(indices: Tensor, d_sae: int) -> None:
    """Raise ValueError where an index is outside of [0, d_sae). It waits for the device."""
    if indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if low < 0 or high >= d_sae:
        raise ValueError(f"indices: given values from {int(low)} to {int(high)}; needed 0 <= index < d_sae = {d_sae}")
