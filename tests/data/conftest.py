from __future__ import annotations

import pytest
import torch


@pytest.fixture
def tokens() -> torch.Tensor:
    """4 windows of 20 tokens below 50."""
    return torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(0))
