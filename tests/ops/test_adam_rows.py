"""The numbers of a step of Adam, against the reference; sums and steps are tested in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from csae import Adam, TopKSAE, reference


@pytest.mark.parametrize("of_tensor", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize("t", [1, 2, 77, 3_000_000])
def test_numbers_of_adam_match_reference(t: int, betas: tuple[float, float], lazy: bool, of_tensor: bool) -> None:
    """Within one rounding of float32, and two where lr is rounded itself: 1 - beta^t is made in float64."""
    lr = 3e-4
    optimizer = Adam(TopKSAE(4, 6, 2), lr=lr, betas=betas, eps=1e-8, lazy=lazy)
    group = optimizer.param_groups[0] | ({"lr": torch.tensor(lr)} if of_tensor else {})
    hyper, seed = optimizer._numbers(group, torch.tensor(float(t)))
    wanted = torch.tensor(reference.adam_numbers(t, lr, *betas, 1e-8, lazy), dtype=torch.float64)
    roundings = torch.tensor([1.0 + of_tensor, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert hyper.dtype == torch.float32
    assert ((hyper.double() - wanted).abs() <= roundings * (2**-24 + 1e-12) * wanted).all()
    assert (seed.dtype, seed.tolist()) == (torch.int64, [t])
