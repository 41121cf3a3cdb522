"""How an SAE is saved and loaded: safetensors and config.json, in a folder or on the hub, by huggingface_hub."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from csae.distributed.agreement import by_first, together
from csae.errors import UserError
from csae.exchange import CONFIG, about_of, exchanged, waiting
from csae.files import read_json, write_file
from csae.parts import INDEX, METADATA, WEIGHTS, Weights, indexed, remove_shards, shards_of, whole_files
from csae.tables import TABLES, owning
from csae.tensors import Header, save_tensors
from csae.trained_on import KEY, TrainedOn, card

if TYPE_CHECKING:
    from csae.distributed.checkpoint import Written
    from csae.distributed.shard import Shard

CARD = "README.md"
# The tensors with a row a feature, where they are no scalars: several ranks have some rows each.
ROWS = (*TABLES, "tokens_since_fired")
# Arguments that config.json doesn't mention where they have these values: SAEs that were saved before they were there.
UNSAID: dict[str, Any] = {
    "d_out": None,
    "skip": False,
    "selection": "topk",
    "k_max": None,
    "l0_coef": 1.0,
    "bandwidth": 0.1,
    "prefixes": [],
}
OUR_CARD = "library_name: csae"  # a line of each card that is written here

AnySaved = TypeVar("AnySaved", bound="Saved")


class Saved(nn.Module, PyTorchModelHubMixin):
    """A module that is saved with the arguments that it was made with."""

    arch: str
    trained_on: TrainedOn | None = None
    """what it was trained on; None for one made by hand"""
    shard: Shard | None = None
    """which rows of its tables are here; None where all are"""

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json: arch, and the arguments that make an SAE like this one."""
        given = {name: list(of) if isinstance(of, tuple) else of for name, of in self._arguments.items()}  # as in JSON
        return {"arch": self.arch} | {
            name: of for name, of in given.items() if name not in UNSAID or of != UNSAID[name]
        }

    @property
    def saved_config(self) -> dict[str, Any]:
        """`config`, with what it was trained on."""
        return self.config | ({} if self.trained_on is None else {KEY: self.trained_on.to_config()})

    @property
    def _arguments(self) -> dict[str, Any]:
        """The arguments that make an SAE like this one: as given, and as changed since."""
        return self._hub_mixin_config or {}  # type: ignore[return-value]

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **push_options: Any
    ) -> str | None:
        """Write model.safetensors, config.json and a model card to a folder, made where it is not there.

        With `push_to_hub` also to the hub, as `push_to_hub(repo_id, **push_options)` does; gives the commit's address.
        Raises UserError where the folder can't be written; an SAE that was there is still there then.
        """
        # The mixin's own would remove config.json first, even if nothing can be written.
        folder = Path(save_directory)
        self._save_pretrained(folder)
        return self.push_to_hub(repo_id=repo_id or folder.name, **push_options) if push_to_hub else None

    def write_card(self, folder: Path) -> None:
        """Write the model card, README.md of a folder, unless a person wrote the one that is there."""
        if is_our_card(folder / CARD):
            write_file(folder / CARD, lambda path: path.write_text(card(self), encoding="utf-8"))

    def _save_pretrained(self, save_directory: Path) -> None:
        own = own_rows(self)
        # The same weights with other arguments are another SAE, so their file holds the arguments too.
        about = about_of(self.saved_config)
        if self.shard is not None:
            from csae.distributed.saving import save_shards

            by_first(lambda: self.write_card(save_directory), self.shard.ranks.hosts)
            save_shards(self, own, self.shard, save_directory, about)
            return
        self.write_card(save_directory)
        save = partial(save_tensors, self.state_dict(), about=about)
        before = shards_of(save_directory)
        with exchanged(save_directory, self.saved_config):
            write_file(save_directory / WEIGHTS, save)
        remove_shards(save_directory, before)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """The SAE in a folder or of a hub id; `options` as huggingface_hub's mixin has them.

        With `shard` (`csae.distributed`) this rank's rows of it: all ranks call it.

        Raises UserError where config.json or the weights are damaged, or don't belong together.
        """
        folder = Path(pretrained_model_name_or_path)
        config = waiting(folder)
        if config is not None:  # the mixin would read config.json
            arguments = {name: config[name] for name in cls._hub_mixin_init_parameters if name in config}
            return cls._from_pretrained(model_id=str(folder), config=config, **(arguments | options))
        if (folder / CONFIG).is_file():
            read_json(folder / CONFIG)  # the mixin reads it without a check
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        strict: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        config: dict[str, Any] | None = None,
        shard: Shard | None = None,
        **init: Any,
    ) -> Self:
        # huggingface_hub hands these on too, up to 0.36; given or not.
        downloading = {name: init.pop(name) for name in ("proxies", "resume_download") if name in init}

        def find(name: str) -> Path:
            if Path(model_id).is_dir():
                return Path(model_id) / name
            return Path(
                hf_hub_download(
                    repo_id=model_id,
                    filename=name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    **{name: value for name, value in downloading.items() if value is not None},
                )
            )

        def load() -> Any:
            weights = _find_weights(Path(model_id), find)
            if config is not None:
                for file, header in weights.headers.items():
                    check_config(config, _saved_config(header), Path(model_id) / CONFIG, file.name)
            try:
                whole = shapes(without_tensors(cls, init))
                misshapen = _misshapen(weights.shapes, whole)  # before any memory is taken for them
                if misshapen:
                    raise TypeError(misshapen)
                sae = without_tensors(cls, init, shard)
                tensors = weights.load({} if shard is None else own_rows(sae), None if shard is None else shard.ranks)
                wanted = {name: tensor.dtype for name, tensor in sae.state_dict().items()}
                tensors = {name: of.to(wanted.get(name, of.dtype), copy=True) for name, of in tensors.items()}
                sae.load_state_dict(tensors, strict=strict, assign=True)
            except (RuntimeError, TypeError) as error:
                reason = " ".join(str(error).split())[:300]  # torch's may hold a stack
                raise UserError(f"{model_id}: not a saved {cls.__name__}, or of another version: {reason}") from error
            return sae

        sae: Self = together(load, None if shard is None else shard.ranks.hosts)
        sae.trained_on = TrainedOn.from_config(config or {}, f"{model_id}: {CONFIG}")
        return sae.to(map_location)


def check_config(given: dict[str, Any], expected: dict[str, Any], file: Path, other: str) -> None:
    """Raises UserError where the config.json `file` has not the arguments that another file, `other`, says."""
    differing = [
        f"{name} is {reprlib.repr(given[name]) if name in given else 'missing'}, not {reprlib.repr(value)}"
        for name, value in expected.items()
        if name not in given or given[name] != value
    ]
    if differing:
        raise UserError(f"{file}: not as {other} says: {'; '.join(differing)}: copy the folder again")


def is_our_card(file: Path) -> bool:
    """Whether a model card may be written here: what a person wrote is kept."""
    try:
        return OUR_CARD in file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _saved_config(header: Header) -> dict[str, Any]:
    """The arguments that weights were saved with; empty where they don't say."""
    try:
        found = json.loads(header.about.get(CONFIG, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def without_tensors(kind: type[AnySaved], arguments: dict[str, Any], shard: Shard | None = None) -> AnySaved:
    """An SAE that is made with these arguments, on the meta device: it takes no memory, and draws nothing.

    shard: it has only those rows; all of them if not given.
    """
    with torch.device("meta"), owning(None if shard is None else shard.ranks.rows):
        sae = kind(**arguments)
    sae.shard = shard
    return sae


def shapes(sae: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}


def own_rows(sae: Saved) -> dict[str, range]:
    """Which rows of which tensors an SAE that is sharded has here; empty for one that is whole.

    Raises ValueError where a tensor has another shape than the SAE was made with.
    """
    needed = shapes(without_tensors(type(sae), sae._arguments))
    own = {} if sae.shard is None else {name: sae.shard.rows for name in ROWS if needed.get(name)}
    here = needed | {name: (len(rows), *needed[name][1:]) for name, rows in own.items()}
    misshapen = _misshapen(shapes(sae), here)
    if misshapen:
        raise ValueError(f"sae: {misshapen}, as it was made; it can't be saved with parameters of another shape")
    return own


def _find_weights(folder: Path, find: Callable[[str], Path]) -> Weights | Written:
    """Where the weights are. find: gives the path of a file by its name, and downloads it where there is no folder."""
    if folder.is_dir():
        if not (folder / WEIGHTS).is_file():
            if (folder / INDEX).is_file():
                return indexed(folder / INDEX, find)
            if (folder / METADATA).is_file():
                from csae.distributed.checkpoint import Written  # what it imports takes a second

                return Written(folder)
        return whole_files([folder / WEIGHTS])
    try:
        file = find(WEIGHTS)
    except EntryNotFoundError:
        try:
            index = find(INDEX)
        except EntryNotFoundError:
            index = None
        if index is None:
            raise
        return indexed(index, find)
    return whole_files([file])


def _misshapen(found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first of the tensors needed that is missing or of another shape, or None."""
    for name, shape in needed.items():
        if found.get(name) != shape:
            given = reprlib.repr(list(found[name])) if name in found else "missing"
            return f"{name} is {given}; needed {reprlib.repr(list(shape))}"
    return None
