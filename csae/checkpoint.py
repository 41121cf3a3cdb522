"""Checkpoints of a run: `RUN/checkpoint-STEP`, whole or not there, and the SAE that is in a folder.

A checkpoint is a folder that is written under a temporary name and then renamed, so a kill at any moment leaves the
one before. It is itself a saved SAE, with the optimizer's state and the step beside.

One process writes safetensors. Several write by torch.distributed.checkpoint (`csae.distributed.checkpoint`), each the
rows that it owns. Any number of processes reads both.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from csae.checkpoint_folders import (
    OPTIMIZER,
    STATE,
    check_free,
    last_checkpoint,
    not_whole,
    read_state,
    remove_checkpoints,
    remove_files,
)
from csae.contextual_sae import ContextualSAE
from csae.distributed.agreement import by_first, gathered, together
from csae.errors import UserError, shown
from csae.exchange import CONFIG, config_of
from csae.files import read_json, write_file, write_json, writing
from csae.parts import METADATA, WEIGHTS, whole_files
from csae.run import RUN, identity, read_run, sync_folder
from csae.sae import SAE
from csae.saving import check_config, own_rows
from csae.tensors import CHECKSUM, read_header, save_tensors
from csae.topk_sae import TopKSAE

if TYPE_CHECKING:
    from csae.distributed.ranks import Ranks

ARCHITECTURES: dict[str, type[SAE]] = {"topk": TopKSAE, "contextual": ContextualSAE}
# Before the names of tensors that are no parameter's: in a file of their own, or by themselves in DCP's.
BESIDE, OF_OPTIMIZER = "training/", "optimizer/"
DEAD = "dead"  # of those: numbers of features, which belong to the rows

_writer = ThreadPoolExecutor(1, "checkpoint")


def load_sae(name: str | Path, device: torch.device | str = "cpu", ranks: Ranks | None = None) -> SAE:
    """The SAE of a run, a saved folder or a hub id, of any architecture, in evaluation mode.

    A run that has not finished gives the SAE of its last checkpoint. ranks: it is sharded over them, and all call this;
    none has more than its rows in memory.

    Raises UserError where there is none, where it is truncated or of another program, or where its files contradict
    each other.
    """
    folder = Path(name)
    job: dict[str, Any] = {}
    if folder.is_dir():
        job = read_run(folder)
        if not (folder / CONFIG).is_file():
            checkpoint = last_checkpoint(folder)
            if checkpoint is None:
                raise UserError(f"{folder}: no saved SAE here ({CONFIG} and {WEIGHTS} are needed): name a run's folder")
            read_state(checkpoint, job)
            folder = checkpoint
        config_file = folder / CONFIG
    elif folder.exists():
        raise UserError(f"{folder}: a file; needed the folder of a run, with {CONFIG} and {WEIGHTS}")
    elif siblings := _runs_beside(folder):
        raise UserError(f"{folder}: no such folder; in {folder.parent} there is {', '.join(siblings)}")
    else:
        config_file = _hub_config(str(name))
    config = config_of(folder) if folder.is_dir() else read_json(config_file)
    arch = config.get("arch")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UserError(
            f"{config_file}: not an SAE of csae: arch is {shown(repr(arch))[:60]}; "
            f"needed one of {', '.join(map(repr, ARCHITECTURES))}"
        )
    check_config(config, job.get("sae", {}), config_file, RUN)
    source = folder if folder.is_dir() else name
    own: dict[str, Any] = {}
    if ranks is not None:
        from csae.distributed.shard import Shard

        if not isinstance(config.get("d_sae"), int):
            raise UserError(f"{config_file}: d_sae is {shown(repr(config.get('d_sae')))[:60]}; needed a whole number")
        own = {"shard": Shard(config["d_sae"], ranks)}
    try:
        sae = ARCHITECTURES[arch].from_pretrained(str(source), map_location=str(device), **own)
    except UserError:
        raise
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise UserError(f"{source}: not a saved SAE of csae: {_one_line(error)}") from error
    return sae.eval()


def save_checkpoint(
    run: Path,
    step: int,
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    job: dict[str, Any],
    beside: dict[str, Tensor] | None = None,
) -> Future[None]:
    """Write `run/checkpoint-STEP`, and then remove older ones. All ranks call it where there are several.

    beside: what `restore_checkpoint` is to give back. It is the same on all ranks, but `dead`: numbers of features that
    are here.

    Gives what to wait for (`result()`) before the next checkpoint, and before the run ends. A sharded SAE on a GPU is
    copied to the CPU, and written from there meanwhile. Elsewhere the copy would take the memory that sharding saves:
    all is written when this returns.

    Raises UserError where it can't be written, here or in `result()`: on one rank, and FailedElsewhere on the others.
    The checkpoint before is kept then.
    """
    temporary, final = run / f".checkpoint-{step}.tmp", run / f"checkpoint-{step}"
    beside = beside or {}
    about = {"step": step, "run": identity(job)}

    def finish(checksums: dict[str, str]) -> None:
        write_json(temporary / STATE, about | {CHECKSUM: checksums})
        with writing(final):
            sync_folder(temporary)
            os.rename(temporary, final)
        sync_folder(run)
        remove_checkpoints(run, job, but=final)

    if sae.shard is None:
        check_free(run, step)
        remove_files(temporary)
        try:
            sae.save_pretrained(temporary)
            kept = {BESIDE + name: tensor for name, tensor in beside.items()}
            write_file(temporary / OPTIMIZER, partial(save_tensors, _moments(sae, optimizer) | kept))
            finish({name: read_header(temporary / name).about[CHECKSUM] for name in (WEIGHTS, OPTIMIZER)})
        finally:
            remove_files(temporary)
        return written()

    from csae.distributed.checkpoint import checksum, write  # torch's part takes a second to import

    ranks = sae.shard.ranks

    def begin() -> None:
        check_free(run, step)
        remove_files(temporary)
        with writing(temporary):
            temporary.mkdir(parents=True)
        sae.write_card(temporary)
        write_json(temporary / CONFIG, sae.saved_config)

    by_first(begin, ranks.hosts)
    tensors = _of_ranks(sae, optimizer, beside)
    own = _own(sae, tensors)
    background = in_background(sae)
    if background:
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def save() -> None:
        def finish_all() -> None:
            missing = sorted(name for name in checksums if not (temporary / name).is_file())
            if missing:
                raise UserError(
                    f"{run}: {missing[0]} was written by another rank, and is not here: give a folder that all see"
                )
            finish(checksums | {CONFIG: checksum(temporary / CONFIG)})

        try:
            with writing(final):
                told = gathered(lambda: write(temporary, tensors, own, sae.d_sae, ranks), ranks.files)
            checksums = {name: of for files in told for name, of in files.items()}
            by_first(finish_all, ranks.files)
        finally:
            if ranks.rank == 0:
                remove_files(temporary)

    if background:
        return _writer.submit(save)
    save()
    return written()


def in_background(sae: SAE) -> bool:
    """Whether a sharded SAE is copied and written meanwhile: on a CPU the copy would take as much memory again."""
    return sae.W_dec.is_cuda


def restore_checkpoint(
    checkpoint: Path, sae: SAE, optimizer: torch.optim.Optimizer, job: dict[str, Any]
) -> tuple[int, dict[str, Tensor]]:
    """Load the checkpoint's state into `sae` and `optimizer`, in place; gives its step, and what was saved beside.

    All ranks call it where there are several: each reads its rows.

    Raises UserError where it is not whole, of another run, or where its files contradict each other.
    """
    ranks = None if sae.shard is None else sae.shard.ranks

    def restore() -> tuple[int, dict[str, Tensor]]:
        state = read_state(checkpoint, job)
        by_ranks = (checkpoint / METADATA).is_file()
        try:
            check_config(read_json(checkpoint / CONFIG), job["sae"], checkpoint / CONFIG, RUN)
            read = _read_of_ranks if by_ranks else _read_files
            return state["step"], read(checkpoint, sae, _moments(sae, optimizer), state.get(CHECKSUM, {}))
        except UserError as error:
            raise not_whole(checkpoint, error) from error

    return together(restore, None if ranks is None else ranks.hosts)


def _read_files(checkpoint: Path, sae: SAE, moments: dict[str, Tensor], checksums: dict[str, str]) -> dict[str, Tensor]:
    """What one process wrote: into the SAE and the moments; gives what was saved beside."""
    stored = whole_files([checkpoint / WEIGHTS, checkpoint / OPTIMIZER])
    own = _own(sae, sae.state_dict() | moments)
    for (file, header), expected in zip(stored.headers.items(), (sae.state_dict(), moments), strict=True):
        found = {name: shape for name, shape in header.shapes.items() if not name.startswith(BESIDE)}
        _check_shapes(file.name, found, expected, own, sae)
        if file.name in checksums and header.about.get(CHECKSUM) != checksums[file.name]:
            raise UserError(f"{file.name} is not the file that {STATE} was written with")
    loaded = stored.load(own, None if sae.shard is None else sae.shard.ranks)
    sae.load_state_dict({name: loaded.pop(name) for name in sae.state_dict()})
    for name, tensor in moments.items():
        tensor.copy_(loaded.pop(name))
    beside = {name.removeprefix(BESIDE): tensor for name, tensor in loaded.items()}
    if DEAD in beside and sae.shard is not None:
        rows, dead = sae.shard.rows, beside[DEAD]
        beside[DEAD] = dead[(dead >= rows.start) & (dead < rows.stop)] - rows.start
    return beside


def _read_of_ranks(
    checkpoint: Path, sae: SAE, moments: dict[str, Tensor], checksums: dict[str, str]
) -> dict[str, Tensor]:
    """What several ranks wrote, as `_read_files`."""
    from csae.distributed.checkpoint import Written

    stored, ranks = Written(checkpoint), None if sae.shard is None else sae.shard.ranks
    expected = sae.state_dict() | {OF_OPTIMIZER + name: tensor for name, tensor in moments.items()}
    shapes = {name: shape for name, (shape, _) in stored.stored.items()}
    own = _own(sae, shapes)
    _check_shapes(
        METADATA, {name: of for name, of in shapes.items() if not name.startswith(BESIDE)}, expected, own, sae
    )
    stored.check(ranks)
    beside = {name: stored.empty(name, own.get(name)) for name in shapes if name.startswith(BESIDE)}
    stored.read(expected | beside, own, ranks)
    found = {name.removeprefix(BESIDE): tensor for name, tensor in beside.items()}
    if DEAD in found:
        found[DEAD] = found[DEAD].nonzero().squeeze(1)
    return found


def _of_ranks(sae: SAE, optimizer: torch.optim.Optimizer, beside: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank has for a checkpoint, by the names that DCP gets."""
    moments = {OF_OPTIMIZER + name: tensor for name, tensor in _moments(sae, optimizer).items()}
    kept = {BESIDE + name: tensor for name, tensor in beside.items()}
    if DEAD in beside:  # by rows, as all that is split: numbers would be another's after a change of ranks
        rows = torch.zeros_like(sae.tokens_since_fired, dtype=torch.bool)
        kept[BESIDE + DEAD] = rows.index_fill(0, beside[DEAD], True)
    return {name: tensor.detach() for name, tensor in (sae.state_dict() | moments | kept).items()}


def _own(sae: SAE, names: Iterable[str]) -> dict[str, range]:
    """Which rows of these tensors of a checkpoint are this rank's: of the SAE's, of their moments, of dead features."""
    own = {} if sae.shard is None else own_rows(sae)
    rows = {}
    for name in names:
        parameter, _, key = name.removeprefix(OF_OPTIMIZER).partition(".")
        if sae.shard is not None and (name == BESIDE + DEAD or (parameter in own and key != "step")):
            rows[name] = sae.shard.rows
    return rows


def _check_shapes(
    file: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], own: Container[str], sae: SAE
) -> None:
    """Raises UserError where names or shapes are not those expected, of whose tensors in `own` only rows are here."""
    shapes = {
        name: (sae.d_sae, *tensor.shape[1:]) if name in own else tuple(tensor.shape)
        for name, tensor in expected.items()
    }
    if found != shapes:
        name = min(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise UserError(f"{file}: {shown(name)} is {found.get(name)}; needed {shapes.get(name)}")


def written() -> Future[None]:
    """What `save_checkpoint` gives of a checkpoint that is there already."""
    done: Future[None] = Future()
    done.set_result(None)
    return done


def _moments(sae: SAE, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state, by the names of the SAE's parameters."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in sae.named_parameters()}
    return {
        f"{names[parameter]}.{key}": tensor
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def _runs_beside(folder: Path) -> list[str]:
    """Names of runs in the folder's parent, a few; where there are any, a missing one is no hub id."""
    if not folder.parent.is_dir():
        return []
    return sorted(other.parent.name for other in folder.parent.glob(f"*/{RUN}"))[:8]


def _hub_config(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, CONFIG))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: no such folder, and not to be had from the hub: give the folder of a run") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
