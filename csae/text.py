"""Text into windows of tokens: documents are shuffled, packed end to end, and cut."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from csae import versions
from csae.errors import UserError
from csae.progress import Progress, quiet

TEXT_SUFFIXES = {".txt", ".md", ".rst"}
NOT_PROSE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
DOCUMENTS_AT_ONCE = 64


class TokenWindows(NamedTuple):
    """Windows of tokens."""

    tokens: Tensor  # [N, T] int32
    documents: Tensor  # [N, T] int32: which document each token is of; a document is a run of equal ids


def read_documents(path: str | Path) -> list[str]:
    """The texts of a file, or of all *.txt, *.md and *.rst files in a folder and the folders in it, by path.

    One file is one document; files with nothing but white space are left out. Raises UserError where
    the path is missing, a file is no UTF-8 text, or nothing is left.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"text {str(path)!r}: the folder holds no *.txt, *.md or *.rst file")
    elif path.exists():
        files = [path]
    else:
        raise UserError(f"text {str(path)!r}: no such file or folder")
    documents = [text for text in map(_read_text, files) if text.strip()]
    if not documents:
        raise UserError(f"text {str(path)!r} is empty; give a file or folder with text in it")
    return documents


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"text {str(file)!r} is not UTF-8 (byte {error.start}); convert it or leave it out") from error
    except OSError as error:
        raise UserError(f"text {str(file)!r} can't be read: {error.strerror}") from error


def python_prose() -> list[str]:
    """English prose that comes with CPython, in a fixed order: about 1.8 MB in some 480 documents (CPython 3.11).

    The topics of pydoc's help, one document each, and the docstrings of the standard library of more than 200
    characters, those of one module as one document in the order of the source.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if NOT_PROSE.isdisjoint(file.relative_to(library).parts):
            docstrings = list(_docstrings(file))
            if docstrings:
                documents.append("\n\n".join(docstrings) + "\n")
    return documents


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of more than 200 characters in a Python file, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some modules of the library hold invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) > 200:
            yield docstring


def tokenize(
    documents: Sequence[str],
    tokenizer: Any,
    n_ctx: int,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> TokenWindows:
    """Documents, shuffled with the seed and packed, as windows of n_ctx tokens.

    tokenizer: one of transformers. No special tokens are added. At most max_tokens tokens are used, where given;
    what is left over after the last whole window is dropped. Document ids number the shuffled documents.
    Raises UserError where the text does not fill one window.
    """
    order = np.random.default_rng(seed).permutation(len(documents))

    def token_lists() -> Iterator[list[int]]:
        starts = range(0, len(order), DOCUMENTS_AT_ONCE)
        for start in progress(starts, "tokenizing"):
            texts = [documents[i] for i in order[start : start + DOCUMENTS_AT_ONCE]]
            # verbose=False: a document longer than the model's context is no reason to warn, it is cut in windows.
            yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return pack(token_lists(), n_ctx, max_tokens)


def pack(token_lists: Iterable[Sequence[int]], n_ctx: int, max_tokens: int | None = None) -> TokenWindows:
    """Documents given as token ids, laid end to end and cut in windows of n_ctx tokens, at most max_tokens in all."""
    if n_ctx < 2:
        raise UserError(f"n_ctx: given {n_ctx}; needed 2 or more")
    if max_tokens is not None and max_tokens < n_ctx:
        raise UserError(f"max_tokens: given {max_tokens}; needed at least one window of {n_ctx}")
    pieces: list[np.ndarray] = []
    n_tokens = 0
    for token_list in token_lists:
        pieces.append(np.asarray(token_list, dtype=np.int32))
        n_tokens += len(token_list)
        if max_tokens is not None and n_tokens >= max_tokens:
            n_tokens = max_tokens
            break
    n_windows = n_tokens // n_ctx
    if n_windows == 0:
        raise UserError(
            f"the text is {n_tokens} tokens long; one window takes {n_ctx}: give more text or a lower n_ctx"
        )
    tokens = np.concatenate(pieces)
    documents = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
    used = n_windows * n_ctx
    return TokenWindows(
        torch.from_numpy(tokens[:used].reshape(n_windows, n_ctx)),
        torch.from_numpy(documents[:used].reshape(n_windows, n_ctx)),
    )


def load_token_dataset(
    path: str | Path, n_ctx: int, max_tokens: int | None = None, split: str = "train", seed: int = 0
) -> TokenWindows:
    """Windows of n_ctx tokens from a tokenized Hugging Face dataset with a column `input_ids`, a row a document.

    path: a folder that `datasets` saved, or the name of a dataset on the hub. Rows are shuffled with the seed and
    packed. Raises UserError where the package `datasets`, the dataset, the split or the column is missing.
    """
    try:
        import datasets
    except ImportError as error:
        how = versions.pip_install("datasets")
        raise UserError(f"a tokenized dataset needs the package datasets: {how}") from error
    versions.check("datasets")
    name = f"dataset {str(path)!r}"
    try:
        if Path(path).is_dir():
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), split=split)
    # datasets raises nearly anything on a bad name or folder, often over many lines.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} can't be loaded ({reason}); give a folder of save_to_disk or a hub name") from error
    if isinstance(data, dict):
        if split not in data:
            raise UserError(f"{name} has no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    if "input_ids" not in data.column_names:
        raise UserError(f"{name} has no column input_ids, only {', '.join(data.column_names)}; tokenize it first")
    rows = data.select_columns(["input_ids"]).shuffle(seed=seed)
    return pack((row["input_ids"] for row in rows), n_ctx, max_tokens)
