"""Token ids that were made before: a file for each text and tokenizer, in the user's cache folder.

The file's name is a hash of all that the ids follow from: the texts, the tokenizer and the versions of the libraries.
Of several processes that need the same file one makes it, and the others wait.
Its content has a checksum; a damaged file is made again. CSAE_TOKEN_CACHE names another folder, or none where it is
empty.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csae.errors import UserError
from csae.files import wait_for_lock, write_file
from csae.progress import say
from csae.tensors import load_tensors, save_tensors

VARIABLE = "CSAE_TOKEN_CACHE"
FORMAT = 1  # of the files and of their keys
MOST_BYTES = 4 * 2**30  # of all files; those that were not read for longest go first
SUFFIX = ".tokens.safetensors"


def cached(
    documents: Sequence[str], tokenizer: Any, max_tokens: int | None, make: Callable[[], Iterable[Sequence[int]]]
) -> Iterable[Sequence[int]]:
    """The token ids of the documents, in their order, up to max_tokens of them: from the cache, or made and kept.

    make: gives them, a list a document. Where nothing can be kept, a line on stderr says why.
    """
    folder, about = _folder(), tokenizer_rules(tokenizer)
    if folder is None or about is None:
        return make()
    file = folder / f"{_key(documents, about, max_tokens)}{SUFFIX}"
    found = _read(file)
    if found is None:
        with _alone(file):
            found = _read(file)  # another process may have made it meanwhile
            if found is None:
                found = _made(make(), max_tokens)
                _keep(file, *found)
    tokens, lengths = found
    ends = np.cumsum(lengths).tolist()
    return (tokens[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True))  # type: ignore[misc]


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """While another process makes the same file, wait: ranks under torchrun begin with the same text."""
    with ExitStack() as stack:
        lock = file.with_name(f".{file.name}.lock")
        with suppress(OSError):  # then each makes it
            lock.parent.mkdir(parents=True, exist_ok=True)
            opened = stack.enter_context(open(lock, "ab"))
            wait_for_lock(opened)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def _folder() -> Path | None:
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csae" / "tokens"


def tokenizer_rules(tokenizer: Any) -> dict[str, Any] | None:
    """All that token ids follow from, of the tokenizer; None of one whose rules can't be read."""
    kind = type(tokenizer)
    if kind.__module__.partition(".")[0] != "transformers":
        return None  # its own code may do more than its rules say
    try:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
    except (AttributeError, TypeError, ValueError):
        return None
    for name in ("truncation", "padding"):  # of the last call, and set anew in each
        rules.pop(name, None)
    return {
        "format": FORMAT,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "rules": rules,
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        **{library: metadata.version(library) for library in ("tokenizers", "transformers")},
    }


def _key(documents: Sequence[str], about: dict[str, Any], max_tokens: int | None) -> str:
    digest = hashlib.sha256(json.dumps([about, max_tokens], sort_keys=True).encode())
    for document in documents:
        content = document.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _made(lists: Iterable[Sequence[int]], max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] int32 and the length of each document, up to the one that reaches max_tokens."""
    parts: list[np.ndarray] = []
    n = 0
    for ids in lists:
        parts.append(np.asarray(ids, dtype=np.int32))
        n += len(ids)
        if max_tokens is not None and n >= max_tokens:
            break
    tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    return tokens, np.array([len(part) for part in parts], dtype=np.int64)


def _read(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What a file holds; None where there is none, or none that is whole."""
    if not file.is_file():
        return None
    try:
        found = load_tensors(file)
        tokens, lengths = found["tokens"].numpy(), found["lengths"].numpy()
        if int(lengths.sum()) != len(tokens):
            raise UserError(f"{file}: its lengths don't add up")
    except (UserError, KeyError):
        with suppress(OSError):
            file.unlink()
        return None
    with suppress(OSError):
        os.utime(file)  # it was read now
    return tokens, lengths


def _keep(file: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    tensors = {"tokens": torch.from_numpy(tokens), "lengths": torch.from_numpy(lengths)}
    try:
        write_file(file, lambda path: save_tensors(tensors, path))
    except UserError as error:
        say(f"token ids are not kept: {error}; {VARIABLE} names another folder, or none: ''")
        return
    _make_room(file)


def _make_room(kept: Path) -> None:
    """Remove the files that were not read for longest, until the rest is no larger than MOST_BYTES. Never raises."""
    with suppress(OSError):
        stats = {file: file.stat() for file in kept.parent.glob(f"*{SUFFIX}")}
        size = sum(stat.st_size for stat in stats.values())
        for file in sorted(stats, key=lambda file: stats[file].st_mtime):
            if size <= MOST_BYTES or file == kept:
                break
            size -= stats[file].st_size
            with suppress(OSError):
                file.unlink()
