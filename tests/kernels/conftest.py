from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from csae.kernels import cpu
from csae.kernels.cpu import library


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions that this CPU has."""
    if not cpu.available():
        pytest.skip(str(cpu.why_not()))
    best = str(cpu.describe()["isa"])
    try:
        library.use_isa(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    library.use_isa(best)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
