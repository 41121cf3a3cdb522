from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csae import text
from csae.errors import UserError
from csae.text import load_token_dataset, pack, python_prose, read_documents, tokenize

# --- reading -----------------------------------------------------------------------------------------


def test_read_a_file(tmp_path: Path) -> None:
    file = tmp_path / "one.log"
    file.write_bytes("\ufeffdéjà vu\n".encode())
    assert read_documents(file) == ["déjà vu\n"]


def test_read_a_folder_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.rst", "d.py", "e.txt.gz"):
        (tmp_path / name).write_text(name)
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "folder.txt").mkdir()
    assert read_documents(tmp_path) == ["a.md", "b.txt", "sub/c.rst"]


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, "missing.txt", "no such file or folder"),
        ({"empty.txt": b""}, "empty.txt", "is empty; give a file or folder with text"),
        ({"a.txt": b"", "b.md": b"\n\n"}, ".", "is empty; give a file or folder with text"),
        ({"code.py": b"x"}, ".", r"holds no \*\.txt, \*\.md or \*\.rst file"),
        ({"good.txt": b"good", "bad.txt": b"ok\xff\xfe"}, ".", r"bad\.txt' is not UTF-8 \(byte 2\); convert it"),
    ],
)
def test_bad_text(tmp_path: Path, files: dict[str, bytes], given: str, message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_documents(tmp_path / given)
    assert "\n" not in str(error.value)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own, as reading the real one takes seconds."""
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def test_python_prose_takes_long_docstrings_in_the_order_of_the_source(small_library: Path) -> None:
    long = "word " * 50
    (small_library / "test").mkdir()
    (small_library / "test" / "t.py").write_text(f'"""test {long}"""')
    (small_library / "broken.py").write_text(f'"""broken {long}""" +')
    (small_library / "b.py").write_text("x = 1")
    (small_library / "a.py").write_text(
        f'"""module {long}"""\n'
        f'class A:\n    """A {long}"""\n    def f(self):\n        """f {long}"""\n'
        f'def g():\n    """short"""\n'
        f'async def h():\n    r"""h \\d {long}"""\n'
        f'x = """no docstring {long}"""\n'
    )
    *topics, last = python_prose()
    assert [part.split()[0] for part in last.split("\n\n")] == ["module", "A", "f", "h"]
    assert any("lambda" in topic for topic in topics)
    assert python_prose() == [*topics, last]


@pytest.mark.slow
def test_python_prose_is_enough_to_train_on() -> None:
    documents = python_prose()
    assert documents == python_prose()
    assert 300 < len(documents) < 1000
    assert 1_200_000 < sum(map(len, documents)) < 3_000_000
    assert all(document.strip() for document in documents)


# --- packing -----------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    n_ctx=st.integers(2, 20),
    max_windows=st.none() | st.integers(1, 5),
    extra=st.integers(0, 1),
)
def test_pack_lays_documents_end_to_end(lengths: list[int], n_ctx: int, max_windows: int | None, extra: int) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    lists = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    max_tokens = None if max_windows is None else max_windows * n_ctx + extra
    n_windows = sum(lengths) // n_ctx
    if max_windows is not None:
        n_windows = min(n_windows, max_windows)
    if n_windows == 0:
        with pytest.raises(UserError, match=f"the text is {sum(lengths)} tokens long; one window takes {n_ctx}"):
            pack(lists, n_ctx, max_tokens)
        return
    windows = pack(lists, n_ctx, max_tokens)
    assert windows.tokens.dtype == windows.documents.dtype == torch.int32
    assert windows.tokens.shape == windows.documents.shape == (n_windows, n_ctx)
    # The tokens are numbered through, so each is where it was, and tells its document.
    assert windows.tokens.flatten().tolist() == list(range(n_windows * n_ctx))
    of_token = list(chain.from_iterable([i] * length for i, length in enumerate(lengths)))
    assert windows.documents.flatten().tolist() == of_token[: n_windows * n_ctx]


def test_pack_reads_no_further_than_it_needs() -> None:
    def lists():
        yield [1] * 6
        yield [2] * 6
        raise AssertionError("read too far")

    assert pack(lists(), 4, max_tokens=8).tokens.tolist() == [[1, 1, 1, 1], [1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("n_ctx", "max_tokens", "message"),
    [
        (1, None, "n_ctx: given 1; needed 2 or more"),
        (8, 7, "max_tokens: given 7; needed at least one window of 8"),
        (8, None, "the text is 5 tokens long; one window takes 8: give more text or a lower n_ctx"),
    ],
)
def test_pack_with_too_little(n_ctx: int, max_tokens: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack([[1, 2, 3], [4, 5]], n_ctx, max_tokens)


# --- tokenizing --------------------------------------------------------------------------------------

DOCUMENTS = [f"This is document {i}, which says {'so ' * i}and ends.\n" for i in range(150)]


def test_tokenize_shuffles_documents_and_keeps_them_whole(tiny_lm) -> None:
    tokenizer = tiny_lm.tokenizer
    windows = tokenize(DOCUMENTS, tokenizer, 16, seed=3)
    tokens, ids = windows.tokens.flatten(), windows.documents.flatten()
    assert ids.unique_consecutive().tolist() == sorted(ids.unique().tolist())
    decoded = [tokenizer.decode(tokens[ids == i]) for i in ids.unique().tolist()]
    assert set(decoded[:-1]) < set(DOCUMENTS)
    assert len(decoded) >= 149  # less than a window is dropped
    assert decoded != DOCUMENTS[: len(decoded)]


def test_tokenize_depends_on_the_seed_alone(tiny_lm) -> None:
    first, again, other = (tokenize(DOCUMENTS, tiny_lm.tokenizer, 16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.documents, again.documents)
    assert not torch.equal(first.tokens[:8], other.tokens[:8])


def test_tokenize_some_of_it(tiny_lm) -> None:
    whole = tokenize(DOCUMENTS, tiny_lm.tokenizer, 16)
    some = tokenize(DOCUMENTS, tiny_lm.tokenizer, 16, max_tokens=100)
    assert torch.equal(some.tokens, whole.tokens[:6])


def test_tokenize_shows_progress_and_is_silent(tiny_lm, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []

    def progress(iterable, description, total=None):
        seen.append((list(iterable), description))
        return iterable

    tiny_lm.tokenizer.model_max_length, before = 64, tiny_lm.tokenizer.model_max_length
    tokenize(DOCUMENTS, tiny_lm.tokenizer, 16, progress=progress)
    tiny_lm.tokenizer.model_max_length = before
    assert seen == [([0, 64, 128], "tokenizing")]
    assert capfd.readouterr() == ("", "")


def test_too_little_text(tiny_lm) -> None:
    with pytest.raises(UserError, match="give more text or a lower n_ctx"):
        tokenize(["Short."], tiny_lm.tokenizer, 64)


# --- tokenized datasets ------------------------------------------------------------------------------


def test_the_package_datasets_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'contextual-sae\[datasets\]'"):
        load_token_dataset("anything", 8)


@pytest.fixture
def rows() -> list[list[int]]:
    return [[i] * 5 for i in range(20)]


def test_token_dataset_on_disk(tmp_path: Path, rows: list[list[int]]) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": rows, "text": ["x"] * 20})
    data.save_to_disk(str(tmp_path / "one"))
    windows = load_token_dataset(tmp_path / "one", 10)
    assert windows.tokens.shape == (10, 10)
    assert sorted(windows.tokens.flatten().tolist()) == sorted(chain.from_iterable(rows))
    assert windows.tokens[:, 0].tolist() != list(range(0, 20, 2))  # rows are shuffled
    # A row is a document: ids change where tokens do.
    assert torch.equal(windows.tokens.diff() != 0, windows.documents.diff() != 0)
    assert load_token_dataset(tmp_path / "one", 10, max_tokens=29).tokens.shape == (2, 10)

    datasets.DatasetDict({"train": data, "test": data.select(range(4))}).save_to_disk(str(tmp_path / "splits"))
    assert load_token_dataset(tmp_path / "splits", 10).tokens.shape == (10, 10)
    assert load_token_dataset(tmp_path / "splits", 10, split="test").tokens.shape == (2, 10)
    with pytest.raises(UserError, match="has no split 'validation'; it has train, test"):
        load_token_dataset(tmp_path / "splits", 10, split="validation")


def test_bad_token_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UserError, match="has no column input_ids, only text; tokenize it first"):
        load_token_dataset(tmp_path / "text", 10)
    with pytest.raises(UserError, match="can't be loaded") as error:
        load_token_dataset(tmp_path, 10)
    assert "\n" not in str(error.value)
