from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from one_line import one_line
from streams import TOKENIZER, as_rows, same_windows, stream_of, texts_of, write_lines

from csae.data import retrying
from csae.data import stream as streams
from csae.data.packing import pack
from csae.data.raw_text import windows_of_dataset
from csae.data.row_tokens import RowTokens
from csae.data.rows import open_rows
from csae.data.stream import TokenStream
from csae.errors import UserError

N = 600


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", as_rows(texts_of(N)))


def ids_of(texts: list[str]) -> list[list[int]]:
    return TOKENIZER(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("begin", [(), (0,)])
def test_without_shuffling_the_windows_are_those_of_the_text(lines: Path, begin: tuple[int, ...]) -> None:
    expected = pack(ids_of(texts_of(N)), 16, begin=begin)
    stream = stream_of(lines, shuffle=1, begin=begin)
    n = len(expected.tokens)
    assert same_windows(stream.first(10**6), expected)
    assert same_windows(stream.first(7), pack(ids_of(texts_of(N)), 16, 7 * (16 - len(begin)), begin))
    found = stream.take(n - 1)
    assert torch.equal(found.tokens, expected.tokens[: n - 1])
    assert torch.equal(found.documents, expected.documents[: n - 1])
    assert found.begin == begin


def test_shuffled_windows_are_those_of_the_text_in_another_order(lines: Path) -> None:
    expected = [tuple(window) for window in stream_of(lines).first(10**6).tokens.tolist()]
    stream = stream_of(lines, shuffle=64)
    found = [tuple(window) for window in stream.take(len(expected) - 64).tokens.tolist()]
    assert len(set(found)) == len(found)
    assert set(found) <= set(expected)
    order = [expected.index(window) for window in found[:200]]
    assert sum(abs(at - place) > 8 for place, at in enumerate(order)) > 100
    assert found != [tuple(window) for window in stream_of(lines, shuffle=64, seed=1).take(len(found)).tokens.tolist()]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_is_the_same_whatever_the_number_of_workers(lines: Path, workers: int) -> None:
    one, other = stream_of(lines), stream_of(lines, workers=workers)
    assert same_windows(one.take(700), other.take(700))
    other.close()


@pytest.mark.parametrize("at", [0, 1, 5, 100, 699, 1700])
def test_resumed_streams_go_on_with_the_same_bits(lines: Path, at: int) -> None:
    how: dict[str, Any] = {"begin": (0,), "held_out": 5, "shuffle": 40}
    stream = stream_of(lines, **how)
    for _ in range(at):
        stream.take(1)
    state = stream.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    after = stream.take(1000)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    resumed = stream_of(lines, **how)
    resumed.restore(state)
    assert same_windows(resumed.take(1000), after)
    assert resumed.counts == stream.counts
    assert all(torch.equal(tensor, stream.state()[name]) for name, tensor in resumed.state().items())


def test_a_resumed_stream_reads_nothing_again(lines: Path) -> None:
    stream = stream_of(lines)
    stream.take(500)
    state = stream.state()
    content = lines.read_bytes()
    done = stream._position["inside"]["offset"]
    assert done > 10_000
    lines.write_bytes(b"\0" * done + content[done:])
    resumed = TokenStream(stream.rows, stream.to_tokens, 16, shuffle=8, workers=0)
    resumed.restore(state)
    assert same_windows(resumed.take(100), stream.take(100))


def test_held_out_windows_are_never_in_the_stream(lines: Path) -> None:
    stream = stream_of(lines, held_out=30)
    held_out = {tuple(window) for window in stream.first(30).tokens.tolist()}
    assert len(held_out) == 30
    found = {tuple(window) for window in stream.take(6000).tokens.tolist()}
    assert stream.counts["round"] >= 1
    assert not found & held_out


def test_a_data_set_that_ends_begins_again(lines: Path) -> None:
    said: list[str] = []
    stream = stream_of(lines, shuffle=1, say=said.append)
    whole = stream.first(10**6).tokens
    found = stream.take(3 * len(whole) - 1).tokens
    assert torch.equal(found, whole.repeat(3, 1)[:-1])
    tokens = sum(map(len, ids_of(texts_of(N))))
    assert said == [f"{stream.rows.name}: ended after {tokens:,} tokens; begins again"]


def test_of_fewer_windows_than_are_shuffled_each_is_held_once(lines: Path) -> None:
    stream = stream_of(lines, shuffle=10_000)
    stream.take(1)
    n = len(stream.first(10**6).tokens)
    assert stream._buffer.held == stream._buffer.size == n
    assert stream.counts["round"] == 1
    resumed = stream_of(lines, shuffle=10_000)
    resumed.restore(stream.state())
    assert same_windows(resumed.take(50), stream.take(50))


@pytest.mark.parametrize(("held_out", "n_ctx"), [(10**6, 16), (0, 10**6)])
def test_too_little_text(lines: Path, held_out: int, n_ctx: int) -> None:
    with pytest.raises(UserError, match=r"tokens long: too short for .* windows of .*: give more text") as error:
        stream_of(lines, n_ctx, held_out=held_out).take(1)
    one_line(error)


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    good = as_rows(texts_of(40))
    bad = ["no json", '["a list"]', '{"text": 5}', '{"text": null}', '{"other": "x"}', '{"text": "\\ud800"}']
    file = write_lines(tmp_path / "a.jsonl", [*good[:20], *bad, "", '{"text": " "}', *good[20:]])
    said: list[str] = []
    stream = stream_of(file, shuffle=1, say=said.append)
    expected = pack(ids_of(texts_of(40)), 16)
    assert torch.equal(stream.take(len(expected.tokens)).tokens, expected.tokens)
    assert stream.counts["bad_rows"] == len(bad)
    assert len(said) == len(bad) + 1  # the end
    assert said[0].startswith(f"{file}, line 21: no JSON (")
    assert said[2] == f"{file}, line 23: text is 5; needed a text: left out"
    assert "line 26: text holds \\ud800, half of a character" in said[5]
    assert all("\n" not in line for line in said)


def test_half_a_character_is_left_out_where_a_data_set_is_read_whole(tmp_path: Path, tiny_lm) -> None:
    good = as_rows(texts_of(20))
    file = write_lines(tmp_path / "a.jsonl", [*good[:9], '{"text": "one \\udfff two"}', *good[9:]])
    origin = {"dataset": str(file), "n_ctx": 16}
    without = {"dataset": str(write_lines(tmp_path / "b.jsonl", good)), "n_ctx": 16}
    read, expected = (windows_of_dataset(one, tiny_lm, ()) for one in (origin, without))
    assert torch.equal(read.tokens, expected.tokens)


def test_a_text_that_the_tokenizer_does_not_take_is_left_out(lines: Path) -> None:
    class Picky:
        def __call__(self, texts, **options):
            if any("a" in text for text in texts):
                raise RuntimeError("no a")
            return {"input_ids": [[1, 2, 3] for _ in texts]}

    chunk = next(iter(open_rows(lines).read({}, ("text",))))
    found = RowTokens(Picky(), ("text",))(chunk._replace(rows=["one", "a", "two"]))
    assert found.lengths == [3, 3]
    assert "the tokenizer does not take it (no a)" in found.bad[0]


def test_many_bad_rows_are_told_less_and_less(tmp_path: Path) -> None:
    rows: list[Any] = [row for good in as_rows(texts_of(500)) for row in (good, {"text": 1})]
    said: list[str] = []
    stream_of(write_lines(tmp_path / "a.jsonl", rows), say=said.append).first(10**6)
    stream = stream_of(tmp_path / "a.jsonl", say=said.append)
    while not stream.counts["round"]:
        stream.take(10)
    told = [line for line in said if "left out" in line]
    assert len(told) == 11
    assert told[-1].endswith("one of 100 so far")


def test_why_a_data_set_has_too_few_windows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    file = write_lines(tmp_path / "a.jsonl", [{"text": i} for i in range(20)])
    assert len(stream_of(file, say=told.append).first(3).tokens) == 0
    assert told == [f"{file}, line 20: text is 19; needed a text: left out, as the last of 20 rows"]
    monkeypatch.setattr(streams, "HOPELESS", 10)
    with pytest.raises(UserError, match="none of the last 20 rows can be used"):
        stream_of(file).first(3)


def test_a_data_set_of_bad_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "a.jsonl", [*as_rows(texts_of(5)), *[{"text": 1}] * 3000])
    with pytest.raises(UserError, match=r"text is 1; needed a text; none of the last 1,\d+ rows can be used") as error:
        stream_of(file).take(1000)
    one_line(error)


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        ([{"content": "x", "id": 1}], {}, "has no column text, only content, id: name that of the text by --text-col"),
        ([{"text": "x"}], {"text_column": "body"}, "has no column body, only text: name that of the text by --text-co"),
        ([{"messages": []}], {}, "has no column text, only messages: give --chat"),
        ([{"text": "x"}], {"chat": True}, "--chat: .* has no column messages, only text: name that of the messages by"),
        ([{"messages": []}], {"chat": True}, "--chat: the model's tokenizer has no chat template"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, rows: list[Any], how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        stream_of(write_lines(tmp_path / "a.jsonl", rows), **how)
    one_line(error)


def test_a_text_column_of_another_name(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"body": text} for text in texts_of(40)])
    expected = pack(ids_of(texts_of(40)), 16)
    assert torch.equal(stream_of(file, text_column="body").first(5).tokens, expected.tokens[:5])


def test_chat_templates_are_applied(tmp_path: Path) -> None:
    from tiny_model import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    )
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in texts_of(30)]
    rows = [{"messages": chat} for chat in chats]
    rows.insert(3, {"messages": [{"role": "x", "content": "?"}]})
    rows.insert(4, {"messages": "text"})
    said: list[str] = []
    stream = stream_of(
        write_lines(tmp_path / "a.jsonl", rows), chat=True, tokenizer=tokenizer, shuffle=1, say=said.append
    )
    text = [f"<|user|>{text}<|endoftext|><|assistant|>Yes.<|endoftext|>" for text in texts_of(30)]
    expected = pack(tokenizer(text, add_special_tokens=False)["input_ids"], 16)
    assert torch.equal(stream.take(len(expected.tokens)).tokens, expected.tokens)
    assert any("line 4: the chat template does not take it (no x)" in line for line in said)
    assert any("line 5: messages is 'text'; needed a list of messages" in line for line in said)


def test_tokenized_data_sets_stream_as_well(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    ids = ids_of(texts_of(50))
    rows = [
        {
            "input_ids": [*row, 0, 0],
            "attention_mask": [1] * len(row) + [0, 0],
            "special_tokens_mask": [1] + [0] * (len(row) + 1),
        }
        for row in ids
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    stream = stream_of(tmp_path / "saved", shuffle=1, n_vocab=300)
    expected = pack(ids, 16)
    found = stream.take(len(expected.tokens))
    assert torch.equal(found.tokens, expected.tokens)
    starts = torch.zeros_like(expected.tokens, dtype=torch.bool).flatten()
    at = 0
    for row in ids:
        starts[at : at + 1] = True
        at += len(row)
    assert found.special is not None
    assert torch.equal(found.special.flatten(), starts)
    said: list[str] = []
    small = stream_of(tmp_path / "saved", n_vocab=3, say=said.append)
    with pytest.raises(UserError, match="tokens long"):
        small.take(5)
    assert "row 0: it: input_ids holds" in said[0]


def test_a_lost_connection(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)
    expected = stream_of(lines).take(900)
    said: list[str] = []
    stream = stream_of(lines, say=said.append)
    read, state = stream.rows.read, {"calls": 0, "down": False}

    def shaky(position: Any, columns: Any) -> Any:
        state["calls"] += 1
        for number, chunk in enumerate(read(position, columns)):
            if state["down"] or (number == 1 and state["calls"] % 2):
                raise ConnectionError("reset by peer")
            yield chunk

    monkeypatch.setattr(stream.rows, "read", shaky)
    assert same_windows(stream.take(900), expected)
    assert any("connection lost (ConnectionError: reset by peer): trying again" in line for line in said)
    before = stream.state()
    state["down"] = True
    with pytest.raises(retrying.ConnectionLost, match="out of reach") as error:
        stream.take(10_000)
    one_line(error)
    state["down"], after = False, stream_of(lines)
    after.restore(before)
    assert same_windows(stream.take(500), after.take(500))  # nothing was lost on the way


def test_states_of_another_stream(lines: Path) -> None:
    state = stream_of(lines, 16).state()
    for broken in ({}, {**state, "about": state["about"][:-3]}, stream_of(lines, 8).state()):
        with pytest.raises(UserError, match="the state in the checkpoint is not of this stream") as error:
            stream_of(lines, 16).restore(broken)
        one_line(error)


@pytest.mark.parametrize(("name", "value"), [("shuffle", 0), ("held_out", -1), ("workers", -1), ("seed", -1)])
def test_bad_sizes(lines: Path, name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name}: given {value}; needed"):
        stream_of(lines, **{name: value})
