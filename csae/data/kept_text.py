"""The windows of a streamed data set, kept in files while their activations are cached: any length, in bounded memory.

    FOLDER/.text/tokens, documents, special    raw numbers [N, T]: int32, int32, bool; no `special` where none is
    FOLDER/.text/about.json                    what they are of, N and T

They are made once, in a few bytes a token, and mapped into memory: so their number is known before the first shard,
they can be shuffled, ranks share them, and a cache that was cut short goes on without reading the data set again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csae.data.packing import Packing, Text, TokenWindows
from csae.data.retrying import read_on
from csae.data.row_tokens import tell_left_out
from csae.data.shards import KEPT_TEXT, read_about
from csae.data.stream import TokenStream, add_rows, check_useful
from csae.data.token_cache import tokenizer_rules
from csae.errors import UserError
from csae.files import is_running, write_json, writing
from csae.progress import Progress, quiet
from csae.run import sync_folder

DTYPES = {"tokens": torch.int32, "documents": torch.int32, "special": torch.bool}
ABOUT = "about.json"


def keep_windows(folder: Path, stream: TokenStream, n: int | None, progress: Progress = quiet) -> None:
    """Keep the first n windows of a stream, in its order; all if n is None, and fewer where it has no more.

    Raises UserError where the data set can't be read, or does not fill a window.
    """
    wanted = _about(stream, n)
    kept = folder / KEPT_TEXT
    if wanted is None or not kept.is_dir() or read_about(kept / ABOUT).get("of") != wanted:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_kept(folder)
            _make(kept, stream, n, wanted, progress)


def map_kept(folder: Path, begin: tuple[int, ...]) -> TokenWindows:
    """The windows that are kept in a folder. Raises UserError where there are none."""
    kept = folder / KEPT_TEXT
    about = read_about(kept / ABOUT)
    if "shape" not in about:
        raise UserError(f"{folder}: rank 0 has put its text here, and it is not there: needed a folder all ranks share")
    N, T = about["shape"]
    mapped = {
        name: torch.from_file(str(kept / name), shared=False, size=N * T, dtype=dtype).view(N, T)
        for name, dtype in DTYPES.items()
        if (kept / name).is_file()
    }
    return TokenWindows(mapped["tokens"], mapped["documents"], mapped.get("special"), begin)


def remove_kept(folder: Path) -> None:
    """Remove the text that is kept in a folder, and what a kill left while it was made."""
    for name in os.listdir(folder):
        pid = name.removeprefix(f"{KEPT_TEXT}.").removesuffix(".tmp")
        if name == KEPT_TEXT or (pid.isdecimal() and name == f"{KEPT_TEXT}.{pid}.tmp" and not is_running(int(pid))):
            shutil.rmtree(folder / name)


def _about(stream: TokenStream, n: int | None) -> str | None:
    """A hash of all that the windows follow from; None where a tokenizer's rules can't be read."""
    to_tokens = stream.to_tokens
    rules = {} if to_tokens.tokenizer is None else tokenizer_rules(to_tokens.tokenizer)
    if rules is None:
        return None
    said: list[Any] = [stream.rows.name, stream.rows.describe(), to_tokens.columns, to_tokens.chat, rules]
    said += [stream.n_ctx, stream.begin, n]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _make(kept: Path, stream: TokenStream, n: int | None, of: str | None, progress: Progress) -> None:
    made = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    made.mkdir()
    try:
        done, any_special = 0, False
        with ExitStack() as stack:
            files = [stack.enter_context(open(made / name, "wb")) for name in DTYPES]
            for windows in progress(_windows(stream), "tokenizing", None):
                part = Text(*(of_all[: None if n is None else n - done] for of_all in windows))
                for file, array in zip(files, part, strict=True):
                    file.write(np.ascontiguousarray(array).tobytes())
                done += len(part.tokens)
                any_special |= bool(part.special.any())
                if done == n:
                    break
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if not done:
            raise UserError(
                f"{stream.rows.name}: its text is too short for a window of {stream.n_ctx}: give more text, or a lower "
                "--n-ctx"
            )
        if not any_special:
            (made / "special").unlink()
        write_json(made / ABOUT, {"of": of, "shape": [done, stream.n_ctx]})
        made.rename(kept)
        sync_folder(kept.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _windows(stream: TokenStream) -> Iterator[Text]:
    """The windows of a stream from its beginning, once and in its order, a few at a time."""
    packing = Packing(stream.n_ctx, stream.begin)
    bad = useless = 0
    for chunk in read_on(stream.rows, {}, stream.to_tokens.columns, stream.say):
        found = stream.to_tokens(chunk)
        for line in found.bad:
            bad += 1
            tell_left_out(line, bad, stream.say)
        useless = check_useful(found, useless)
        add_rows(packing, found)
        yield packing.cut()
    yield packing.cut(at_end=True)
