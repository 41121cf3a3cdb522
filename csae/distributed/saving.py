"""An SAE whose rows are on several ranks, saved by all of them: a safetensors file a rank, and an index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from csae.distributed.agreement import by_first, gathered, together
from csae.errors import UserError
from csae.files import complete, temporary_for, write_file, writing
from csae.parts import INDEX, WEIGHTS, index_of, part_name, shard_name, shards_of
from csae.tensors import Header, read_header, save_tensors

if TYPE_CHECKING:
    from csae.distributed.shard import Shard
    from csae.saving import Saved


def save_shards(
    sae: Saved, own: Mapping[str, range], shard: Shard, folder: Path, about: Mapping[str, str], config: Path
) -> None:
    """Write the weights of a sharded SAE to a folder that all ranks see, and its config.json to `config`.

    All ranks call it. No rank has more than its rows in memory. Of replicas the first writes. What is the same on all
    ranks is in the first file.

    own: the rows of tensors that are here, by their names. about: texts for the header of each file.

    Raises UserError on a rank that can't write: what was in the folder is still there then.
    """
    ranks, rows = shard.ranks, shard.rows
    n_files = max(1, sum(gathered(lambda: len(rows) > 0, ranks.hosts)) // ranks.n_data)
    tensors = {part_name(name, rows): of for name, of in sae.state_dict().items() if name in own}
    if ranks.feature_rank == 0:
        tensors |= {name: of for name, of in sae.state_dict().items() if name not in own}
    name = shard_name(ranks.feature_rank, n_files)
    writes = ranks.data_rank == 0 and ranks.feature_rank < n_files
    before = shards_of(folder)

    with temporary_for(folder / name) as temporary:

        def write() -> tuple[Header, int] | None:
            if not writes:
                return None
            save_tensors(tensors, temporary, about)
            complete(temporary)
            return read_header(temporary), sum(tensor.nbytes for tensor in tensors.values())

        told = [of for of in gathered(write, ranks.hosts) if of is not None]
        # From here on nothing is left to write but names and the index.
        together(lambda: os.replace(temporary, folder / name) if writes else None, ranks.hosts)
    headers = {shard_name(number, n_files): header for number, (header, _) in enumerate(told)}
    index = index_of(headers, sum(n_bytes for _, n_bytes in told))
    by_first(lambda: _write_index(folder, index, config, sae.saved_config, before - headers.keys()), ranks.hosts)


def _write_index(folder: Path, index: dict, config: Path, content: dict, stale: set[str]) -> None:
    """The index and config.json, the latter last; then what is left of weights that were there before is removed."""
    missing = sorted(file for file in set(index["weight_map"].values()) if not (folder / file).is_file())
    if missing:
        raise UserError(
            f"{folder}: {missing[0]} was written by another rank, and is not here: give a folder that all see"
        )

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_file(folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8"))
        with writing(folder / WEIGHTS):
            (folder / WEIGHTS).unlink(missing_ok=True)  # it would be read before the index

    write_file(config, write)
    for file in stale:
        with suppress(OSError):
            (folder / file).unlink()
