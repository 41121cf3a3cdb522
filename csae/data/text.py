"""Text into windows of tokens: documents are shuffled, packed end to end, and cut."""

from __future__ import annotations

import ast
import json
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csae import versions
from csae.data.packing import TokenWindows, pack, pack_rows
from csae.data.token_cache import cached
from csae.data.token_rows import IDS, MASKS, tokens_of_row
from csae.errors import UserError
from csae.progress import Progress, quiet

TEXT_SUFFIXES = {".txt", ".md", ".rst"}
NOT_PROSE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NO_PROSE = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather"}
DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")  # of save_to_disk
DOCUMENTS_AT_ONCE = 64
ROWS_AT_ONCE = 256
PROBES = ("a", "The end.")
AS_DATASET = "give it as --dataset, as JSON Lines (.jsonl) or Parquet"
SAVE_IT = "tokenize it with the package datasets, save_to_disk(FOLDER), and give --dataset FOLDER"


def read_documents(path: str | Path) -> list[str]:
    """The texts of a file, or of all *.txt, *.md and *.rst files in a folder and the folders in it, by path.

    One file is one document; files with nothing but white space are left out. Raises UserError where
    the path is missing, a file is no UTF-8 text or holds data and no prose, or nothing is left.
    """
    files = check_text(path)
    documents = [text for text in map(_read_text, files) if text.strip()]
    if not documents:
        raise UserError(f"text {str(path)!r} is empty; give a file or folder with text in it")
    return documents


def check_text(path: str | Path) -> list[Path]:
    """The files that `read_documents` reads, unread. Raises UserError where there are none."""
    path = Path(path)
    if path.is_dir():
        if any((path / name).is_file() for name in DATASET_FILES):
            raise UserError(f"text {str(path)!r} is a saved dataset; give it as --dataset")
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"text {str(path)!r}: the folder holds no *.txt, *.md or *.rst file")
    elif path.exists():
        files = [path]
    else:
        raise UserError(f"text {str(path)!r}: no such file or folder")
    return files


def _read_text(file: Path) -> str:
    if file.suffix.lower() in NO_PROSE:
        raise UserError(f"text {str(file)!r} is {file.suffix}, data and no prose: {AS_DATASET}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"text {str(file)!r} is not UTF-8 (byte {error.start}); convert it or leave it out") from error
    except OSError as error:
        raise UserError(f"text {str(file)!r} can't be read: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"text {str(file)!r} holds zero bytes, as UTF-16 does; convert it to UTF-8, or leave it out")
    if _is_json_lines(text):
        raise UserError(f"text {str(file)!r} holds lines of JSON, data and no prose: {AS_DATASET}")
    return text


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a JSON object."""
    line = text.lstrip().partition("\n")[0]
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


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
    nodes = [node for node in _statements(tree) if isinstance(node, owners)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) > 200:
            yield docstring


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """A tree and the statements in it, as `ast.walk`, which also goes into expressions: they are most of it."""
    nodes = deque([tree])
    while nodes:
        node = nodes.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            inside = getattr(node, name, None)
            if isinstance(inside, list):
                nodes.extend(inside)


def beginning(tokenizer: Any, bos: bool | None = None, n_vocab: int | None = None) -> tuple[int, ...]:
    """The token ids that a window is to begin with: a beginning of sequence, or none.

    bos: None for the tokenizer's own convention, which is what it puts before a text that is tokenized with special
    tokens. False for none. True for that of the convention, or the tokenizer's bos_token where it puts none. n_vocab:
    how many tokens the model knows. Raises UserError where there is no such token, or the model does not know it.
    """
    if bos is False:
        return ()
    found = {_put_before(tokenizer, text) for text in PROBES} - {None}
    begin = found.pop() if len(found) == 1 else ()
    if not begin and bos:
        token = getattr(tokenizer, "bos_token_id", None)
        if not isinstance(token, int):
            raise UserError("--bos: the model's tokenizer has no beginning-of-sequence token: give --no-bos")
        begin = (token,)
    if begin and n_vocab is not None and max(begin) >= n_vocab:
        raise UserError(
            f"--bos: the tokenizer's beginning of sequence is token {max(begin)}, and the model knows 0 to "
            f"{n_vocab - 1}: give --no-bos, or a model that was trained with it"
        )
    return begin or ()


def _put_before(tokenizer: Any, text: str) -> tuple[int, ...] | None:
    """The ids that a tokenizer puts before a text when it adds special tokens; None where it has none for the text."""
    plain, whole = (
        list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) for special in (False, True)
    )
    if not plain:
        return None
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return tuple(whole[:at])
    return ()


def tokenize(
    documents: Sequence[str],
    tokenizer: Any,
    n_ctx: int,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
    begin: Sequence[int] = (),
) -> TokenWindows:
    """Documents, shuffled with the seed and packed, as windows of n_ctx tokens.

    tokenizer: one of transformers. It adds no special tokens; `begin` is what each window begins with (`beginning`).
    At most max_tokens tokens of the text are used, where given; what is left over after the last whole window is
    dropped. Document ids number the shuffled documents. Token ids are kept, and found there the next time
    (`csae.data.token_cache`). Raises UserError where the text does not fill one window.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]

    def token_lists() -> Iterator[list[int]]:
        starts = range(0, len(shuffled), DOCUMENTS_AT_ONCE)
        for start in progress(starts, "tokenizing"):
            texts = shuffled[start : start + DOCUMENTS_AT_ONCE]
            # verbose=False: a document longer than the model's context is no reason to warn, it is cut in windows.
            yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return pack(cached(shuffled, tokenizer, max_tokens, token_lists), n_ctx, max_tokens, begin)


def load_token_dataset(
    path: str | Path,
    n_ctx: int,
    max_tokens: int | None = None,
    split: str = "train",
    seed: int = 0,
    begin: Sequence[int] = (),
    n_vocab: int | None = None,
) -> TokenWindows:
    """Windows of n_ctx tokens from a tokenized Hugging Face dataset with a column `input_ids`, a row a document.

    What a column `attention_mask` leaves out is padding, and dropped. What a column `special_tokens_mask` marks stays
    among the tokens, since the model sees it, and takes no part (`TokenWindows.special`). Rows are shuffled with the
    seed and packed, each window with the tokens `begin` before it where it does not begin with them (`pack`).

    path: a folder that `datasets` saved, or the name of a dataset on the hub. n_vocab: how many tokens there are.
    Raises UserError where the package `datasets`, the dataset, the split or the column is missing, and where a row is
    no flat list of token ids or its masks don't fit it.
    """
    try:
        import datasets
    except ImportError as error:
        how = versions.pip_install("datasets")
        raise UserError(f"a tokenized dataset needs the package datasets: {how}") from error
    versions.check("datasets")
    name = f"dataset {str(path)!r}"
    if Path(path).is_file():
        raise UserError(f"{name} is a file; needed a folder: {SAVE_IT}")
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
    return pack_rows(_rows(data, name, seed, n_vocab), n_ctx, max_tokens, begin)


def _rows(data: Any, name: str, seed: int, n_vocab: int | None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The rows of a dataset, shuffled: token ids int32 without padding, and which of them are special, bool."""
    columns = [column for column in (IDS, *MASKS) if column in data.column_names]
    data = data.with_format(None).select_columns(columns)
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    for start in range(0, len(order), ROWS_AT_ONCE):
        numbers = order[start : start + ROWS_AT_ONCE]
        found = data[numbers]
        for place, number in enumerate(numbers):
            row = {column: found[column][place] for column in columns}
            yield tokens_of_row(row, f"{name}, row {number}", n_vocab)
