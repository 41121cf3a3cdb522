"""Which features are active, and when they last fired: exactly as the reference says."""

from __future__ import annotations

import math

import pytest
import torch

from csae import reference
from csae.ops.activity import active_features, fired


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "some", "nothing"])
@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (2, 3, 7), (3,), (0, 4), (4, 0)])
def test_matches_reference(shape: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    d_sae = 23
    values = torch.randn(shape, generator=generator).to(dtype)
    flat = values.view(-1)
    for place, value in enumerate((math.nan, 0.0, -0.0, math.inf, -math.inf, torch.finfo(dtype).tiny)):
        flat[place::11] = value
    indices = torch.randint(0, d_sae, shape, generator=generator)
    where = {"none": None, "some": torch.rand(shape[:-1], generator=generator) > 0.4}
    given = where.get(mask, torch.zeros(shape[:-1], dtype=torch.bool))
    wanted = reference.active_features(values.double(), indices, given, d_sae)
    assert torch.equal(active_features(values.requires_grad_(), indices, given, d_sae), wanted)
    since = torch.arange(100, 100 + d_sae)
    still = reference.fired(since, values.detach().double(), indices, given)
    fired(since, values, indices, given)
    assert torch.equal(since, still)
