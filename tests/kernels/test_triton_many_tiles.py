"""The encoders at a size where a TMA program has many tiles, and there are several ranges: on a GPU only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_setup import DEVICE, INTERPRETED

from csae import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="the interpreter would take an hour")]

N, D_SAE, K = 4096, 16384, 17


def integers(*shape: int, largest: int, seed: int) -> Tensor:
    """Sums of their products are small enough for bfloat16 to hold; many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(DEVICE, torch.float64)


def encoders() -> list[Callable[..., tuple[Tensor, Tensor]]]:
    from csae.kernels.triton import topk_encode, topk_threshold

    def twice(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        kept = topk_encode.encode_and_keep(x, W_enc, b_enc, k)[2]
        return topk_encode.encode_again(kept, torch.zeros_like(x), W_enc, k)

    return [topk_encode.topk_encode, topk_threshold.topk_encode, twice]


@pytest.mark.parametrize("misled", [False, True], ids=["fair", "misled"])
@pytest.mark.parametrize("d_in", [64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact(dtype: torch.dtype, d_in: int, misled: bool) -> None:
    x, W_enc = integers(N, d_in, largest=1, seed=0), integers(D_SAE, d_in, largest=1, seed=1)
    b_enc = integers(D_SAE, largest=3, seed=2)
    if misled:  # topk_threshold's sample has all of the largest, so that every row falls back
        b_enc[:1024] += 60
    values, indices = reference.topk_encode(x, W_enc, b_enc, K)
    assert torch.equal(values.to(dtype).double(), values)
    for encode in encoders():
        found = encode(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype), K)
        assert torch.equal(found[1], indices)
        assert torch.equal(found[0].double(), values)


@pytest.mark.parametrize("fits", [True, False], ids=["fits", "falls back"])
@pytest.mark.parametrize("d_in", [64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_threshold_encode_is_exact(dtype: torch.dtype, d_in: int, fits: bool) -> None:
    """About 30 of a row are above a threshold near three standard deviations; half of them above zero."""
    from csae.kernels.triton import threshold_encode

    x, W_enc = integers(N, d_in, largest=1, seed=0), integers(D_SAE, d_in, largest=1, seed=1)
    b_enc = integers(D_SAE, largest=3, seed=2)
    threshold = torch.tensor(round(2 * d_in**0.5) if fits else 0.0, dtype=torch.float64, device=DEVICE)
    values, indices = reference.threshold_encode(x, W_enc, b_enc, threshold, 64)
    found = threshold_encode.threshold_encode(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype), threshold.float(), 64)
    assert torch.equal(found[1], indices)
    assert torch.equal(found[0].double(), values)
