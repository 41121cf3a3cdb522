"""Many devices: each rank reads its own windows and owns the rows of some features. On torch.distributed."""

from csae.distributed.ranks import Ranks, joined
from csae.distributed.replicas import check_replicas
from csae.distributed.shard import Shard, sharded

__all__ = ["Ranks", "Shard", "check_replicas", "joined", "sharded"]
