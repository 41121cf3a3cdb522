"""Many devices: each rank reads its own windows and owns the rows of some features. On torch.distributed."""

from csae.distributed.ranks import Ranks, joined

__all__ = ["Ranks", "joined"]
