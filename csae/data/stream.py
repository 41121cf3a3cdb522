"""Windows of tokens from text without end: tokenized as it is read, packed, and shuffled, in bounded memory.

What a stream gives is exact: the same data set and settings give the same windows in the same order, whatever the
number of processes, and from a state on what an unbroken stream would have given. Its state is a few tensors: the
position in the data set, the text that no window has yet, and the shuffled windows.

A data set that ends begins again, with a line that says so. Rows that can't be used are left out and counted.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csae.data.packing import Packing, Text, TokenWindows
from csae.data.retrying import read_on
from csae.data.row_tokens import RowTokens, Tokenized, tell_left_out
from csae.data.rows import Chunk, Rows
from csae.data.shuffling import WindowBuffer
from csae.data.workers import InOrder, Waiting
from csae.errors import UserError
from csae.progress import say

SHUFFLED = 1024
HOPELESS = 1000  # rows without one that can be used
PARTS = Text._fields


class TokenStream:
    """An endless stream of windows of n_ctx tokens.

    rows: the data set. to_tokens: makes their token ids. begin: tokens that each window begins with (`Packing`).
    held_out: so many windows, the first of the data set, are left out of the stream; `first` reads them. shuffle: how
    many windows are shuffled among each other; 1 for the order of the data set. workers: processes that tokenize, 0 for
    a thread of this one. say: gets lines about rows left out, a lost connection, the end of the data set.
    """

    def __init__(
        self,
        rows: Rows,
        to_tokens: RowTokens,
        n_ctx: int,
        begin: Sequence[int] = (),
        held_out: int = 0,
        shuffle: int = SHUFFLED,
        seed: int = 0,
        workers: int = 1,
        say: Callable[[str], None] = say,
    ) -> None:
        least_of = {"shuffle": (shuffle, 1), "held_out": (held_out, 0), "workers": (workers, 0), "seed": (seed, 0)}
        for name, (value, least) in least_of.items():
            if value < least:
                raise UserError(f"{name}: given {value}; needed {least} or more")
        self.rows, self.to_tokens, self.n_ctx, self.begin = rows, to_tokens, n_ctx, tuple(begin)
        self.held_out, self.shuffle, self.seed, self.workers, self.say = held_out, shuffle, seed, workers, say
        self._packing = Packing(n_ctx, begin)
        self._buffer = WindowBuffer(shuffle, n_ctx, seed)
        self._ready = Text.empty(0, n_ctx)  # windows that are packed and not yet in the buffer
        self._position: dict[str, Any] = {}
        self._to_leave = held_out
        self.counts = {"round": 0, "rows": 0, "bad_rows": 0, "tokens": 0, "useless": 0, "windows": 0}
        self._work: InOrder[Chunk, Tokenized] | None = None
        self._beginning: dict[str, Tokenized] = {}  # what `first` read, by the position before it
        self._ahead: deque[Tokenized] = deque()

    def take(self, n: int, patience: float | None = None) -> TokenWindows:
        """The next n windows.

        patience: seconds. Raises Waiting where the next rows take longer; then nothing is lost, and the next call goes
        on. Raises UserError where the data set can't be read, or does not fill a window.
        """
        self._fill_buffer(patience)
        while len(self._ready.tokens) < n:
            self._read(patience)
        # From here on nothing fails, so that no window is lost.
        out = Text.empty(n, self.n_ctx)
        for row in range(n):
            self._buffer.swap(Text(*(part[row] for part in self._ready)), out, row)
        self._ready = Text(*(part[n:] for part in self._ready))
        return out.as_windows(self.begin)

    def first(self, n: int) -> TokenWindows:
        """The first n windows of the data set, in its order; fewer where it has no more. The stream stays as it is.

        What was tokenized for them is kept until a stream begins with it: this one, one made by `again`, or one that
        `begins_as` this one.

        Raises UserError where the data set can't be read, or no row of its first HOPELESS can be used.
        """
        packing = Packing(self.n_ctx, self.begin)
        found = [Text.empty(0, self.n_ctx)]
        useless = n_bad = 0
        bad = ""
        for tokenized in self._from_the_first():
            useless = check_useful(tokenized, useless)
            n_bad, bad = n_bad + len(tokenized.bad), (tokenized.bad or [bad])[-1]
            add_rows(packing, tokenized)
            found.append(packing.cut())
            if sum(len(part.tokens) for part in found) >= n:
                break
        else:
            found.append(packing.cut(at_end=True))
            if bad and not any(len(part.tokens) for part in found):
                self.say(f"{bad}: left out" + (f", as the last of {n_bad:,} rows" if n_bad > 1 else ""))
        return Text(*(np.concatenate(parts)[:n] for parts in zip(*found, strict=True))).as_windows(self.begin)

    def state(self) -> dict[str, Tensor]:
        """Where the stream is, on the CPU: what `restore` needs. It stays as it is while the stream goes on."""
        about = {
            "position": self._position,
            "to_leave": self._to_leave,
            "counts": self.counts,
            "documents": self._packing.n_documents,
            "size": self._buffer.size,
            "generator": self._buffer.generator.bit_generator.state,
        }
        state = {"about": torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}
        held = Text(*(part[: self._buffer.held] for part in self._buffer.windows))
        for name, text in (("rest", self._packing.rest()), ("ready", self._ready), ("shuffled", held)):
            for part, array in zip(PARTS, text, strict=True):
                # The buffer changes in place; and a view would keep alive what it is cut from.
                state[f"{name}.{part}"] = torch.from_numpy(array.copy())
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state` says. Raises UserError where it is of another stream."""
        self.close()
        try:
            about = json.loads(state["about"].numpy().tobytes())
            texts = {
                name: Text(*(state[f"{name}.{part}"].numpy().copy() for part in PARTS))
                for name in ("rest", "ready", "shuffled")
            }
            for name in ("ready", "shuffled"):
                if texts[name].tokens.shape[1:] != (self.n_ctx,):
                    raise ValueError(f"windows of {texts[name].tokens.shape[1:]}")
            buffer = WindowBuffer(about["size"], self.n_ctx, self.seed)
            buffer.generator.bit_generator.state = about["generator"]
            buffer.held = len(texts["shuffled"].tokens)
            for held, part in zip(buffer.windows, texts["shuffled"], strict=True):
                held[: buffer.held] = part
            self._position, self._to_leave, self.counts = about["position"], about["to_leave"], about["counts"]
            self._packing.restore(texts["rest"], about["documents"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self.rows.name}: the state in the checkpoint is not of this stream ({error})") from error
        self._buffer, self._ready = buffer, texts["ready"]

    def again(self, state: dict[str, Tensor] | None = None) -> TokenStream:
        """Another stream of the same windows, from a state on, or from the beginning."""
        how = {"held_out": self.held_out, "shuffle": self.shuffle, "seed": self.seed, "workers": self.workers}
        other = TokenStream(self.rows, self.to_tokens, self.n_ctx, self.begin, say=self.say, **how)
        other.begins_as(self)
        if state is not None:
            other.restore(state)
        return other

    def begins_as(self, other: TokenStream) -> None:
        """Share what `first` of a stream of the same data set and tokenizer read, so that it is tokenized once."""
        self._beginning = other._beginning

    def close(self) -> None:
        """Stop reading ahead; the processes end. The stream can go on nevertheless."""
        self._ahead.clear()
        if self._work is not None:
            self._work.close()
            self._work = None

    def describe(self) -> dict[str, Any]:
        """What the stream is, as JSON: enough to see whether two give the same windows."""
        return {
            "stream": True,
            "columns": list(self.to_tokens.columns),
            **({"chat": True} if self.to_tokens.chat else {}),
            "shuffle": self.shuffle,
            "shuffle_seed": self.seed,
            **self.rows.describe(),
        }

    def _from_the_first(self) -> Iterator[Tokenized]:
        """The data set from its first row on."""
        position: dict[str, Any] = {}
        for known in self._known_from(position):
            position = known.after
            yield known
        for chunk in read_on(self.rows, position, self.to_tokens.columns, self.say):
            tokenized = self._beginning[_key(position)] = self.to_tokens(chunk)
            position = tokenized.after
            yield tokenized

    def _known_from(self, position: dict[str, Any]) -> list[Tokenized]:
        """What `first` has read from a position on."""
        found: list[Tokenized] = []
        while (known := self._beginning.get(_key(position))) is not None:
            found.append(known)
            position = known.after
        return found

    def _fill_buffer(self, patience: float | None) -> None:
        """Fill the buffer. Of a data set with fewer windows it holds each once."""
        while not self._buffer.is_full:
            ended = not len(self._ready.tokens) and self._read(patience)
            n = self._buffer.fill(self._ready)
            self._ready = Text(*(part[n:] for part in self._ready))
            if ended and not self._buffer.is_full:
                self._buffer.stop_filling()

    def _read(self, patience: float | None) -> bool:
        """Pack one more chunk of rows; True where there was none, and the data set begins again."""
        if self._work is None:
            self._ahead.extend(self._known_from(self._position))
            self._beginning.clear()
            position = self._ahead[-1].after if self._ahead else self._position
            chunks = read_on(self.rows, position, self.to_tokens.columns, self.say)
            self._work = InOrder(self.to_tokens, chunks, self.workers)
        try:
            found = self._ahead.popleft() if self._ahead else self._work.get(patience)
        except Waiting:
            raise
        except BaseException:
            self.close()
            raise
        if found is None:
            self._pack(at_end=True)
            self._begin_again()
            return True
        add_rows(self._packing, found)
        self._position = found.after
        self._count(found)
        self._pack()
        return False

    def _pack(self, at_end: bool = False) -> None:
        windows = self._packing.cut(at_end)
        left = min(self._to_leave, len(windows.tokens))
        self._to_leave -= left
        self.counts["windows"] += len(windows.tokens) - left
        new = Text(*(part[left:] for part in windows))
        if len(self._ready.tokens):
            new = Text(*(np.concatenate(parts) for parts in zip(self._ready, new, strict=True)))
        self._ready = new

    def _begin_again(self) -> None:
        counts = self.counts
        if not counts["windows"]:
            raise UserError(
                f"{self.rows.name}: its text is {counts['tokens']} tokens long: too short for {self.held_out} windows "
                f"of {self.n_ctx} to hold out and one to train on: give more text, or a lower --n-ctx"
            )
        if not counts["round"]:
            self.say(f"{self.rows.name}: ended after {counts['tokens']:,} tokens; begins again")
        counts["round"] += 1
        self.close()
        self._packing = Packing(self.n_ctx, self.begin)
        self._position, self._to_leave = {}, self.held_out

    def _count(self, found: Tokenized) -> None:
        counts = self.counts
        counts["rows"] += found.n_rows
        counts["tokens"] += len(found.tokens)
        if not counts["round"]:  # else all of it was told
            for line in found.bad:
                counts["bad_rows"] += 1
                tell_left_out(line, counts["bad_rows"], self.say)
        counts["useless"] = check_useful(found, counts["useless"])


def _key(position: dict[str, Any]) -> str:
    return json.dumps(position, sort_keys=True)


def check_useful(found: Tokenized, useless: int) -> int:
    """How many rows in a row give no text, after `useless` of them. Raises UserError where they are too many."""
    useless = 0 if found.lengths else useless + found.n_rows
    if useless >= HOPELESS and found.bad:
        raise UserError(f"{found.bad[-1]}; none of the last {useless:,} rows can be used: check the data set")
    return useless


def add_rows(packing: Packing, found: Tokenized) -> None:
    """Give the documents of a chunk to a packing."""
    start = 0
    if not found.lengths and not found.goes_on:
        packing.add(found.tokens)  # what goes on from here is no part of the document before
    for number, length in enumerate(found.lengths):
        part = slice(start, start + length)
        special = None if found.special is None else found.special[part]
        packing.add(found.tokens[part], special, goes_on=found.goes_on and number == 0)
        start += length
