"""A checkpoint's tensors, written by several ranks and read by any number: torch.distributed.checkpoint (DCP).

A tensor with a row a feature is a `DTensor` with `Shard(0)`, of which each rank writes its rows. All else is the same
on all ranks, and one of them writes it. DCP does not say whether its files are whole, or of one checkpoint: their
SHA-256, taken when they are written, are in training.json.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from csae.distributed.ranks import Ranks
from csae.errors import FailedElsewhere, UserError, first_line, shown
from csae.exchange import CONFIG
from csae.files import read_json, reading
from csae.parts import AGAIN, METADATA, OF_RANK
from csae.tensors import CHECKSUM, Header

STATE = "training.json"
# What is found in a pickle of DCP's metadata: modules, and names in them.
DTYPES = tuple(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
METADATA_NEEDS = {
    "torch": ("Size", *DTYPES),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": tuple(vars(torch.distributed.checkpoint.metadata)),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    **dict.fromkeys(("pathlib", "pathlib._local"), PATHS),
}


def write(folder: Path, tensors: Mapping[str, Tensor], own: Iterable[str], d_sae: int, ranks: Ranks) -> dict[str, str]:
    """All ranks write their tensors to a folder; gives the SHA-256 of the files that this one wrote, by their names.

    own: the names of those with a row a feature, of which this rank has its rows.

    Raises what went wrong on the rank where it did, and FailedElsewhere on the others.
    """
    state = {name: _sharded(of, d_sae, ranks) if name in set(own) else of for name, of in tensors.items()}
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=ranks.files)
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        raise (failure if rank == ranks.rank else FailedElsewhere(rank, str(failure))) from error
    written = sorted(folder.glob(f"__{ranks.rank}_*.distcp")) + ([folder / METADATA] if ranks.rank == 0 else [])
    return {file.name: checksum(file) for file in written}


def checksum(file: Path) -> str:
    with reading(file), open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Written:
    """What `write` wrote to a folder, with the checksums that training.json has of it."""

    def __init__(self, folder: Path) -> None:
        """Reads what there is, no tensor yet. Raises UserError where files are missing, damaged, or of another one."""
        checksums = read_json(folder / STATE).get(CHECKSUM)
        ours = rf"{re.escape(METADATA)}|{re.escape(CONFIG)}|{OF_RANK}"
        if not isinstance(checksums, dict) or not {METADATA, CONFIG} <= checksums.keys():
            raise UserError(f"{folder}: {STATE} has no checksum of {METADATA} or {CONFIG}: {AGAIN}")
        if not all(re.fullmatch(ours, name) for name in checksums):
            raise UserError(f"{folder}: {STATE} names files that no checkpoint has: {AGAIN}")
        self.folder, self.checksums = folder, checksums
        _compare(folder / METADATA, checksums[METADATA])
        self._reader = _Reader(folder)
        try:
            metadata = self._reader.read_metadata()
            files = {of.relative_path for of in metadata.storage_data.values()}
            self.stored = {
                name: (tuple(of.size), of.properties.dtype)
                for name, of in metadata.state_dict_metadata.items()
                if isinstance(of, TensorStorageMetadata)
            }
        except Exception as error:  # a pickle that is no metadata may raise anything
            raise UserError(
                f"{folder / METADATA}: not what csae wrote ({shown(first_line(error))}): {AGAIN}"
            ) from error
        missing = sorted(files - checksums.keys())
        if missing:
            raise UserError(f"{folder}: {STATE} has no checksum of {shown(missing[0])}: {AGAIN}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the SAE's tensors, whole. Names of others have a slash."""
        return {name: shape for name, (shape, _) in self.stored.items() if "/" not in name}

    headers: Mapping[Path, Header] = MappingProxyType({})
    """its files say nothing of the SAE that they are of: config.json has a checksum instead"""

    def load(self, own: Mapping[str, range], ranks: Ranks | None = None) -> dict[str, Tensor]:
        """The SAE's tensors, on the CPU, as `csae.parts.Weights.load` gives them."""
        self.check(ranks)
        tensors = {name: self.empty(name, own.get(name)) for name in self.shapes}
        self.read(tensors, own, ranks)
        return tensors

    def empty(self, name: str, rows: range | None = None) -> Tensor:
        """A tensor on the CPU for what is stored by this name; for these rows of it if given."""
        shape, dtype = self.stored[name]
        return torch.empty(shape if rows is None else (len(rows), *shape[1:]), dtype=dtype)

    def check(self, ranks: Ranks | None) -> None:
        """Compare all files with their checksums; ranks share them, and have to agree afterwards.

        Raises UserError where one is missing, damaged, or of another checkpoint.
        """
        names = sorted(self.checksums)[0 if ranks is None else ranks.rank :: 1 if ranks is None else ranks.size]
        with ThreadPoolExecutor() as threads:
            for _ in threads.map(lambda name: _compare(self.folder / name, self.checksums[name]), names):
                pass

    def read(self, into: Mapping[str, Tensor], own: Mapping[str, range], ranks: Ranks | None) -> None:
        """Read tensors, in place, by their names; of those in `own` the rows of this rank."""
        into = {name: tensor for name, tensor in into.items() if tensor.numel()}
        state = {
            name: tensor if ranks is None or name not in own else _sharded(tensor, self.stored[name][0][0], ranks)
            for name, tensor in into.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            try:
                dcp.load(state, storage_reader=self._reader, no_dist=True)  # each rank reads by itself
            except CheckpointException as error:
                (failure, _) = error.failures[min(error.failures)]
                raise UserError(f"{self.folder}: can't be read: {shown(failure)}: {AGAIN}") from error


class _Reader(dcp.FileSystemReader):
    """One that runs nothing that a file asks for: the metadata is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata = _OnlyMetadata(file).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        return metadata


class _OnlyMetadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_NEEDS.get(module, ()):
            found = super().find_class(module, name)
            if isinstance(found, type | torch.dtype) or found is torch.serialization._get_layout:
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _sharded(rows: Tensor, d_sae: int, ranks: Ranks) -> DTensor:
    """The whole tensor that a rank's rows [rows, ...] belong to; it has the same memory."""
    mesh = DeviceMesh.from_group(ranks.features, rows.device.type)
    shape = torch.Size((d_sae, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _compare(file: Path, expected: object) -> None:
    if checksum(file) != expected:
        raise UserError(f"{file}: not the file that {STATE} was written with: {AGAIN}")
