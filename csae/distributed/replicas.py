"""Whether ranks that should have the same numbers have them: replicas their rows, all ranks the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csae.distributed.collectives import gather
from csae.errors import UserError
from csae.saving import ROWS

if TYPE_CHECKING:  # these import this package
    from csae.adam import Adam
    from csae.sae import SAE

# Numbers at a time: what is made of them takes four times the memory of float32.
BLOCK = 1 << 22
ODD = 0x1E3779B97F4A7C15


def check_replicas(sae: SAE, optimizer: Adam) -> None:
    """Compare the parameters and moments of ranks that should have the same, by checksums. All ranks call it.

    Raises UserError, the same one on all ranks, where they differ. It waits for the device; 8 bytes a tensor travel.
    """
    if sae.shard is None:
        return
    ranks = sae.shard.ranks
    tensors = dict(sae.state_dict())
    for parameter, state in optimizer.state.items():
        tensors |= {f"{optimizer.names[parameter]}.{name}": tensor for name, tensor in state.items()}
    own = torch.stack([checksum(tensor) for tensor in tensors.values()])
    found = gather(own, ranks.world).tolist()
    for number, (name, tensor) in enumerate(tensors.items()):
        of_rows = tensor.dim() > 0 and name.split(".")[0] in ROWS
        for rank in range(ranks.size):
            first = rank % ranks.n_features if of_rows else 0
            if found[rank][number] != found[first][number]:
                raise UserError(
                    f"{name}: ranks {first} and {rank} should have the same numbers, and differ; needed equal ones: "
                    "memory or a connection is at fault; go on from the last checkpoint"
                )


def checksum(tensor: Tensor) -> Tensor:
    """Scalar int64 on the tensor's device: changes with any bit of it, and with their order."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    found = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), BLOCK):
        block = bits[start : start + BLOCK].to(torch.int64)
        place = torch.arange(start, start + block.numel(), device=flat.device)
        found += (block * ((2 * place + 1) * ODD)).sum()  # an odd factor loses no bit
    return found
