"""Writing folders of shards (`csae.data.shards`): each file whole or not there, by one process at a time.

    activations-00002-of-00005.safetensors            the second of five files
    activations-part002-00001-of-00003.safetensors    the first of three that were appended later

So a part that lacks a file is recognised by the names of the others, and goes on where it was cut short.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csae.data.shards import ABOUT_FILE, KEPT_TEXT, Shard, listed, read_about
from csae.errors import Stopped, UserError
from csae.files import check_utf8, is_running, lock, write_file, write_json, writing
from csae.progress import Progress, quiet
from csae.tensors import CHECKSUM, WORKING, checksum, save_plain

WINDOWS_AT_ONCE = 16
NAME = re.compile(r"activations(?:-part(\d+))?-(\d+)-of-(\d+)\.safetensors")
ANOTHER = "give a new or empty folder, or delete it first"

Read = Callable[[range], Mapping[str, Mapping[str, Tensor]]]
"""Gives for each folder, by its name, the tensors of a range of windows, by their names in the format."""


class Part(NamedTuple):
    """The windows that are written together: all of a new folder, or what is appended to one."""

    number: int  # from 1
    n_windows: int
    windows_per_shard: int

    def files(self, folder: Path) -> list[Path]:
        """The files of this part in a folder, there or not."""
        number = "" if self.number == 1 else f"part{self.number:03d}-"
        total = len(self.sizes())
        return [folder / f"activations-{number}{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]

    def sizes(self) -> list[int]:
        """How many windows each file holds."""
        starts = range(0, self.n_windows, self.windows_per_shard)
        return [min(self.windows_per_shard, self.n_windows - start) for start in starts]


def write_shards(
    folder: str | Path,
    read: Callable[[range], dict[str, Tensor]],
    n_windows: int,
    windows_per_shard: int,
    about: dict[str, Any],
    progress: Progress = quiet,
) -> None:
    """Writes n_windows windows into a folder: a new or empty one, or one where the same job was cut short.

    read: gives the tensors of a range of windows, by their names in the format. about: for activations.json; it
    tells one job from another.
    What is there after a kill, a full disk, Ctrl-C or an error of `read` is whole, and stays. The same call goes on
    from there and gives the same bytes. If no file was finished, the folder is left as it was.

    Raises UserError where the folder holds something else, can't be written, or is written by another process, Stopped
    after Ctrl-C.
    """
    with claimed(Path(folder)):
        part = Part(1, n_windows, windows_per_shard)
        write_folders(Path(folder), lambda windows: {"": read(windows)}, part, {"": about}, progress)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes that write shards out of it; removes what a kill left half-written.

    Raises UserError where another process has it, or it can't be made. After an error a folder that was made here
    and is empty goes again.
    """
    check_utf8(folder)
    existed = os.path.lexists(folder)
    if existed and not folder.is_dir():
        raise UserError(f"activations {str(folder)!r} is a file; give a new or empty folder")
    with writing(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        if os.name != "nt":  # Windows opens no folders
            opened = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, opened)
            lock(opened, folder, "writing these activations")
        _remove_half_written(folder)
        for inside in folder.iterdir():  # a hook point's, it may be
            if inside.is_dir() and not inside.is_symlink():
                _remove_half_written(inside)
        unlock = stack.pop_all()
    with unlock:
        try:
            yield
        except BaseException:
            if not existed:
                with suppress(OSError):
                    folder.rmdir()
            raise


def write_folders(
    folder: Path, read: Read, part: Part, about: Mapping[str, dict[str, Any]], progress: Progress = quiet
) -> None:
    """The first part of a folder that is `claimed`. about: for the activations.json of each folder in it, by its name.

    Raises as `write_shards` does.
    """
    with begun(folder, part, about) as paths:
        write_part(paths, read, part, progress)


@contextmanager
def begun(
    folder: Path, part: Part, about: Mapping[str, dict[str, Any]], alone: bool = True
) -> Iterator[dict[str, Path]]:
    """The folders for shards in a folder that is `claimed`, with their activations.json, as `write_folders` has them.

    The name "" is the folder itself; otherwise each is one of several hook points' and has the same windows, and
    `about` holds also "", for the folder that they are in. alone: after an error what was made goes again, if there is
    no shard yet; others may be writing one. Raises UserError where the folder holds something else.
    """
    names = [name for name in about if name or len(about) == 1]
    made: list[Path] = []
    ready = False
    try:
        with writing(folder):
            for name, said in about.items():
                inside = () if name else names
                _check_folder(folder / name, part.files(folder / name) if name in names else [], said, inside)
            made = [folder / name for name in about if not (folder / name / ABOUT_FILE).is_file()]
            for name, said in about.items():
                (folder / name).mkdir(exist_ok=True)
                if folder / name in made:
                    write_json(folder / name / ABOUT_FILE, said)
        ready = True
        yield {name: folder / name for name in names}
    except BaseException:
        there = (folder / name for name in names if (folder / name).is_dir())
        if (alone or not ready) and not any(map(listed, there)):
            for begun in sorted(made, reverse=True):  # the folder itself last
                with suppress(OSError):
                    (begun / ABOUT_FILE).unlink(missing_ok=True)
                    if begun != folder:
                        begun.rmdir()
        raise


def write_part(folders: Mapping[str, Path], read: Read, part: Part, progress: Progress = quiet) -> None:
    """Writes those files of a part that are missing, into folders that are `claimed`. Raises as `write_shards` does."""
    check_whole(folders, read, part)
    write_files(folders, read, part, missing_of(folders, part), progress)


def missing_of(folders: Mapping[str, Path], part: Part) -> list[int]:
    """The numbers of a part's files, from 0, that are not there in all folders."""
    files = zip(*(part.files(folder) for folder in folders.values()), strict=True)
    return [number for number, shard in enumerate(files) if not _all_there(shard)]


def write_files(
    folders: Mapping[str, Path], read: Read, part: Part, missing: Sequence[int], progress: Progress = quiet
) -> None:
    """Writes files of a part by their numbers; other processes may write others. Raises as `write_shards` does."""
    if not missing:
        return
    files = [part.files(folder) for folder in folders.values()]
    try:
        # The next shard is made while one is written. A lone thread: two shards and a copy are what memory holds.
        with ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for number, shard in zip(missing, _shards(read, missing, part, progress), strict=True):
                if written is not None:
                    written.result()
                written = writer.submit(
                    _write, {folders[name]: tensors for name, tensors in shard.items()}, part, number
                )
            if written is not None:
                written.result()
    except BaseException as error:
        whole = sum(map(_all_there, zip(*files, strict=True)))
        there = f"{whole} of {len(part.sizes())} shards are whole and stay in {os.path.commonpath(folders.values())}"
        if whole and isinstance(error, KeyboardInterrupt):
            raise Stopped(f"stopped; {there}: the same command goes on from there") from error
        if whole and isinstance(error, UserError):
            raise UserError(f"{error}; {there}") from error
        raise


def parts_of(folder: Path) -> tuple[list[list[Path]], list[Path]]:
    """The files of each part that is whole, and those of a last part that was cut short.

    Raises UserError where another part is cut short, or a file is named otherwise.
    """
    parts: dict[int, dict[int, Path]] = {}
    totals: dict[int, set[int]] = {}
    for file in listed(folder):
        found = NAME.fullmatch(file.name)
        if not found:
            raise UserError(f"activations {str(folder)!r}: {file.name} is not by csae: it can't be appended to")
        number = int(found[1] or 1)
        parts.setdefault(number, {})[int(found[2])] = file
        totals.setdefault(number, set()).add(int(found[3]))
    whole: list[list[Path]] = []
    for number in range(1, max(parts, default=0) + 1):
        files = parts.get(number, {})
        if len(totals.get(number, ())) == 1 and set(files) == set(range(1, max(totals[number]) + 1)):
            whole.append([files[i] for i in sorted(files)])
        elif number == max(parts):
            return whole, [files[i] for i in sorted(files)]
        else:
            raise UserError(f"activations {str(folder)!r}: files of part {number} are missing: copy them again")
    return whole, []


def _write(shard: Mapping[Path, Mapping[str, Tensor]], part: Part, number: int) -> None:
    for folder, tensors in shard.items():
        file = part.files(folder)[number]
        if not file.is_file():
            # One entry: the order of several would vary, and the bytes with it.
            write_file(file, partial(save_plain, tensors, metadata={CHECKSUM: checksum(tensors)}))


def _all_there(files: Sequence[Path]) -> bool:
    return all(file.is_file() for file in files)


def _check_folder(folder: Path, files: Sequence[Path], about: dict[str, Any], inside: Collection[str]) -> None:
    """Raises UserError unless the folder is free or holds a part of this job.

    inside: names of the folders in it, each of which is checked too: a kill may leave them without its own file.
    """
    if not folder.exists() or all(name.startswith(KEPT_TEXT) or name in inside for name in os.listdir(folder)):
        return
    if not (folder / ABOUT_FILE).is_file():
        raise UserError(f"activations {str(folder)!r} is not empty; {ANOTHER}")
    check_about(folder, about)
    ours = {file.name for file in files}
    for file in listed(folder):
        if file.name not in ours:
            raise UserError(f"activations {str(folder)!r} is not empty, {file.name} is none of these; {ANOTHER}")


def check_about(folder: Path, about: dict[str, Any], but: Sequence[str] = ()) -> None:
    """Raises UserError where activations.json in a folder says others than `about`, the entries `but` aside."""
    earlier, now = read_about(folder / ABOUT_FILE), json.loads(json.dumps(about))
    names = (earlier.keys() | now.keys()) - set(but)
    differing = sorted(name for name in names if earlier.get(name) != now.get(name))
    if differing:
        changes = ", ".join(f"{name}: {earlier.get(name)!r}, now {now.get(name)!r}" for name in differing)
        how = (
            ANOTHER
            if but or set(differing) - {"n_windows", "windows_sha256"}
            else f"--append adds to a folder that is whole; else {ANOTHER}"
        )
        raise UserError(f"activations {str(folder)!r} is not empty, it holds others ({changes}); {how}")


def _remove_half_written(folder: Path) -> None:
    """Removes what a kill left while a file was written."""
    for name in os.listdir(folder):
        found = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", name.removesuffix(WORKING))
        if found and (found[1] == ABOUT_FILE or NAME.fullmatch(found[1])) and not is_running(int(found[2])):
            shutil.rmtree(folder / name) if name.endswith(WORKING) else (folder / name).unlink()


def check_whole(folders: Mapping[str, Path], read: Read, part: Part) -> None:
    """Raises UserError unless the shards of an earlier start are of this job: their sizes, and the last one's content.

    The first few windows of the last shard are read again and compared: this catches what `about` does not hold, such
    as other weights.
    """
    other = f"of another job; {ANOTHER}"
    for name, folder in folders.items():
        last = None
        for number, (file, size) in enumerate(zip(part.files(folder), part.sizes(), strict=True)):
            if file.is_file():
                last, at = Shard(file), number * part.windows_per_shard
                if last.shape[0] != size:
                    raise UserError(f"{file} holds {last.shape[0]} windows, not {size}: it is {other}")
        if last is not None:
            count = min(WINDOWS_AT_ONCE, last.shape[0])
            for of, tensor in read(range(at, at + count))[name].items():
                if of not in last.tensors or not alike(last.tensors[of][:count], tensor.cpu()):
                    raise UserError(f"{last.file} holds other {of} than are to be written: it is {other}")


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, or activations of the same from another machine."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool((one.float() - other.float()).norm() <= 0.02 * other.float().norm())


def _shards(
    read: Read, numbers: Sequence[int], part: Part, progress: Progress
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """The tensors of shards for each folder, filled a few windows at a time."""
    steps = [
        range(start, min(start + WINDOWS_AT_ONCE, first + part.windows_per_shard, part.n_windows))
        for first in (number * part.windows_per_shard for number in numbers)
        for start in range(first, min(first + part.windows_per_shard, part.n_windows), WINDOWS_AT_ONCE)
    ]
    shard: dict[str, dict[str, Tensor]] = {}
    for windows in progress(steps, "caching activations"):
        offset = windows.start % part.windows_per_shard
        size = min(part.windows_per_shard, part.n_windows - windows.start + offset)
        for name, tensors in read(windows).items():
            filled = shard.setdefault(name, {})
            for of, tensor in tensors.items():
                if of not in filled:
                    filled[of] = torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype)
                filled[of][offset : offset + len(windows)] = tensor
        if offset + len(windows) == size:
            yield shard
            shard = {}
