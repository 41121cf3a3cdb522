"""Data sets of text, by the description of where activations come from (`csae.data.sources`): read whole, or streamed.

Of that description, they take "dataset", "n_ctx", "bos", "text_column", "chat" and "max_tokens"; of a stream, "stream",
true, "held_out_windows", how many windows at its beginning are not trained on, "shuffle" and "shuffle_seed".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from csae.data.activations import ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.packing import TokenWindows
from csae.data.retrying import read_on
from csae.data.row_tokens import RowTokens, choose_columns, tell_left_out
from csae.data.rows import open_rows
from csae.data.stream import SHUFFLED, TokenStream
from csae.data.stream_batches import StreamBatches
from csae.data.text import beginning, load_token_dataset, tokenize
from csae.data.token_rows import IDS
from csae.errors import UserError
from csae.progress import Progress, quiet, say

CHARACTERS = 6  # a token has fewer, as a rule
MEASURED = 64  # windows of a stream from which the normalisation is estimated
MOST_HELD_OUT = 512  # windows of a stream
STREAM = ("stream", "held_out_windows", "shuffle", "shuffle_seed")
READING = ("text_column", "chat", *STREAM)
"""what of the description says how a data set is read, beside its name"""


def is_text(origin: dict[str, Any]) -> bool:
    """Whether a data set holds text, to be tokenized. Raises UserError where it holds neither text nor token ids."""
    rows = open_rows(origin["dataset"])
    return choose_columns(rows.name, rows.columns, origin.get("text_column"), bool(origin.get("chat")))[0] != IDS


def is_streamed(origin: dict[str, Any], stream: bool | None) -> bool:
    """Whether a data set is read in a stream: as given, or where that is None one of text. Raises UserError."""
    if origin.get("dataset") is None:
        if stream:
            raise UserError("--stream: given without --dataset; needed with one")
        return False
    if origin.get("text") is not None or origin.get("model") is None:
        return False  # `open_source` says what is wrong
    has_text = is_text(origin)  # in any case: a data set that can't be read is told before a model is loaded
    return has_text if stream is None else stream


def as_stream(
    origin: dict[str, Any],
    stream: bool | None,
    tokens: int | None,
    share: float,
    shuffle: int,
    seed: int,
    held_out: int | None = None,
) -> dict[str, Any]:
    """`origin` for training on so many tokens: with what says that the data set is streamed, where it is.

    stream: None for a stream of text, and of token ids none. share: of the windows, to hold out; held_out: how many, as
    a run did that goes on. Raises UserError where it can't be streamed.
    """
    if not is_streamed(origin, stream):
        return origin
    if tokens is None:
        raise UserError("--tokens: not given; needed with a data set that is streamed (--no-stream reads it whole)")
    if origin.get("max_tokens") is not None:
        raise UserError("--max-tokens: given with a data set that is streamed; needed with --no-stream, else --tokens")
    held_out = held_out or min(MOST_HELD_OUT, max(1, round(share * tokens / origin["n_ctx"])))
    return origin | {"stream": True, "held_out_windows": held_out, "shuffle": shuffle, "shuffle_seed": seed}


def open_stream(
    origin: dict[str, Any], lm: LanguageModel, workers: int = 1, say: Callable[[str], None] = say
) -> TokenStream:
    """The stream that `origin` describes. Raises UserError where it can't be opened."""
    rows = open_rows(origin["dataset"])
    chat = bool(origin.get("chat"))
    columns = choose_columns(rows.name, rows.columns, origin.get("text_column"), chat)
    return TokenStream(
        rows,
        RowTokens(lm.tokenizer, columns, chat, lm.n_vocab),
        origin["n_ctx"],
        beginning(lm.tokenizer, origin.get("bos", False), lm.n_vocab),
        origin.get("held_out_windows", 0),
        origin.get("shuffle", SHUFFLED),
        origin.get("shuffle_seed", 0),
        workers,
        say,
    )


def open_stream_batches(
    origin: dict[str, Any],
    held_out: ModelActivations,
    batch_windows: int,
    workers: int = 1,
    share: tuple[int, int] = (0, 1),
    opened: dict[str, Any] | None = None,
) -> tuple[StreamBatches, ModelActivations]:
    """The batches of the stream that `origin` describes, and a source of its first windows, to measure them.

    held_out: what `csae.data.sources.open_source` gives for it, with the same `opened`, so that no text is tokenized
    twice. share: the rank and the number of ranks; what there is to say of the text, rank 0 says.
    """
    stream = open_stream(origin, held_out.lm, workers, say if share[0] == 0 else lambda line: None)
    if (begun := (opened or {}).get(_name_of(origin))) is not None:
        stream.begins_as(begun)
    tokens, documents, special, begin = stream.first(stream.held_out + MEASURED)
    if len(tokens) <= stream.held_out:
        raise UserError(
            f"{stream.rows.name} fills {len(tokens)} windows of {stream.n_ctx}: too few for {stream.held_out} to hold "
            "out and one to train on: give more text, or a lower --n-ctx"
        )
    rest = slice(stream.held_out, None)
    first = TokenWindows(tokens[rest], documents[rest], None if special is None else special[rest], begin)
    source = ModelActivations(held_out.lm, held_out.places, first, held_out.batch_size, held_out.keep_first)
    return StreamBatches(stream, held_out, batch_windows, share), source


def _name_of(origin: dict[str, Any]) -> str:
    """The name of a stream among what is open: by what its token ids follow from."""
    said = {name: origin.get(name) for name in ("model", "dataset", "text_column", "chat")}
    return f"stream {json.dumps(said, sort_keys=True)}"


def windows_of_dataset(
    origin: dict[str, Any],
    lm: LanguageModel,
    begin: Sequence[int],
    progress: Progress = quiet,
    opened: dict[str, Any] | None = None,
) -> TokenWindows:
    """The windows of a data set: all, or those that a stream holds out; the stream is then put in `opened`."""
    if origin.get("stream"):
        n = origin.get("held_out_windows")
        if not n:
            raise UserError("held_out_windows: not given with a stream; needed how many windows it holds out")
        stream = open_stream(origin, lm)
        if opened is not None:
            opened[_name_of(origin)] = stream
        return stream.first(n)
    if not is_text(origin):
        return load_token_dataset(
            origin["dataset"], origin["n_ctx"], origin.get("max_tokens"), begin=begin, n_vocab=lm.n_vocab
        )
    texts, max_tokens = _texts(origin, lm), origin.get("max_tokens")
    documents: list[str] = []
    characters = 0
    wanted = None if max_tokens is None else CHARACTERS * max_tokens
    while True:
        more = _up_to(texts, None if wanted is None else wanted - characters)
        documents += more
        characters += sum(map(len, more))
        windows = tokenize(documents, lm.tokenizer, origin["n_ctx"], max_tokens, progress=progress, begin=begin)
        of_text = windows.tokens.numel() - len(begin) * len(windows.tokens)
        if max_tokens is None or not more or of_text + origin["n_ctx"] > max_tokens:
            return windows
        wanted = 2 * characters


def _texts(origin: dict[str, Any], lm: LanguageModel) -> Iterator[str]:
    """The texts of a data set, one after another."""
    rows = open_rows(origin["dataset"])
    chat = bool(origin.get("chat"))
    columns = choose_columns(rows.name, rows.columns, origin.get("text_column"), chat)
    to_tokens = RowTokens(lm.tokenizer, columns, chat)
    document = ""
    left_out = 0
    for chunk in read_on(rows, {}, columns, say):
        texts, bad = to_tokens.texts(chunk)
        for line in bad:
            left_out += 1
            tell_left_out(line, left_out, say)
        if not chunk.goes_on and document:
            yield document
            document = ""
        for number, text in enumerate(texts):
            if number and document:
                yield document
                document = ""
            document += text
    if document:
        yield document


def _up_to(texts: Iterator[str], characters: int | None) -> list[str]:
    """The next texts, until they have so many characters."""
    found: list[str] = []
    n = 0
    while characters is None or n < characters:
        text = next(texts, None)
        if text is None:
            break
        found.append(text)
        n += len(text)
    return found
