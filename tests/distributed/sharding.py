"""SAEs with made-up weights, whole or this rank's rows of them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from csae import ContextualSAE, TopKSAE
from csae.distributed import Ranks, sharded
from csae.sae import SAE
from csae.saving import ROWS

D_SAE = {"contextual": 9, "topk": 10}  # on four ranks 3, 3, 3, 0 rows and 3, 3, 3, 1


def new(arch: str) -> SAE:
    torch.manual_seed(0)
    if arch == "topk":
        return TopKSAE(6, D_SAE[arch], 3)
    return ContextualSAE(
        6, D_SAE[arch], 3, n_heads=2, d_head=4, d_value=5, d_memory=7, query="past", selection="jumprelu"
    )


def here(arch: str, ranks: Ranks | None) -> SAE:
    """The whole SAE, or the rows of one of several ranks."""
    return new(arch) if ranks is None else sharded(lambda: new(arch), ranks)


def whole(seed: int, name: str, sae: SAE, like: Tensor) -> Tensor:
    """A whole tensor of made-up numbers, always the same ones for a seed and a name."""
    table = name.split(".")[0] in ROWS and like.dim() > 0
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    shape = (sae.d_sae, *like.shape[1:]) if table else like.shape
    return (torch.rand(shape, generator=generator) * 100).to(like.dtype)


def rows_of(sae: SAE, name: str, tensor: Tensor) -> Tensor:
    """The rows that are here of a whole tensor."""
    if sae.shard is None or name.split(".")[0] not in ROWS or tensor.dim() == 0:
        return tensor
    return tensor[sae.shard.rows.start : sae.shard.rows.stop]
