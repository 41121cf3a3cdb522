"""The encode as a user would put it together: cuBLAS's product, and the best top-k that a package on this machine has.

"PyTorch dense" is the same with torch.topk. None of them orders ties by index, nor is any of them a dependency.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .data import Built, Data, Skip
from .plain import encode

Select = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def by_jax(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """jax.lax.top_k: XLA's own kernel, or RAFT's select_k, which it chooses between."""
    select = _jax_top_k()
    import jax

    values, indices = select(jax.dlpack.from_dlpack(pre_acts), k)
    return torch.from_dlpack(values), torch.from_dlpack(indices)


@cache
def _jax_top_k() -> Callable[..., Any]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take most of the memory
    import jax

    return jax.jit(jax.lax.top_k, static_argnums=1)


def by_raft(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """select_k of RAPIDS' RAFT. It takes float32 only, so the product is widened first."""
    from pylibraft.matrix import select_k

    values = torch.empty(pre_acts.shape[0], k, device=pre_acts.device)
    indices = torch.empty(pre_acts.shape[0], k, dtype=torch.int64, device=pre_acts.device)
    select_k(pre_acts.float(), k=k, distances=values, indices=indices, select_min=False)
    return values, indices


def by_flashinfer(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """FlashInfer's radix selection, which its package compiles at its first use."""
    import flashinfer

    return flashinfer.top_k(pre_acts, k, sorted=True)


def with_product(package: str, select: Select) -> Callable[[Data], Built]:
    """The product in the dtype of the case, and `select`, where the package is installed."""

    def encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = select(linear(x, W_enc, b_enc), k)
        return values.relu().to(x.dtype), indices.long()

    def build(data: Data) -> Built:
        if data.device.type != "cuda":
            raise Skip("a top-k for CUDA")
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed")
        return encode(encoder)(data)

    return build


TOPK = {
    "mm + jax.lax.top_k": with_product("jax", by_jax),
    "mm + RAFT select_k": with_product("pylibraft", by_raft),
    "mm + FlashInfer top_k": with_product("flashinfer", by_flashinfer),
}
