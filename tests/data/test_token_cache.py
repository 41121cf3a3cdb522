from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import TOKENIZER, texts_of
from tiny_model import make_tokenizer

from csae.data import token_cache
from csae.data.text import tokenize

TEXTS = texts_of(30)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(token_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counting:
    """The tokenizer, in calls to which it counts its texts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts = 0
        call = type(TOKENIZER).__call__

        def count(tokenizer: Any, texts: Any, **how: Any) -> Any:
            self.texts += len(texts)
            return call(tokenizer, texts, **how)

        monkeypatch.setattr(type(TOKENIZER), "__call__", count)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_the_same_text_is_tokenized_once(folder: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tokenize(TEXTS, TOKENIZER, 16)
    assert counting.texts == len(TEXTS)
    assert len(files(folder)) == 1
    other = tokenize(TEXTS, TOKENIZER, 16)
    windows = tokenize(TEXTS, make_tokenizer(), 8, begin=(0,))  # neither is of the ids
    assert counting.texts == len(TEXTS)
    monkeypatch.setenv(token_cache.VARIABLE, "")
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.documents, other.documents)
    uncached = tokenize(TEXTS, TOKENIZER, 16)
    assert torch.equal(one.tokens, uncached.tokens)
    assert torch.equal(windows.tokens, tokenize(TEXTS, TOKENIZER, 8, begin=(0,)).tokens)
    assert len(files(folder)) == 1


def test_no_more_is_made_than_is_asked_for(folder: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csae.data.text.DOCUMENTS_AT_ONCE", 2)
    few = tokenize(TEXTS, TOKENIZER, 16, max_tokens=64)
    assert counting.texts < 10
    assert torch.equal(few.tokens, tokenize(TEXTS, TOKENIZER, 16, max_tokens=64).tokens)
    assert counting.texts < 10
    assert torch.equal(few.tokens, tokenize(TEXTS, TOKENIZER, 16).tokens[:4])


def another_rule(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["the"])
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        lambda: (TEXTS[:-1], TOKENIZER, None, 0),
        lambda: ([*TEXTS[:-1], TEXTS[-1] + "x"], TOKENIZER, None, 0),
        lambda: ([*TEXTS[:-2], TEXTS[-2] + TEXTS[-1], ""], TOKENIZER, None, 0),
        lambda: (TEXTS, another_rule(make_tokenizer()), None, 0),
        lambda: (TEXTS, TOKENIZER, 1000, 0),
        lambda: (TEXTS, TOKENIZER, None, 1),
    ],
)
def test_what_other_ids_would_follow_from_is_another_file(
    folder: Path, change: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(TEXTS, TOKENIZER, 16)
    texts, tokenizer, max_tokens, seed = change()
    found = tokenize(texts, tokenizer, 16, max_tokens, seed)
    assert len(files(folder)) == 2
    monkeypatch.setenv(token_cache.VARIABLE, "")
    assert torch.equal(found.tokens, tokenize(texts, tokenizer, 16, max_tokens, seed).tokens)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b[:-7] + bytes(7), lambda b: b"", lambda b: b"\0" * len(b)]
)
def test_damaged_files_are_made_again(folder: Path, counting: Counting, damage: Callable[[bytes], bytes]) -> None:
    one = tokenize(TEXTS, TOKENIZER, 16)
    (file,) = files(folder)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert torch.equal(tokenize(TEXTS, TOKENIZER, 16).tokens, one.tokens)
    assert counting.texts == 2 * len(TEXTS)
    tokenize(TEXTS, TOKENIZER, 16)
    assert counting.texts == 2 * len(TEXTS)


def test_a_cache_that_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(token_cache.VARIABLE, str(tmp_path / "file"))
    assert len(tokenize(TEXTS, TOKENIZER, 16).tokens)
    said = capsys.readouterr().err
    assert said.startswith("token ids are not kept: ")
    assert said.count("\n") == 1


def test_what_was_not_read_for_longest_makes_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        tokenize(TEXTS, TOKENIZER, 16, seed=seed)
    one, two, three = sorted(files(folder), key=lambda file: file.stat().st_mtime_ns)
    for age, file in enumerate((two, three, one)):  # one was read last
        os.utime(file, (1000 + age, 1000 + age))
    monkeypatch.setattr(token_cache, "MOST_BYTES", 3 * one.stat().st_size)
    (folder / "other").write_text("not ours" * 10_000)
    tokenize(TEXTS, TOKENIZER, 16, seed=3)
    left = files(folder)
    assert two not in left
    assert {one, three, folder / "other"} < set(left)
    assert len(left) == 4


class Odd(type(TOKENIZER)):  # type: ignore[misc]
    """A class of a user's own, which does more than its rules say."""

    def __call__(self, texts: Any, **how: Any) -> Any:
        return super().__call__([text.upper() for text in texts], **how)


def test_what_cannot_be_told_is_not_kept(folder: Path) -> None:
    odd = Odd(tokenizer_object=TOKENIZER.backend_tokenizer)
    assert not torch.equal(tokenize(TEXTS, odd, 16).tokens[:5], tokenize(TEXTS, TOKENIZER, 16).tokens[:5])
    assert len(files(folder)) == 1


def _tokenize(folder: str) -> Any:
    os.environ[token_cache.VARIABLE] = folder
    return tokenize(TEXTS, TOKENIZER, 16).tokens.tolist()


@pytest.mark.slow
def test_several_processes_at_once(folder: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found: Iterator[Any] = pool.map(_tokenize, [str(folder)] * 4)
        one, *others = found
    assert all(other == one for other in others)
    assert len(files(folder)) == 1


def test_what_several_begin_at_once_is_made_once(folder: Path) -> None:
    made, begun = [], threading.Event()

    def make() -> list[list[int]]:
        made.append(threading.get_ident())
        begun.set()
        time.sleep(0.3)  # so that the other one comes meanwhile
        return [[1, 2], [3]]

    def ids() -> list[list[int]]:
        return [list(of) for of in token_cache.cached(["a", "b"], TOKENIZER, None, make)]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ids)
        begun.wait()
        assert pool.submit(ids).result() == first.result() == [[1, 2], [3]]
    assert len(made) == 1
    assert len(list(folder.iterdir())) == 1


def test_where_it_is_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(token_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenize(TEXTS, TOKENIZER, 16)
    assert len(files(tmp_path / "csae" / "tokens")) == 1
