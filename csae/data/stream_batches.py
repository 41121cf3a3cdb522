"""Batches of training from a stream of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch import Tensor

from csae.data.activations import Batch, ModelActivations
from csae.data.batches import Step
from csae.data.places import Place
from csae.data.share import Share, filled
from csae.data.stream import TokenStream
from csae.data.workers import Waiting

PATIENCE = 5.0  # seconds


class StreamBatches:
    """Windows of a stream, batch_windows a step, and what a model does on them: `csae.data.batches.Batches`.

    held_out: the model and places, with the windows that the stream leaves out, by which runs tell streams apart.
    share: the rank and the number of ranks (`csae.data.share`): each reads the whole text, and runs the model on its
    own windows. The state of a step is that of the stream behind it, the same on all ranks.
    """

    n_windows = None  # they don't end

    def __init__(
        self, stream: TokenStream, held_out: ModelActivations, batch_windows: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.stream, self.held_out, self.batch_windows, self.share = stream, held_out, batch_windows, Share(*share)
        self.n_ctx, self.places = stream.n_ctx, held_out.places

    def start(self, step: int, state: dict[str, Tensor] | None) -> Iterator[Step]:
        """The steps after `step` of them, see `Batches`. Each time that text is waited for, a step without batches."""
        padding = self.share.padding(self.batch_windows)
        with closing(self.stream.again(state)) as stream:
            while True:
                where = f"step {step} of {stream.rows.name}"
                try:
                    tokens, documents, special, _ = stream.take(self.batch_windows, PATIENCE)
                except Waiting:
                    yield Step({}, stream.state(), where)
                    continue
                self.held_out.lm.check_tokens(tokens)  # all of them, so that all ranks notice
                yield Step(self._run(tokens, documents, special), stream.state(), where, padding)
                step += 1

    def _run(self, tokens: Tensor, documents: Tensor, special: Tensor | None) -> dict[Place, Batch]:
        """What the model does on this rank's windows of a step, [batch_windows, n_ctx]."""
        own, n = self.share.to_read(len(tokens)), self.share.windows(len(tokens))
        rows = slice(own.start, own.stop)
        found = self.held_out.batches(tokens[rows], documents[rows], None if special is None else special[rows])
        return {place: filled(batch, n - self.share.padding(len(tokens)), n) for place, batch in found.items()}

    def describe(self, place: Place) -> dict[str, Any]:
        return {**self.held_out.at(place).describe(), **self.stream.describe()}
