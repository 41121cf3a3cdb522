"""Files that are whole or not there: written under a temporary name, then renamed; JSON read back; disk errors."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from csae.errors import FailedElsewhere, UserError, shown
from csae.progress import say

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# What the system says, whichever layer reports it, and what to do. What is not here is said as the system says it.
ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, or choose another folder",
    errno.EDQUOT: "the disk quota is used up, the disk is full for you: free some space, or choose another folder",
    errno.EFBIG: "it is larger than this file system or its limits allow: choose another folder",
    errno.EROFS: "Read-only file system: choose another folder",
    errno.EIO: "the disk or the network behind it reports an input/output error: check it (dmesg), and try again",
    errno.ENOTDIR: "a part of that path is a file, not a folder: choose another folder",
    errno.EEXIST: "a part of that path is a file, not a folder: choose another folder",
    errno.EISDIR: "it is a folder: give the name of a file",
    errno.ENOENT: "no such file or folder",
    errno.ELOOP: "its symbolic links go round in a circle: mend or remove them",
    errno.ENAMETOOLONG: "the name is too long for this file system: give a shorter one",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n 65536`",
    errno.ENFILE: "too many open files on this machine: close some programs",
    errno.ESTALE: "the network file system has lost it: mount it again, and try again",
    errno.ENODEV: "it is no ordinary file: give a file on a disk",
    errno.ENXIO: "it is no ordinary file: give a file on a disk",
    errno.ENOMEM: "there is no memory left for it: close some programs",
}
NO_PERMISSION = {
    "use": "no permission: choose another folder, or allow it with `chmod`",
    "write": "no permission to write there: choose another folder",
    "read": "no permission to read it: allow it with `chmod +r`, or ask its owner",
}
# Some libraries give a text without a number.
IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE)
TEXTS = {os.strerror(number): number for number in IN_WORDS}
UNFINISHED = ".unfinished"  # the folder in which `filled` keeps files until all are written
# torch.save says no more than this of a disk that is full, of a quota and of a limit.
NOT_TAKEN = ("PytorchStreamWriter failed", "iostream error", "inline_container.cc")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its name at once.

    Raises UserError where the disk is full or the folder can't be written; nothing is left behind then.
    """
    path = Path(path)
    with temporary_for(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        complete(temporary)
        os.replace(temporary, path)


@contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """The name of a temporary file beside `path`. An error removes it; one of the disk becomes a UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        reason = disk_problem(error, "write")
        if reason and not isinstance(error, UserError):
            raise UserError(f"{path}: not written: {reason}; nothing half-written was left") from error
        raise


def complete(temporary: Path) -> None:
    """Wait until a temporary file is on the disk, and let others read it as they read any file."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files that only their owner can read


def check_utf8(path: Path) -> None:
    """Raises UserError where a name is not UTF-8: safetensors can't open it, and says so only after the work."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{shown(path)}: not UTF-8, and safetensors opens no other names: give another folder"
        ) from error


def check_writable(path: Path) -> None:
    """Raises UserError now where `write_file` would after the work; a folder that it makes on the way stays."""
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise UserError(f"{path}: it is a folder: give the name of a file")
        trial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()


def check_new(folder: Path) -> None:
    """Raises UserError unless a folder is not there, or empty."""
    folder = Path(folder)
    with reading(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: not empty: give a new folder")


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A folder to write files to; they are in `folder`, which is new or empty, when all of them are written.

    After an error none of them is there. What a kill leaves in it is removed by the next call. Raises UserError where
    the folder holds something else, another process fills it, or it can't be written.
    """
    new, working = [each for each in (folder, *folder.parents) if not each.is_dir()], folder / UNFINISHED
    if not (working.is_dir() and os.listdir(folder) == [UNFINISHED]):
        check_new(folder)
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if os.name != "nt":  # Windows opens no folders
                opened = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, opened)
                lock(opened, folder, "writing to it")
            shutil.rmtree(working, ignore_errors=True)
            check_new(folder)  # another process may have filled it meanwhile
            working.mkdir()
        try:
            yield working
            with writing(folder):
                for entry in sorted(working.iterdir()):
                    os.rename(entry, folder / entry.name)
        finally:
            shutil.rmtree(working, ignore_errors=True)
            with suppress(OSError):
                for each in new:
                    each.rmdir()  # it is empty after an error


def write_with_config(
    folder: Path, weights: str, save: Callable[[Path], object], config: str, content: dict[str, Any]
) -> None:
    """`save` fills the file `weights` of the folder, `content` goes to the file `config` as JSON: both, or neither.

    Beside the config of another SAE, weights can mean something else. Raises as `write_file` does; what was there is
    still there then.
    """
    text = json.dumps(content, indent=2) + "\n"

    def write_both(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        write_file(folder / weights, save)  # it takes its name when the config is ready to

    write_file(folder / config, write_both)


def write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, in one line, where it can't be read or holds something else."""
    path = Path(path)
    with reading(path):
        content = path.read_bytes()
    return parse_json(content, str(path), "copy the folder again")


def parse_json(content: bytes | str, where: str, advice: str) -> dict[str, Any]:
    """The object that JSON text holds; UTF-8, a byte order mark is skipped.

    Raises UserError, which begins with `where` and ends with `advice`, where it is no JSON or no object, nested too
    deeply, or holds NaN, Infinity, or a number beyond what float64 (a whole one: beyond 4,300 digits) can hold.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if not text.strip():
            raise ValueError("it is empty")
        found = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise UserError(f"{where}: not JSON that can be read (nested too deeply): {advice}") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({_reason(error)}): {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: given a JSON {type(found).__name__}; needed an object: {advice}")
    return found


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    text = str(error)
    return "a number of more than 4,300 digits" if "integer string conversion" in text else text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Disk errors inside become a UserError that says that `path` can't be read, why, and what to do."""
    with _told(f"{path}: can't be read", "read"):
        yield


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Disk errors inside become a UserError that says that `path` can't be written, why, and what to do."""
    with _told(f"{path}: can't be written", "write"):
        yield


@contextmanager
def _told(what: str, doing: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_problem(error, doing)
        if reason is None:
            raise
        raise UserError(f"{what}: {reason}") from error


def lock(file: int | IO[Any], path: Path, doing: str) -> None:
    """Locks an open file or folder until it is closed, or the process ends. path: its name, or its folder's.

    doing: what needs it alone, such as "training this run". Raises UserError where another process has the lock. Where
    the system has no locks, it says so on stderr, and goes on.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"{path}: another process is {doing}: wait until it is done, or give another folder"
            ) from error
        # Some network file systems have no locks.
        reason = f"this file system can't lock it ({error.strerror})"
        say(f"{path}: {reason}: see that only one process at a time is {doing}")


def wait_for_lock(file: IO[Any]) -> None:
    """Locks an open file until it is closed, or the process ends; waits while another process has the lock.

    Raises OSError where this file system has no locks; nothing happens where the system has none.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)


def check_readable(path: Path) -> None:
    """Raises UserError where a file can't be opened and read, whatever the reason; its content is not looked at.

    Other libraries say "no such file" or "not whole" of whatever they can't open.
    """
    with reading(path), open(path, "rb") as file:
        file.read(1)


def disk_problem(error: BaseException | None, doing: str = "write") -> str | None:
    """What a disk error means and what to do, or None where it is none. doing: "write", "read", or "use".

    It may be an OSError, or that of a library that was raised from one, or tells of one in its text.
    """
    if isinstance(error, FailedElsewhere):  # that rank says it
        return None
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        number = _number_in(str(error)) if number is None else number
        if number in (errno.EACCES, errno.EPERM):
            return NO_PERMISSION[doing]
        if number in ADVICE:
            return _for_reading(ADVICE[number]) if doing == "read" else ADVICE[number]
        if any(words in str(error) for words in NOT_TAKEN):
            return "the disk did not take all of it, it may be full: free some space, or choose another folder"
        if isinstance(error, OSError) and error.strerror and number is not None:
            return f"{error.strerror}: choose another folder" if doing == "write" else error.strerror
        error = error.__cause__
    return None


def _for_reading(advice: str) -> str:
    return advice.replace(": choose another folder", ": check the path")


def _number_in(text: str) -> int | None:
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)
    if found:
        return int(found[1] or found[2])
    return next((number for words, number in TEXTS.items() if words in text), None)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_running(process: int) -> bool:
    """Whether a process is; where a file system has no locks, it may be at work here."""
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True
