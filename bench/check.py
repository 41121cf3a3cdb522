"""Whether two implementations gave the same result. One that differs is not timed.

Tolerances follow the rounding of the dtype. In bfloat16 two pre-activations may round to the same number, so either
feature may be chosen, and a small gradient may change its sign. So the tolerances for bfloat16 are wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest difference of two activations, as a share of the largest in the row.
NEAR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# Least cosine between two tensors. At the small size of the check nothing ties. At full size, in bfloat16, another of
# two nearly equal features may be chosen, and then the gradients of their rows differ.
COSINE = {torch.float32: 0.999, torch.bfloat16: 0.95}
COSINE_TIED = {torch.float32: 0.99, torch.bfloat16: 0.7}
# Largest difference of two norms, as a share.
NORM = 0.1


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, tied: bool = False) -> str | None:
    """What differs, in words, or None. Names that only one of them has are left out.

    A code (values and indices [n, k]) is compared feature by feature, any other tensor by direction and norm. Of
    nearly equal features either may be chosen.

    tied: such a choice may also have changed the tensors that are compared by direction.
    """
    if not got.keys() & wanted.keys():
        return "it gave nothing that can be compared"
    for name in sorted(got.keys() & wanted.keys() - {"values", "indices"}):
        a, b = got[name].detach(), wanted[name].detach()
        if a.shape != b.shape:
            return f"{name} has shape {list(a.shape)}, not {list(b.shape)}"
        least = (COSINE_TIED if tied else COSINE)[dtype]
        cosine, ratio = _cosine_and_ratio(a, b)
        if not cosine >= least:
            return f"{name}: cosine {cosine:.4f}; needed {least}"
        if not abs(ratio - 1) <= NORM:
            return f"{name}: norm is {ratio:.4f} times the expected one; needed 1 within {NORM}"
    if "indices" in got and "indices" in wanted:
        return _other_code((got["values"], got["indices"]), (wanted["values"], wanted["indices"]), NEAR[dtype])
    return None


def _cosine_and_ratio(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Cosine of a and b, and |a| / |b|; both 1 where both are zero. Sums in float64, a piece at a time."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for part_a, part_b in zip(a.reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True):
        wide_a, wide_b = part_a.double(), part_b.double()
        sums += torch.stack([wide_a @ wide_a, wide_b @ wide_b, wide_a @ wide_b])
    aa, bb, ab = sums.tolist()
    if aa == 0 and bb == 0:
        return 1.0, 1.0
    if bb == 0:
        return 0.0, float("inf")
    return ab / max((aa * bb) ** 0.5, 1e-300), (aa / bb) ** 0.5


def _other_code(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], near: float) -> str | None:
    """What differs between two codes: values, indices [n, k] each.

    A feature of both must be equally active. One that only one of them has must be about as active as the least active
    feature of the other.
    """
    if got[1].shape != wanted[1].shape:
        return f"indices have shape {list(got[1].shape)}, not {list(wanted[1].shape)}"
    for first in range(0, got[1].shape[0], 1024):
        values, indices, want_values, want_indices = (part[first : first + 1024].detach() for part in (*got, *wanted))
        values, want_values = values.double(), want_values.double()
        same = indices[:, :, None] == want_indices[:, None, :]  # [rows, k, k]
        if not bool((same.sum(1) <= 1).all()):
            return "a feature is chosen twice"
        slack = near * want_values.amax(1, keepdim=True).clamp_min(1e-6)  # [rows, 1]
        expected = (same * want_values[:, None, :]).sum(2)  # [rows, k]: zero where the other lacks it
        edge = want_values.amin(1, keepdim=True)
        expected = torch.where(same.any(2), expected, edge)
        wrong = ~((values - expected).abs() <= slack)
        if bool(wrong.any()):
            row, place = (int(part) for part in wrong.nonzero()[0])
            found, needed = float(values[row, place]), float(expected[row, place])
            feature = int(indices[row, place])
            return f"token {first + row}: feature {feature} has the activation {found:.5g}; needed {needed:.5g}"
    return None
