"""Batches of training from a stream of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch import Tensor

from csae.data.activations import ModelActivations
from csae.data.batches import Step
from csae.data.places import Place
from csae.data.stream import TokenStream
from csae.data.workers import Waiting

PATIENCE = 5.0  # seconds


class StreamBatches:
    """Windows of a stream, batch_windows a step, and what a model does on them: `csae.data.batches.Batches`.

    held_out: the model and places, with the windows that the stream leaves out, by which runs tell streams apart. The
    state of a step is that of the stream behind it.
    """

    n_windows = None  # they don't end

    def __init__(self, stream: TokenStream, held_out: ModelActivations, batch_windows: int) -> None:
        self.stream, self.held_out, self.batch_windows = stream, held_out, batch_windows
        self.n_ctx, self.places = stream.n_ctx, held_out.places

    def start(self, step: int, state: dict[str, Tensor] | None) -> Iterator[Step]:
        """The steps after `step` of them, see `Batches`. Each time that text is waited for, a step without batches."""
        with closing(self.stream.again(state)) as stream:
            while True:
                where = f"step {step} of {stream.rows.name}"
                try:
                    tokens, documents, special, _ = stream.take(self.batch_windows, PATIENCE)
                except Waiting:
                    yield Step({}, stream.state(), where)
                    continue
                self.held_out.lm.check_tokens(tokens)
                batches = self.held_out.batches(tokens, documents, special)
                yield Step(batches, stream.state(), where)
                step += 1

    def describe(self, place: Place) -> dict[str, Any]:
        return {**self.held_out.at(place).describe(), **self.stream.describe()}
