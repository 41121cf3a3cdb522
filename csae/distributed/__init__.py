"""Many devices: each rank reads its own windows and owns the rows of some features. On torch.distributed."""

from __future__ import annotations

from csae.distributed.ranks import Ranks, joined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from csae.distributed.replicas import check_replicas
    from csae.distributed.shard import Shard, sharded

__all__ = ["Ranks", "Shard", "check_replicas", "joined", "sharded"]

# These import the SAE, which itself imports how ranks save one.
_PLACES = {"Shard": "shard", "check_replicas": "replicas", "sharded": "shard"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
