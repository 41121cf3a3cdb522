"""Whether two folders hold the same training, to the rounding of sums in another order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import lines, timeless

from csae.checkpoint import load_sae


def check_same_run(found_in: Path, expected_in: Path, bits: bool = False, atol: float = 1e-5) -> None:
    """run.json and windows.bin are the same; metrics and weights nearly, or with `bits` exactly."""
    for file in ("run.json", "windows.bin"):
        assert (found_in / file).read_bytes() == (expected_in / file).read_bytes(), file
    found, expected = lines(found_in), lines(expected_in)
    assert len(found) == len(expected)
    for one, other in zip(map(timeless, found), map(timeless, expected), strict=True):
        if bits:
            assert one == other
        assert one.keys() == other.keys()
        for name, figure in one.items():
            # The gap is a small difference of large numbers.
            close = pytest.approx(other[name], rel=1e-3, abs=1e-3 if name == "gap" else 1e-5)
            assert figure == other[name] or figure == close, name
    tensors = load_sae(found_in).state_dict()
    for name, tensor in load_sae(expected_in).state_dict().items():
        if bits:
            assert torch.equal(tensors[name], tensor), name
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=atol)
