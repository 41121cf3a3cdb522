from __future__ import annotations

import pytest
import torch

from csae import ContextualSAE, TopKSAE


@pytest.mark.parametrize("kind", [TopKSAE, ContextualSAE])
def test_what_is_printed_is_short(kind) -> None:
    sae = kind(16, 40, 4)
    acts = torch.randn(2, 8, 16)
    losses, output = sae.loss(acts), sae(acts)
    assert str(losses.code) == "Code(values=<[2, 8, 4] float32>, indices=<[2, 8, 4] int64>)"
    assert repr(losses) == (
        f"Losses(loss={losses.loss.item():.6g}, fvu={losses.fvu.item():.6g}, aux={losses.aux.item():.6g}, "
        f"code={losses.code})"
    )
    c = "<[2, 8, 16] float32>"
    assert f"{output}" == f"Output(x_hat={c}, code={output.code}, c={c})"
