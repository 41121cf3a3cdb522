"""An SAE whose rows are on several ranks, saved by all of them: a safetensors file a rank, and an index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from csae.distributed.agreement import by_first, gathered, together
from csae.errors import UserError
from csae.exchange import exchanged
from csae.files import complete, temporary_for, write_json, writing
from csae.parts import INDEX, WEIGHTS, index_of, part_name, remove_shards, shards_of, unused_names
from csae.tensors import Header, read_header, save_tensors

if TYPE_CHECKING:
    from csae.distributed.shard import Shard
    from csae.saving import Saved


def save_shards(sae: Saved, own: Mapping[str, range], shard: Shard, folder: Path, about: Mapping[str, str]) -> None:
    """Write the weights of a sharded SAE to a folder that all ranks see, and its config.json.

    All ranks call it. No rank has more than its rows in memory. Of replicas the first writes. What is the same on all
    ranks is in the first file.

    own: the rows of tensors that are here, by their names. about: texts for the header of each file.

    Raises UserError on a rank that can't write: what was in the folder is still there then. The files have other names
    than those of an SAE that is there, so that it stays whole until the index is exchanged.
    """
    ranks, rows = shard.ranks, shard.rows
    n_files = max(1, sum(gathered(lambda: len(rows) > 0, ranks.hosts)) // ranks.n_data)
    tensors = {part_name(name, rows): of for name, of in sae.state_dict().items() if name in own}
    if ranks.feature_rank == 0:
        tensors |= {name: of for name, of in sae.state_dict().items() if name not in own}
    before = gathered(lambda: shards_of(folder) if ranks.rank == 0 else set(), ranks.hosts)[0]
    names = unused_names(n_files, before)
    writes = ranks.data_rank == 0 and ranks.feature_rank < n_files
    name = names[min(ranks.feature_rank, n_files - 1)]

    with temporary_for(folder / name) as temporary:

        def write() -> tuple[Header, int] | None:
            if not writes:
                return None
            save_tensors(tensors, temporary, about)
            complete(temporary)
            return read_header(temporary), sum(tensor.nbytes for tensor in tensors.values())

        told = [of for of in gathered(write, ranks.hosts) if of is not None]
        # From here on nothing is left to write but names, the index and config.json.
        try:
            together(lambda: os.replace(temporary, folder / name) if writes else None, ranks.hosts)
            headers = {name: header for name, (header, _) in zip(names, told, strict=True)}
            index = index_of(headers, sum(n_bytes for _, n_bytes in told))
            by_first(lambda: _take_place(folder, index, sae.saved_config), ranks.hosts)
        except BaseException:
            if ranks.rank == 0:
                for unused in set(names) - shards_of(folder):
                    with suppress(OSError):
                        (folder / unused).unlink()
            raise
    by_first(lambda: remove_shards(folder, before, but=names), ranks.hosts)


def _take_place(folder: Path, index: dict, config: dict) -> None:
    """The index and config.json of weights whose files are there."""
    missing = sorted(file for file in set(index["weight_map"].values()) if not (folder / file).is_file())
    if missing:
        raise UserError(
            f"{folder}: {missing[0]} was written by another rank, and is not here: give a folder that all see"
        )
    with exchanged(folder, config):
        write_json(folder / INDEX, index)
        with writing(folder / WEIGHTS):
            (folder / WEIGHTS).unlink(missing_ok=True)  # it is read before an index
