"""The folder of a run: what it says of itself, its lock, and the lines of its metrics.

RUN/run.json        the job: what is trained on what, and how
RUN/metrics.jsonl   a line for each `log_every` steps; locked while a process trains the run
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from csae.errors import UserError, shown
from csae.files import check_utf8, lock, parse_json, read_json, reading, write_file, write_json, writing
from csae.parts import INDEX, NEXT, SHARD, WEIGHTS
from csae.tensors import WORKING

RUN, METRICS = "run.json", "metrics.jsonl"
LONGEST = 2**20  # bytes of a line of metrics
# The entries of run.json and their types. Runs of earlier versions lack some.
JOB: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("sae", "train", "data"), (dict,)),
    **dict.fromkeys(("n_params", "n_windows", "n_ctx"), (int,)),
    "origin": (dict, type(None)),
}
ORIGIN: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("activations", "model", "lm_dtype", "hook", "hook_to", "text", "dataset", "text_column"), (str,)),
    **dict.fromkeys(("layer", "n_ctx", "max_tokens", "held_out_windows", "shuffle", "shuffle_seed"), (int,)),
    **dict.fromkeys(("bos", "keep_first", "chat", "stream"), (bool,)),
    "held_out": (int, float),
}
# What is told of hashes.
IN_WORDS = {
    "windows_sha256": "data: the text has other tokens: it was changed since, or the model's tokenizer was",
    "files_sha256": "data: --dataset has files of other names or sizes: it was changed since",
}
# What is in run.json and no option of `csae train`.
NO_OPTION = ("d_in", "d_out", "k_aux", "aux_coef", "start", "data", "stream")
SOURCE_STATE = "source.safetensors"  # of a stream, after the last step
OPTIONS = "config.yaml"  # of `csae train --config`
SAE_FILES = ("config.json", WEIGHTS, INDEX, "README.md")
FILES = (RUN, OPTIONS, "windows.bin", *SAE_FILES, "logs.json", SOURCE_STATE)


def read_run(run: Path) -> dict[str, Any]:
    """What run.json holds; empty where there is none. Raises UserError where it is damaged."""
    file = run / RUN
    if not os.path.lexists(file):
        return {}
    job = read_json(file)
    if not isinstance(job.get("sae"), dict) or not isinstance(job.get("train"), dict):
        raise UserError(f"{file}: not that of a run of csae (it has no `sae` and `train`): copy the folder again")
    _check_types(job, JOB, file)
    _check_types(job.get("origin") or {}, ORIGIN, file)
    return job


def read_origin(run: Path) -> dict[str, Any]:
    """Where the activations of a run came from (`csae.data.sources`); empty where it does not say."""
    return read_run(run).get("origin") or {}


def read_trained_on(run: Path) -> dict[str, Any]:
    """What a run was trained on, as far as it says: model, lm_dtype, place, n_ctx, bos, keep_first."""
    job = read_run(run)
    data, origin = job.get("data") or {}, job.get("origin") or {}
    names = ("model", "lm_dtype", "layer", "hook", "hook_to", "n_ctx", "keep_first")
    kinds = {name: ORIGIN[name] for name in names} | {"bos": (bool, list)}
    # `data` comes from the source, which may be of a user's own class: its types are not known.
    known = {name: data[name] for name, types in kinds.items() if _is_a(data.get(name), types)}
    if origin.get("activations") is not None and "n_ctx" in known:
        origin = origin | {"n_ctx": known["n_ctx"]}  # saved windows have a length, whatever was given
    return known | {name: origin[name] for name in kinds if origin.get(name) is not None}


def as_json(job: dict[str, Any]) -> dict[str, Any]:
    """A job as run.json gives it back."""
    return json.loads(json.dumps(job))


def identity(job: dict[str, Any]) -> str:
    """A hash of the job: its checkpoints hold it, so those of another run are recognised."""
    return hashlib.sha256(json.dumps(as_json(job), sort_keys=True).encode()).hexdigest()


def check_job(run: Path, job: dict[str, Any]) -> None:
    """Raises UserError where the folder `run` holds another job, or something else. Nothing is written."""
    check_utf8(run)
    if run.is_dir() and os.path.lexists(run / RUN):
        differing = differences(read_run(run), as_json(job))
        if differing:
            raise UserError(
                f"{run}: holds another run ({'; '.join(differing)}): "
                f"give another folder, or the options that it was started with"
            )
    elif run.is_dir():
        with reading(run):
            others = [entry for entry in run.iterdir() if not _of_a_run_that_began(entry)]
        if others:
            raise UserError(f"{run}: not empty, and no run of csae: give another folder")
    elif run.exists():
        raise UserError(f"{run}: a file, and no run of csae: give a folder")


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two jobs, by the options of the command line: "--k: given 32, the run has 16"."""
    found = []
    for part in ("sae", "train", "origin", "data"):
        one, other = (job.get(part) or {} for job in (earlier, now))
        names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        found += [_difference(part, name, one, other, earlier, now) for name in names]
        if found and part == "origin":
            return found  # the rest follows from those
    rest = ((set(earlier) | set(now)) - {"sae", "train", "origin", "data"}) if not found else set()
    if "init" in rest and isinstance(now.get("init"), dict) and isinstance(earlier.get("init"), dict):
        names = [job["init"].get("name") for job in (now, earlier)]
        rest.discard("init")
        if names[0] != names[1]:
            found.append(f"--init: given {shown(names[0])}, the run has {shown(names[1])}")
        elif now["init"] != earlier["init"]:
            found.append(f"--init: {shown(names[0])} has other weights than when the run began")
    return found + [
        f"{name}: {shown(now.get(name))}, the run has {shown(earlier.get(name))}"
        for name in sorted(rest)
        if earlier.get(name) != now.get(name)
    ]


def _difference(
    part: str, name: str, one: dict[str, Any], other: dict[str, Any], earlier: dict[str, Any], now: dict[str, Any]
) -> str:
    """One of `differences`."""
    given, had = other.get(name), one.get(name)
    if (part, name) == ("train", "steps"):
        given, had = (
            f"{job['train'].get('steps')} steps ({tokens:,} tokens)" if tokens else f"{job['train'].get('steps')} steps"
            for job, tokens in ((now, _tokens(now)), (earlier, _tokens(earlier)))
        )
        longer = " (a run that has ended can be extended, this one has not)" if _steps(now) > _steps(earlier) else ""
        return f"--tokens: given {given}, the run has {had}{longer}"
    if name in IN_WORDS:
        return IN_WORDS[name]
    option = {"n_heads": "heads"}.get(name, name).replace("_", "-")
    label = f"{part}: {name}" if part == "data" or name in NO_OPTION else f"--{option}"
    return f"{label}: given {shown(_short(given))}, the run has {shown(_short(had))}"


def _steps(job: dict[str, Any]) -> int:
    return job["train"].get("steps") or 0


def _tokens(job: dict[str, Any]) -> int:
    return _steps(job) * (job["train"].get("batch_windows") or 0) * (job.get("n_ctx") or 0)


def _short(value: object) -> object:
    return value if not isinstance(value, str) or len(value) < 80 else value[:77] + "..."


@contextmanager
def locked(run: Path, job: dict[str, Any]) -> Iterator[FileIO]:
    """The metrics of a run, opened to write at their end, while this process alone trains it. Writes run.json.

    The lock ends with the process, however that ends. Raises UserError where another process has it.
    """
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    with writing(run / METRICS):
        metrics = open(run / METRICS, "ab", buffering=0)  # noqa: SIM115
    with metrics:
        lock(metrics, run, "training this run")
        check_job(run, job)
        if not (run / RUN).is_file():
            write_json(run / RUN, job)
        yield metrics


def write_options(run: Path, options: dict[str, Any]) -> None:
    """Write the options of `csae train` that give this run, as YAML."""
    import yaml  # the command line's: the library does without

    text = yaml.safe_dump(as_json(options), sort_keys=False, allow_unicode=True)
    write_file(run / OPTIONS, lambda path: path.write_text(text, encoding="utf-8"))


def append_line(metrics: FileIO, line: dict[str, Any]) -> None:
    """Write a line of metrics; whole, unless the disk is full."""
    rest = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
    with writing(str(metrics.name)):
        while rest:
            rest = rest[metrics.write(rest) :]


def sync(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    with writing(str(file.name)):
        file.flush()
        if Path(file.name).is_file():  # /dev/null can't be synced
            os.fsync(file.fileno())


def check_metrics(run: Path, steps: Sequence[int], by: str) -> int:
    """The length in bytes of the metrics of these steps. `by`: the file that says that they were done.

    Raises UserError where the metrics don't begin with a line for each of them, in order.
    """
    file = run / METRICS
    length = 0
    advice = f"put {METRICS} back as it was, or train again in another folder"
    with reading(file), open(file, "rb") as lines:
        for number, step in enumerate(steps, 1):
            line = lines.readline(LONGEST)  # a file of something else may be one endless line
            where = f"{file}, line {number}"
            if not line.endswith(b"\n"):
                raise UserError(f"{where}: there is no whole line of step {step}, which {by} says was done: {advice}")
            found = parse_json(line, where, advice).get("step")
            if not _is_a(found, (int,)) or found != step:
                raise UserError(f"{where}: it is of step {shown(repr(found))[:40]}; needed step {step}: {advice}")
            length += len(line)
    return length


def drop_later_metrics(run: Path, metrics: FileIO, steps: Sequence[int], by: str) -> None:
    """Keep the lines of these steps, which have to be there; later steps will be done again."""
    length = check_metrics(run, steps, by) if steps else 0
    with writing(run / METRICS):
        metrics.truncate(length)


def is_unfinished(entry: Path, files: Iterable[str]) -> bool:
    """Whether an entry is left from a kill while one of these files was written (`csae.files`, `csae.tensors`)."""
    names = [re.escape(file) for file in files]
    names += [SHARD] * (INDEX in files) + [re.escape(NEXT)] * (SAE_FILES[0] in files)
    name = "|".join(names)
    if entry.name == NEXT and SAE_FILES[0] in files:
        return entry.is_file() and not entry.is_symlink()
    if entry.is_symlink() or not re.fullmatch(rf"\.({name})\.\d+\.tmp({re.escape(WORKING)})?", entry.name):
        return False
    return entry.is_dir() if entry.name.endswith(WORKING) else entry.is_file()


def remove_unfinished(folder: Path, files: Iterable[str]) -> None:
    """Remove what a kill left while these files were written. Never raises: what stays does no harm."""
    with suppress(OSError):
        for entry in [entry for entry in folder.iterdir() if is_unfinished(entry, files)]:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, if the system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _of_a_run_that_began(entry: Path) -> bool:
    """Whether an entry is left from a run that was killed before it wrote run.json."""
    if entry.name == METRICS:
        return entry.is_file() and entry.stat().st_size == 0
    return is_unfinished(entry, FILES)


def _check_types(found: dict[str, Any], kinds: dict[str, tuple[type, ...]], file: Path) -> None:
    for name, types in kinds.items():
        if found.get(name) is not None and not _is_a(found[name], types):
            needed = " or ".join(
                "an object" if kind is dict else kind.__name__ for kind in types if kind is not type(None)
            )
            raise UserError(
                f"{file}: {name} is {shown(repr(found[name]))[:60]}; needed {needed}: copy the folder again"
            )


def _is_a(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types)
