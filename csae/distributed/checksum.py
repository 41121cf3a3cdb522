"""The checksum of an SAE whose rows are on several ranks: that of the whole one, without having it anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from csae.distributed.ranks import Ranks, split
from csae.saving import ROWS
from csae.tensors import checksum, combined, digest_of

if TYPE_CHECKING:
    from csae.sae import SAE

BLOCK_NUMBERS = 1 << 24  # of a table that travel at a time


def whole_checksum(sae: SAE) -> str:
    """`csae.tensors.checksum` of the state of an SAE on the CPU, the same on any number of ranks; all of them call it.

    Rank 0 gets the rows of the others, a block at a time, since SHA-256 takes bytes in their order.
    """
    tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    if sae.shard is None:
        return checksum(tensors)
    ranks, digests = sae.shard.ranks, {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if name in ROWS and tensor.dim():
            shape = [sae.d_sae, *tensor.shape[1:]]
            blocks = _blocks(tensor, sae.d_sae, ranks)
            if ranks.rank:
                for _ in blocks:
                    pass
            else:
                digests[name] = digest_of(shape, blocks)
        else:
            digests[name] = digest_of(list(tensor.shape), [tensor])
    told = [combined(digests) if ranks.rank == 0 else None]
    dist.broadcast_object_list(told, src=0, group=ranks.hosts)
    assert told[0] is not None
    return told[0]


def _blocks(own: Tensor, d_sae: int, ranks: Ranks) -> Iterator[Tensor]:
    """On rank 0 the rows [block, ...] of a whole table, in order. On the others nothing, after their rows were sent.

    own: the rows that are here. Of replicas the first takes part, whose ranks are numbered as the parts of the table.
    """
    step = max(1, BLOCK_NUMBERS // max(1, own.shape[1:].numel()))
    for owner, rows in enumerate(split(d_sae, ranks.n_features)):
        for start in range(0, len(rows), step):
            n = min(step, len(rows) - start)
            if owner == ranks.rank == 0:
                yield own[start : start + n]
            elif owner == ranks.rank:
                dist.send(own[start : start + n].contiguous(), 0, group=ranks.hosts)
            elif ranks.rank == 0:
                block = torch.empty((n, *own.shape[1:]), dtype=own.dtype)
                dist.recv(block, owner, group=ranks.hosts)
                yield block
