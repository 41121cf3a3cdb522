"""The share of a batch that a rank reads: together all ranks have the batch of one device, in its order."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from streams import as_rows, texts_of, write_lines

from csae.config import TrainConfig
from csae.data.activations import Batch, ModelActivations
from csae.data.background import ready_steps
from csae.data.batches import SOMEWHERE, Batches, IndexedBatches, Step
from csae.data.language_model import LanguageModel
from csae.data.places import Place
from csae.data.raw_text import open_stream_batches, windows_of_dataset
from csae.data.share import Share

HOOK = Place("resid.out:0")


class Windows:
    """Windows of 4 positions, whose activations are their number."""

    n_windows, n_ctx, d_in, d_out = 23, 4, 3, 2

    def __init__(self, with_tokens: bool) -> None:
        self.with_tokens = with_tokens

    def read(self, window_indices: object) -> Batch:
        number = torch.tensor(list(window_indices))  # type: ignore[call-overload]
        acts = number.float().add(1).view(-1, 1, 1).expand(-1, 4, 3).contiguous()
        mask = torch.ones(len(acts), 4, dtype=torch.bool)
        tokens = number.view(-1, 1).expand(-1, 4) if self.with_tokens else None
        return Batch(acts, mask, mask.long(), tokens, acts[..., :2].neg())

    def describe(self) -> dict[str, object]:
        return {}


@pytest.mark.parametrize("n", [1, 3, 4, 8, 23])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_the_whole_in_order(n: int, size: int) -> None:
    shares = [Share(rank, size) for rank in range(size)]
    assert [at for share in shares for at in share.of(n)] == list(range(n))
    for share in shares:
        assert len(share.of(n)) + share.padding(n) == share.windows(n) == -(-n // size)
        assert set(share.to_read(n)) <= set(range(n))
        assert share.to_read(n)


def together(parts: list[Step], place: Place) -> Batch:
    """The batch that the ranks have together. Their shapes are equal, and what fills them up is zero."""
    assert len({part.batches[place].acts.shape for part in parts}) == 1
    for part in parts:
        for tensor in part.batches[place]:
            assert tensor is None or not tensor[len(tensor) - part.padding :].any()
    own = [[t if t is None else t[: len(t) - p.padding] for t in p.batches[place]] for p in parts]
    columns = zip(*own, strict=True)
    return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))


def check(whole: Batches, shares: list[Batches], place: Place, exact: bool) -> None:
    parts = zip(*(part.start(0, None) for part in shares), strict=True)
    for step, of_ranks in islice(zip(whole.start(0, None), parts, strict=True), 9):
        found, expected = together(list(of_ranks), place), step.batches[place]
        for one, other in zip(found, expected, strict=True):
            if other is None:
                assert one is None
            elif exact or not other.is_floating_point():
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other)
        for of_rank in of_ranks:
            assert (of_rank.state is None) == (step.state is None)
            for name, part in (step.state or {}).items():
                assert torch.equal(part, of_rank.state[name])


@pytest.mark.parametrize(("batch_windows", "size"), [(4, 2), (4, 3), (5, 4), (2, 4), (1, 3)])
@pytest.mark.parametrize("with_tokens", [True, False])
def test_ranks_have_together_the_batch_of_one_device(batch_windows: int, size: int, with_tokens: bool) -> None:
    config = TrainConfig(steps=20, batch_windows=batch_windows)
    source = Windows(with_tokens)
    whole = IndexedBatches(source, range(23), config)
    shares = [IndexedBatches(source, range(23), config, (rank, size)) for rank in range(size)]
    check(whole, list(shares), SOMEWHERE, exact=True)
    device = torch.device("cpu")
    with ready_steps(whole, 0, 6, None, device, {SOMEWHERE}) as expected:
        wanted = [(ready.hashes[SOMEWHERE], ready.positions[SOMEWHERE]) for ready in expected]
    found = []
    for share in shares:
        with ready_steps(share, 0, 6, None, device, {SOMEWHERE}) as steps:
            found.append([(ready.hashes[SOMEWHERE], ready.positions[SOMEWHERE]) for ready in steps])
    for ((hashes, of_tokens), positions), *of_ranks in zip(wanted, *found, strict=True):
        assert b"".join(part for (part, _), _ in of_ranks) == hashes
        assert all(kind == of_tokens for (_, kind), _ in of_ranks)
        assert sum(count for _, count in of_ranks) == positions


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_have_together_the_batch_of_a_stream(tiny_lm: LanguageModel, tmp_path: Path, size: int) -> None:
    lines = write_lines(tmp_path / "a.jsonl", as_rows(texts_of(300)))
    origin = {"dataset": str(lines), "n_ctx": 16, "stream": True, "held_out_windows": 4, "shuffle": 10}
    held_out = ModelActivations(tiny_lm, [HOOK], windows_of_dataset(origin, tiny_lm, ()))
    whole, _ = open_stream_batches(origin, held_out, 3, 0)
    shares = [open_stream_batches(origin, held_out, 3, 0, (rank, size))[0] for rank in range(size)]
    check(whole, list(shares), HOOK, exact=False)


def test_only_rank_0_tells_of_the_text(
    tiny_lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", as_rows(texts_of(40)))
    origin = {"dataset": str(lines), "n_ctx": 16, "stream": True, "held_out_windows": 4, "shuffle": 10}
    held_out = ModelActivations(tiny_lm, [HOOK], windows_of_dataset(origin, tiny_lm, ()))
    for rank in range(2):
        batches, _ = open_stream_batches(origin, held_out, 64, 0, (rank, 2))
        for _ in islice(batches.start(0, None), 12):
            pass
    assert capsys.readouterr().err.count("begins again") == 1
