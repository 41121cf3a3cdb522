from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, byte_level, with_bos

from csae.data import text
from csae.data.activations import ModelActivations, ShardActivations, write_cache
from csae.data.language_model import LanguageModel
from csae.data.text import TokenWindows, beginning, load_token_dataset, pack, python_prose, read_documents, tokenize
from csae.errors import UserError

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
        (
            {"x.jsonl": b'{"text": "good"}\n'},
            "x.jsonl",
            r"x\.jsonl' is \.jsonl, data and no prose: give it as --dataset",
        ),
        ({"x.JSON": b"[]"}, "x.JSON", r"is \.JSON, data and no prose: give it as --dataset, as"),
        ({"x.csv": b"a,b\n"}, "x.csv", r"is \.csv, data and no prose: give it as --dataset, as JSON Lines"),
        ({"x.parquet": b"PAR1\x00"}, "x.parquet", r"is \.parquet, data and no prose"),
        ({"x.txt": b'\n{"text": "good"}\n{"text": "more"}\n'}, "x.txt", "holds lines of JSON, data and no prose"),
        ({"a.txt": b'{"text": "good"}', "b.txt": b"good"}, ".", r"a\.txt' holds lines of JSON"),
        ({"x.txt": "wide".encode("utf-16-le")}, "x.txt", "holds zero bytes, as UTF-16 does; convert it to UTF-8"),
        ({"state.json": b"{}", "data-00000-of-00001.arrow": b""}, ".", "is a saved dataset; give it as --dataset"),
    ],
)
def test_bad_text(tmp_path: Path, files: dict[str, bytes], given: str, message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_documents(tmp_path / given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prose", ["{braces} are prose", '{"half": ', "[1, 2]", '"quoted"', "{" * 100_000])
def test_prose_that_looks_like_data(tmp_path: Path, prose: str) -> None:
    (tmp_path / "x.txt").write_text(prose)
    assert read_documents(tmp_path / "x.txt") == [prose]


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


@pytest.mark.parametrize(
    "document",
    [[1.5, 2.5, 3.5], [-1, 2, 3], [2**31, 2, 3], [[1, 2], [3, 4]], [True, False], ["1", "2"], [None, 1], 7, {"a": 1}],
)
def test_pack_takes_token_ids_alone(document: Any) -> None:
    with pytest.raises(ValueError, match=r"token_lists: holds .*; needed flat lists of token ids, 0 to 2147483647"):
        pack([[1, 2, 3], document], 2)


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


def save_rows(folder: Path, **columns: Any) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return folder


def flat(windows: TokenWindows) -> list[int]:
    return windows.tokens.flatten().tolist()


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_rows_are_shuffled_as_datasets_does_it(tmp_path: Path, rows: int) -> None:
    """What runs of earlier versions were trained on stays what it was."""
    datasets = pytest.importorskip("datasets")
    folder = save_rows(tmp_path / "x", input_ids=[[i, 1000 + i] for i in range(rows)])
    theirs = datasets.load_from_disk(str(folder)).shuffle(seed=5)["input_ids"]
    assert flat(load_token_dataset(folder, 2, seed=5)) == list(chain.from_iterable(theirs))


@pytest.mark.parametrize("kind", [int, bool, float])
@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padding_of_a_dataset_is_dropped(tmp_path: Path, side: str, kind: type) -> None:
    left, right = {"right": (0, 5), "left": (5, 0), "both": (2, 3)}[side]
    ids = [[0] * left + [5, 6, 7] + [0] * right] * 8
    mask = [[kind(0)] * left + [kind(1)] * 3 + [kind(0)] * right] * 8
    windows = load_token_dataset(save_rows(tmp_path / "x", input_ids=ids, attention_mask=mask), 4)
    assert flat(windows) == [5, 6, 7] * 8
    assert windows.special is None
    assert windows.documents.flatten().tolist() == [row for row in range(8) for _ in range(3)]


def test_special_tokens_of_a_dataset_stay_and_take_no_part(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    ids = [[9, 5, 6, 8, 7, 9, 0, 0]] * 6
    special = [[1, 0, 0, 1, 0, 1, 1, 1]] * 6
    mask = [[1, 1, 1, 1, 1, 1, 0, 0]] * 6
    folder = save_rows(tmp_path / "x", input_ids=ids, special_tokens_mask=special, attention_mask=mask)
    windows = load_token_dataset(folder, 4)
    assert flat(windows) == [9, 5, 6, 8, 7, 9] * 6
    assert windows.special is not None
    assert torch.equal(windows.special, (windows.tokens == 9) | (windows.tokens == 8))
    source = ModelActivations(tiny_lm, 2, windows)
    mask_read = source.read(range(source.n_windows)).mask
    assert torch.equal(mask_read[:, 1:], ~windows.special[:, 1:])
    plain = ModelActivations(tiny_lm, 2, windows._replace(special=None))
    assert plain.describe()["windows_sha256"] != source.describe()["windows_sha256"]
    write_cache(source, tmp_path / "cache", torch.float32)
    assert torch.equal(ShardActivations(tmp_path / "cache").read(range(source.n_windows)).mask, mask_read)


@pytest.mark.parametrize("row", [[], [3] * 4], ids=["empty", "full"])
def test_empty_rows_add_nothing(tmp_path: Path, row: list[int]) -> None:
    folder = save_rows(
        tmp_path / "x", input_ids=[[], row, [4] * 8, []], attention_mask=[[], [1] * len(row), [1] * 8, []]
    )
    assert sorted(flat(load_token_dataset(folder, 4))) == [*row, *[4] * 8]
    with pytest.raises(UserError, match="the text is 0 tokens long"):
        load_token_dataset(save_rows(tmp_path / "none", input_ids=[[], []]), 4)


GOOD = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[GOOD, GOOD]]}, r"row 0: input_ids is \[\[5, 6, .*; needed a flat list of integers"),
        ({"input_ids": [[GOOD, [1]]]}, "row 0: input_ids is .*; needed a flat list of integers"),
        ({"input_ids": [GOOD, None]}, "row 1: input_ids is None; needed a flat list"),
        ({"input_ids": [[5, None, 7, 8]]}, r"row 0: input_ids is \[5, None, 7, 8\]; needed a flat list"),
        ({"input_ids": ["5 6 7 8"]}, "row 0: input_ids is '5 6 7 8'; needed a flat list"),
        ({"input_ids": [["5", "6"]]}, r"row 0: input_ids is \['5', '6'\]; needed a flat list"),
        ({"input_ids": [[5.0, 6.0, 7.0]]}, r"row 0: input_ids is \[5.0, 6.0, 7.0\]; needed a flat list"),
        ({"input_ids": [[True, False]]}, "row 0: input_ids is .*; needed a flat list of integers"),
        ({"input_ids": [5, 6, 7]}, "row .: input_ids is .; needed a flat list"),
        ({"input_ids": [{"a": GOOD}]}, r"row 0: input_ids is \{'a': .*; needed a flat list"),
        ({"input_ids": [GOOD, [5, -100]]}, "row 1: input_ids holds -100; needed token ids, 0 to 99"),
        ({"input_ids": [GOOD, [5, 100]]}, "row 1: input_ids holds 100; needed token ids, 0 to 99"),
        ({"input_ids": [[2**40]]}, "row 0: input_ids holds 1099511627776; needed token ids"),
        ({"input_ids": [GOOD], "attention_mask": [[1, 1, 1]]}, "row 0: attention_mask has 3 entries, input_ids 4;"),
        ({"input_ids": [GOOD], "attention_mask": [[1] * 5]}, "row 0: attention_mask has 5 entries, input_ids 4;"),
        ({"input_ids": [GOOD], "attention_mask": [[]]}, "row 0: attention_mask has 0 entries, input_ids 4;"),
        ({"input_ids": [GOOD], "attention_mask": [None]}, "row 0: attention_mask is None; needed a flat list of 0 and"),
        ({"input_ids": [GOOD], "attention_mask": [[GOOD]]}, "row 0: attention_mask is .*; needed a flat list of 0 and"),
        (
            {"input_ids": [GOOD], "attention_mask": [[1, 2, 2, 0]]},
            "row 0: attention_mask is .*; needed a flat list of 0",
        ),
        ({"input_ids": [GOOD], "special_tokens_mask": [[0, 1]]}, "row 0: special_tokens_mask has 2 entries, input_ids"),
        ({"input_ids": [GOOD], "special_tokens_mask": [["a"] * 4]}, "row 0: special_tokens_mask is .*; needed a flat"),
    ],
    ids=lambda value: " ".join(f"{name}={row}" for name, row in value.items())[:60] if isinstance(value, dict) else "",
)
def test_malformed_rows_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    folder = save_rows(tmp_path / "x", **columns)
    with pytest.raises(UserError, match=message) as error:
        load_token_dataset(folder, 4, n_vocab=100)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(folder))


def test_a_dataset_kept_as_tensors(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": [GOOD] * 4}).with_format("torch").save_to_disk(str(tmp_path / "x"))
    assert flat(load_token_dataset(tmp_path / "x", 8)) == GOOD * 4


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input_ids": [1, 2]}\n')
    pytest.importorskip("datasets")
    with pytest.raises(
        UserError, match=r"rows\.jsonl' is a file; needed a folder: tokenize it with the package datasets"
    ):
        load_token_dataset(file, 4)


# --- the beginning of a sequence ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_convention_of_a_tokenizer(kind: str) -> None:
    assert beginning(KINDS[kind]()) == ()
    assert beginning(KINDS[kind](), bos=True) == (1,), "its bos_token"
    for begin, end, found in [(["<s>"], "", (1,)), (["<s>"], "</s>", (1,)), (["</s>", "<s>"], "", (2, 1))]:
        tokenizer = with_bos(KINDS[kind](), *begin, end=end)
        assert beginning(tokenizer) == beginning(tokenizer, bos=True) == found
        assert beginning(tokenizer, bos=False) == ()


class Saying:
    """A tokenizer with attributes that say something else than what it does."""

    def __init__(self, tokenizer: Any, **says: Any) -> None:
        self._tokenizer = tokenizer
        self.__dict__ |= says

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)


def test_the_convention_is_what_a_tokenizer_does_and_not_what_it_says() -> None:
    assert beginning(Saying(byte_level(), add_bos_token=True, bos_token_id=1)) == ()
    assert beginning(Saying(with_bos(byte_level()), add_bos_token=False, bos_token_id=None)) == (1,)


def test_a_tokenizer_that_knows_few_letters() -> None:
    """Of one probe it keeps nothing, and a beginning is all there is."""

    def tokenizer(text: str, add_special_tokens: bool, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [5] * text.count("T") + [2] * add_special_tokens}

    assert beginning(tokenizer) == (1,)


def test_no_beginning_to_be_had() -> None:
    tokenizer = byte_level()
    tokenizer.bos_token = None
    assert beginning(tokenizer) == ()
    with pytest.raises(UserError, match="--bos: the model's tokenizer has no beginning-of-sequence token"):
        beginning(tokenizer, bos=True)


@pytest.mark.parametrize("bos", [None, True])
def test_a_beginning_that_the_model_does_not_know(bos: bool | None) -> None:
    """Added to the tokenizer, and not to the model."""
    tokenizer = with_bos(byte_level(), "<s>")
    (token,) = beginning(tokenizer, bos)
    assert beginning(tokenizer, bos, token + 1) == (token,)
    assert beginning(tokenizer, False, token) == ()
    with pytest.raises(
        UserError, match=f"beginning of sequence is token {token}, and the model knows 0 to {token - 1}"
    ):
        beginning(tokenizer, bos, token)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    begin=st.sampled_from([(7,), (7, 8)]),
    n_ctx=st.integers(3, 12),
    there=st.lists(st.booleans(), min_size=12, max_size=12),
    max_tokens=st.none() | st.integers(12, 60),
)
@example(lengths=[14, 1], begin=(7, 8), n_ctx=3, there=[False, True] + [False] * 10, max_tokens=15)
def test_each_window_begins_so_and_once(
    lengths: list[int], begin: tuple[int, ...], n_ctx: int, there: list[bool], max_tokens: int | None
) -> None:
    """Documents that begin so themselves, or not; the text is neither lost nor seen twice."""
    starts = [100 + sum(lengths[:i]) for i in range(len(lengths))]
    lists = [
        (list(begin) if has else []) + list(range(start, start + length))
        for start, length, has in zip(starts, lengths, there, strict=False)
    ]
    try:
        windows = pack(lists, n_ctx, max_tokens, begin)
    except UserError as error:
        assert "give more text or a lower n_ctx" in str(error)  # noqa: PT017
        return
    assert windows.begin == begin
    assert windows.tokens.shape[1] == n_ctx
    assert (windows.tokens[:, : len(begin)] == torch.tensor(begin)).all()
    if all(lengths) and n_ctx >= 2 * len(begin):  # in a shorter one a beginning that was cut may follow
        twice = windows.tokens[:, len(begin) : 2 * len(begin)] == torch.tensor(begin)
        assert not twice.all(dim=1).any()
    assert windows.special is not None
    text = windows.tokens[windows.tokens >= 100].tolist()
    assert text == list(range(100, 100 + len(text)))
    complete = (windows.tokens < 100) == windows.special
    assert complete[:, :-1].all()  # a window may end inside of a beginning
    of_token = list(chain.from_iterable([i] * length for i, length in enumerate(lengths)))
    assert windows.documents[windows.tokens >= 100].tolist() == of_token[: len(text)]
    left_over = sum(lengths) if max_tokens is None else min(sum(lengths), max_tokens)
    assert left_over - len(text) < n_ctx + len(begin) * len(lengths)


def test_rows_that_are_windows_already_stay_so(tmp_path: Path) -> None:
    rows = [[1, *range(10 * i, 10 * i + 7)] for i in range(1, 9)]
    windows = load_token_dataset(save_rows(tmp_path / "x", input_ids=rows), 8, begin=(1,))
    assert sorted(windows.tokens.tolist()) == rows
    assert windows.special is not None
    assert torch.equal(windows.special, windows.tokens == 1)
    unmarked = load_token_dataset(tmp_path / "x", 8)
    assert torch.equal(unmarked.tokens, windows.tokens)
    assert unmarked.special is None


def test_a_text_with_a_beginning(tiny_lm: LanguageModel) -> None:
    plain, begun = (
        tokenize(DOCUMENTS, tiny_lm.tokenizer, n_ctx, begin=begin) for n_ctx, begin in [(15, ()), (16, (0,))]
    )
    assert torch.equal(begun.tokens[:, 1:], plain.tokens)
    assert torch.equal(begun.documents[:, 1:], plain.documents)
    assert (begun.tokens[:, 0] == 0).all()
    for keep_first in (False, True):
        source = ModelActivations(tiny_lm, 2, begun, keep_first=keep_first)
        assert source.describe()["bos"] is True
        assert source.describe().get("keep_first", False) is keep_first
        mask = source.read(range(8)).mask
        assert not mask[:, 0].any()
        assert mask[:, 1:].all(), "the first token of the text is not position 0"


@pytest.mark.parametrize(
    ("n_ctx", "max_tokens", "message"),
    [
        (2, None, "n_ctx: given 2; needed 3 or more"),
        (8, 5, "max_tokens: given 5; needed at least one window of 6"),
        (8, None, "the text is 5 tokens long; one window takes 6: give more text or a lower n_ctx"),
    ],
)
def test_pack_with_a_beginning_and_too_little(n_ctx: int, max_tokens: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack([[1, 2, 3], [4, 5]], n_ctx, max_tokens, (7, 8))


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3])
def test_pack_with_a_beginning_longer_than_the_text(n_tokens: int) -> None:
    with pytest.raises(UserError, match=f"the text is {n_tokens} tokens long; one window takes 4"):
        pack([[1] * n_tokens], 9, None, (1, 1, 1, 1, 1))
