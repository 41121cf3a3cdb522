from __future__ import annotations

import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from one_line import one_line
from streams import as_rows, same_windows, texts_of, write_lines

from csae.data import rows
from csae.data.activations import ModelActivations, estimate_normalisation
from csae.data.language_model import LanguageModel
from csae.data.packing import TokenWindows
from csae.data.places import Place
from csae.data.raw_text import as_stream, is_text, open_stream, open_stream_batches, windows_of_dataset
from csae.data.row_tokens import RowTokens, Tokenized
from csae.data.rows import Chunk
from csae.data.stream_batches import StreamBatches
from csae.data.text import tokenize
from csae.errors import UserError

PLACES = [Place("resid.out:0"), Place("mlp.in:1", "mlp.out:1")]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", as_rows(texts_of(300)))


def origin_of(dataset: Path, **more: Any) -> dict[str, Any]:
    how = {"n_ctx": 16, "stream": True, "held_out_windows": 4, "shuffle": 10, "shuffle_seed": 1}
    return {"dataset": str(dataset), **how, **more}


def batches_of(lm: LanguageModel, origin: dict[str, Any], workers: int = 0) -> tuple[StreamBatches, ModelActivations]:
    windows = windows_of_dataset(origin, lm, ())
    return open_stream_batches(origin, ModelActivations(lm, PLACES, windows), 3, workers)


def test_steps_are_windows_of_the_stream(tiny_lm: LanguageModel, lines: Path) -> None:
    origin = origin_of(lines)
    batches, _ = batches_of(tiny_lm, origin)
    assert (batches.n_ctx, batches.n_windows, batches.places) == (16, None, tuple(PLACES))
    stream = open_stream(origin, tiny_lm, workers=0)
    for step in islice(batches.start(0, None), 5):
        windows = stream.take(3)
        expected = ModelActivations(tiny_lm, PLACES, windows).read_all(range(3))
        assert step.batches.keys() == expected.keys()
        for place, batch in step.batches.items():
            for part, other in zip(batch, expected[place], strict=True):
                assert part is other is None or torch.equal(part, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_from_any_state_on(tiny_lm: LanguageModel, lines: Path, workers: int) -> None:
    batches, _ = batches_of(tiny_lm, origin_of(lines), workers)
    steps = list(islice(batches.start(0, None), 6))
    other, _ = batches_of(tiny_lm, origin_of(lines))
    running = batches.start(0, None)
    next(running)
    for done in (1, 4):  # beside another that runs
        for step, expected in zip(other.start(done, steps[done - 1].state), steps[done:], strict=False):
            for place, batch in step.batches.items():
                assert torch.equal(batch.acts, expected.batches[place].acts)
                assert torch.equal(batch.tokens, expected.batches[place].tokens)
            assert all(torch.equal(part, expected.state[name]) for name, part in step.state.items())


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each row was tokenized."""
    rows: Counter[str] = Counter()

    def counted(self: RowTokens, chunk: Chunk, tokenize: Any = RowTokens.__call__) -> Tokenized:
        rows.update(chunk.place(number) for number in range(len(chunk.rows)))
        return tokenize(self, chunk)

    monkeypatch.setattr(RowTokens, "__call__", counted)
    return rows


def test_no_row_is_tokenized_twice(tiny_lm: LanguageModel, tmp_path: Path, tokenized: Counter[str]) -> None:
    n_tokens = len(tiny_lm.tokenizer(" ".join(texts_of(2000)))["input_ids"])
    dataset = write_lines(tmp_path / "long.jsonl", as_rows([*texts_of(40), " ".join(texts_of(2000)), *texts_of(900)]))
    # Held out, measured and trained on are windows of the same long row.
    origin = origin_of(dataset, held_out_windows=n_tokens // 16 // 3)
    expected = islice(batches_of(tiny_lm, origin)[0].start(0, None), 200)
    acts = [step.batches[PLACES[0]].acts for step in expected]
    tokenized.clear()
    opened: dict[str, Any] = {}
    held_out = ModelActivations(tiny_lm, PLACES, windows_of_dataset(origin, tiny_lm, (), opened=opened))
    batches, _ = open_stream_batches(origin, held_out, 3, 0, opened=opened)
    steps = list(islice(batches.start(0, None), 200))
    assert all(torch.equal(step.batches[PLACES[0]].acts, other) for step, other in zip(steps, acts, strict=True))
    assert set(tokenized.values()) == {1}
    assert len(tokenized) > 500, "it read on"
    tokenized.clear()
    resumed = batches.start(150, steps[149].state)
    assert torch.equal(next(resumed).batches[PLACES[0]].acts, acts[150])
    assert batches.stream.first(3).tokens.shape == (3, 16)
    assert max(tokenized.values()) == 1, "the long row once, for `first`"


def test_a_stream_goes_on_inside_of_what_was_read_first(
    tiny_lm: LanguageModel, lines: Path, tokenized: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 10)
    origin = origin_of(lines)
    states = [step.state for step in islice(batches_of(tiny_lm, origin)[0].start(0, None), 20)]
    for state in states:
        batches, _ = batches_of(tiny_lm, origin)
        stream, other = batches.stream.again(state), open_stream(origin, tiny_lm, workers=0)
        other.restore(state)
        tokenized.clear()
        assert all(same_windows(stream.take(3), other.take(3)) for _ in range(20))
        assert stream.counts == other.counts


def test_what_a_run_keeps_of_a_stream(tiny_lm: LanguageModel, lines: Path) -> None:
    def about(**more: Any) -> dict[str, Any]:
        return batches_of(tiny_lm, origin_of(lines, **more))[0].describe(PLACES[0])

    said = about()
    assert said == about()
    assert said["stream"] is True
    assert said["layer"] == 1
    assert said["n_windows"] == 4
    for more in ({"shuffle": 5}, {"shuffle_seed": 2}, {"held_out_windows": 5}, {"n_ctx": 8}):
        assert about(**more) != said
    write_lines(lines, as_rows(texts_of(301)))
    assert about() != said


def test_windows_to_measure_follow_those_held_out(tiny_lm: LanguageModel, lines: Path) -> None:
    origin = origin_of(lines)
    _, source = batches_of(tiny_lm, origin)
    stream = open_stream(origin, tiny_lm, workers=0)
    assert torch.equal(source.token_windows.tokens, stream.first(4 + 64).tokens[4:])
    assert estimate_normalisation(source.at(PLACES[0])).mean.isfinite().all()


def test_too_short_a_data_set(tiny_lm: LanguageModel, lines: Path) -> None:
    with pytest.raises(UserError, match=r"fills \d+ windows of 16: too few for 100000 to hold out and one") as error:
        batches_of(tiny_lm, origin_of(lines, held_out_windows=100_000))
    one_line(error)


@pytest.mark.parametrize(
    ("share", "tokens", "expected"), [(0.02, 1000 * 16, 20), (0.02, 16, 1), (0.02, 10**9, 512), (0.5, 64, 2)]
)
def test_how_many_windows_a_stream_holds_out(lines: Path, share: float, tokens: int, expected: int) -> None:
    origin = {"model": "m", "dataset": str(lines), "n_ctx": 16}
    added = {"stream": True, "held_out_windows": expected, "shuffle": 9, "shuffle_seed": 3}
    for stream in (None, True):
        assert as_stream(origin, stream, tokens, share, 9, 3) == origin | added
    assert as_stream(origin, False, tokens, share, 9, 3) == origin


def test_what_is_no_stream(tmp_path: Path, lines: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(tmp_path / "saved")
    for origin in ({"text": "x"}, {"activations": "x"}, {"dataset": str(tmp_path / "saved")}):
        assert as_stream(origin, None, 100, 0.1, 9, 0) == origin
    assert as_stream({"model": "m", "dataset": str(tmp_path / "saved"), "n_ctx": 2}, True, 100, 0.1, 9, 0)["stream"]
    text = {"model": "m", "dataset": str(lines), "n_ctx": 16}
    for origin, stream, tokens, message in (
        ({"text": "x"}, True, 100, "--stream: given without --dataset"),
        (text, None, None, "--tokens: not given; needed with a data set that is streamed"),
        (text | {"max_tokens": 50}, None, 100, "--max-tokens: given with a data set that is streamed"),
    ):
        with pytest.raises(UserError, match=message) as error:
            as_stream(origin, stream, tokens, 0.1, 9, 0)
        one_line(error)


# --- read whole --------------------------------------------------------------------------------------


def whole(lm: LanguageModel, dataset: Path, **more: Any) -> TokenWindows:
    return windows_of_dataset({"dataset": str(dataset), "n_ctx": 16, **more}, lm, ())


def test_a_data_set_of_text_is_read_whole(tiny_lm: LanguageModel, lines: Path) -> None:
    assert is_text({"dataset": str(lines)})
    assert same_windows(whole(tiny_lm, lines), tokenize(texts_of(300), tiny_lm.tokenizer, 16))


def test_of_many_texts_the_first_are_read(tiny_lm: LanguageModel, tmp_path: Path, capsys: Any) -> None:
    rows: list[Any] = [*as_rows(texts_of(1000)), "no json", *["bad"] * 50, *as_rows(texts_of(50))]
    found = whole(tiny_lm, write_lines(tmp_path / "a.jsonl", rows), max_tokens=1600)
    assert len(found.tokens) == 100
    assert capsys.readouterr().err == ""  # so far it was not read
    whole(tiny_lm, tmp_path / "a.jsonl")
    assert capsys.readouterr().err.count("left out") == 10


def test_as_many_texts_are_read_as_are_needed(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    texts = ["<|endoftext|>" * 10] * 300  # 13 characters a token
    found = whole(tiny_lm, write_lines(tmp_path / "a.jsonl", as_rows(texts)), max_tokens=1600)
    assert len(found.tokens) == 100


def test_a_folder_of_plain_text(tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csae.data.row_files.PART_BYTES", 64)
    texts = [f"{text}\n{text}\n" for text in texts_of(20)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    assert same_windows(whole(tiny_lm, tmp_path), tokenize(texts, tiny_lm.tokenizer, 16))


def test_a_stream_is_evaluated_on_what_it_holds_out(tiny_lm: LanguageModel, lines: Path) -> None:
    windows = windows_of_dataset(origin_of(lines), tiny_lm, ())
    assert same_windows(windows, open_stream(origin_of(lines), tiny_lm).first(4))
    with pytest.raises(UserError, match="held_out_windows: not given with a stream"):
        windows_of_dataset(origin_of(lines, held_out_windows=None), tiny_lm, ())


def test_tokenized_data_sets_are_read_as_before(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    ids = tiny_lm.tokenizer(texts_of(30), add_special_tokens=False)["input_ids"]
    datasets.Dataset.from_dict({"input_ids": ids, "text": texts_of(30)}).save_to_disk(tmp_path / "saved")
    assert not is_text({"dataset": str(tmp_path / "saved")})
    assert is_text({"dataset": str(tmp_path / "saved"), "text_column": "text"})
    n = sum(map(len, ids)) // 16
    assert len(whole(tiny_lm, tmp_path / "saved").tokens) == n
    assert len(whole(tiny_lm, tmp_path / "saved", text_column="text").tokens) == n


def test_while_text_is_waited_for_there_are_steps_without_batches(
    tiny_lm: LanguageModel, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, _ = batches_of(tiny_lm, origin_of(lines))
    expected = [step.batches[PLACES[0]].tokens for step in islice(batches.start(0, None), 500)]
    monkeypatch.setattr("csae.data.stream_batches.PATIENCE", 0.05)
    read, go = batches.stream.rows.read, threading.Event()

    def slow(position: dict[str, Any], columns: tuple[str, ...]) -> Any:
        for number, chunk in enumerate(read(position, columns)):
            if number:
                go.wait()
            yield chunk

    monkeypatch.setattr(batches.stream.rows, "read", slow)
    steps = batches.start(0, None)
    found = []
    while (step := next(steps)).batches:
        found.append(step.batches[PLACES[0]].tokens)
    other, _ = batches_of(tiny_lm, origin_of(lines))
    after = next(after for after in other.start(len(found), step.state) if after.batches)
    assert torch.equal(after.batches[PLACES[0]].tokens, expected[len(found)])
    go.set()
    found += [step.batches[PLACES[0]].tokens for step in islice(steps, 100) if step.batches]
    assert all(map(torch.equal, found, expected))
