"""FVU along long windows."""

from __future__ import annotations

import pytest
import torch
from given_windows import GivenWindows

from csae import ContextualSAE, TopKSAE
from csae.bench.evidence import long_windows


@pytest.mark.parametrize("arch", [TopKSAE, ContextualSAE])
def test_each_stretch_is_its_own_fvu(arch: type) -> None:
    torch.manual_seed(0)
    sae = arch(6, 20, 2)
    sae.initialise(torch.randn(6), 1.5)
    mask = torch.ones(5, 11, dtype=torch.bool)
    mask[:, 0] = False
    source = GivenWindows(torch.randn(5, 11, 6) + 1, mask, torch.zeros(5, 11, dtype=torch.int64))
    found = long_windows.measure(sae, source, range(5), trained_on=4)
    assert sae.training
    with torch.no_grad():
        out = sae.eval()(source.acts, source.mask)
    b = (sae.b_dec * sae.scale).detach()
    assert [(part["first"], part["last"]) for part in found["stretches"]] == [(0, 3), (4, 7), (8, 10)]
    for part in found["stretches"]:
        at = slice(part["first"], part["last"] + 1)
        here = source.mask[:, at]
        x, x_hat, c = (tensor[:, at][here] for tensor in (source.acts, out.x_hat, out.c))
        assert part["fvu"] == pytest.approx(
            float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4
        )
        centred = x - b
        assert part["carried"] == pytest.approx(float(c.square().sum() / centred.square().sum()), rel=1e-4)
    assert found["tokens"] == 50
