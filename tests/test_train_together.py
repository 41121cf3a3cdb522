"""Several SAEs trained on the same batches: each ends with the bits that it has alone, whatever stops them."""

import functools
import itertools
import os
import signal

import pytest
import torch
from tiny_runs import Windows, config, lines, new_sae, same, timeless

from csae import TopKSAE
from csae.adam import Adam
from csae.checkpoint import last_checkpoint, load_sae
from csae.data.activations import Place
from csae.data.background import ahead, ready_steps
from csae.data.batches import IndexedBatches, Step
from csae.errors import Stopped, UserError
from csae.train import Job, train, train_together

HERE, THERE = Place("resid.out:0"), Place("mlp.out:1")


class OnePlace(Windows):
    """Windows of one of two places: those of the second are others."""

    def __init__(self, place, on_read=lambda count: None):
        super().__init__(on_read)
        self.place = place
        if place == THERE:
            self.acts = self.acts.flip(-1) * 3

    def describe(self):
        return {"made": "in a test", "hook": self.place.hook}


class TwoPlaces:
    """Windows of both places, from one read."""

    places = (HERE, THERE)
    n_windows, n_ctx = Windows.n_windows, Windows.n_ctx

    def __init__(self, on_read=lambda count: None):
        self.reads, self.on_read = 0, on_read

    def at(self, place):
        return OnePlace(place)

    def read_all(self, window_indices):
        self.reads += 1
        self.on_read(self.reads)
        return {place: OnePlace(place).read(window_indices) for place in self.places}


CASES = {
    "here-topk": (HERE, "topk", {}),
    "here-contextual": (HERE, "contextual", {"lr": 0.005, "checkpoint_every": 4}),
    "there-topk": (THERE, "topk", {"log_every": 4}),
}


def jobs(folder, **changed):
    return [
        Job(new_sae(kind, OnePlace(place)), folder / name, config(**(own | changed)), None, place)
        for name, (place, kind, own) in CASES.items()
    ]


def together(folder, source=None, **changed):
    made = jobs(folder, **changed)
    train_together(made, IndexedBatches(source or TwoPlaces(), range(12), config(**changed)))
    return [job.sae for job in made]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    made = jobs(folder)
    for job in made:
        train(job.sae, OnePlace(job.place), range(12), job.run, job.config)
    return folder, [job.sae for job in made]


def check(folder, saes, alone):
    for name, one, other in zip(CASES, saes, alone[1], strict=True):
        assert same(one, other), name
        assert same(one, load_sae(folder / name)), name
        assert [*map(timeless, lines(folder / name))] == [*map(timeless, lines(alone[0] / name))], name
        for file in ("run.json", "windows.bin", "config.json"):
            assert (folder / name / file).read_bytes() == (alone[0] / name / file).read_bytes(), (name, file)
        assert {path.name for path in (folder / name).iterdir()} == {path.name for path in (alone[0] / name).iterdir()}


def test_each_ends_with_the_bits_that_it_has_alone_and_a_batch_is_read_once(alone, tmp_path):
    source = TwoPlaces()
    check(tmp_path, together(tmp_path, source), alone)
    assert source.reads == 11


@pytest.mark.parametrize("stop_at", [1, 3, 6, 7])
def test_stopped_and_resumed_all_end_at_the_same_bits(stop_at, alone, tmp_path):
    source = TwoPlaces(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == stop_at else None)
    with pytest.raises(Stopped, match=f"3 SAEs in .*: stopped after step {stop_at} of 11"):
        together(tmp_path, source)
    assert {last_checkpoint(tmp_path / name).name for name in CASES} == {f"checkpoint-{stop_at}"}
    check(tmp_path, together(tmp_path), alone)


def test_those_that_are_ahead_wait_for_the_others(alone, tmp_path):
    first, second, third = jobs(tmp_path)
    train(first.sae, OnePlace(HERE), range(12), first.run, first.config)  # to its end
    stopped = OnePlace(HERE, lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 7 else None)
    with pytest.raises(Stopped):
        train(second.sae, stopped, range(12), second.run, second.config)
    # The third has not begun.
    source = TwoPlaces(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 5 else None)
    with pytest.raises(Stopped):
        together(tmp_path, source)
    assert last_checkpoint(second.run).name == "checkpoint-7"
    assert last_checkpoint(third.run).name == "checkpoint-5"
    source = TwoPlaces()
    check(tmp_path, together(tmp_path, source), alone)
    assert source.reads == 6
    again = TwoPlaces()
    check(tmp_path, together(tmp_path, again), alone)
    assert again.reads == 0


def test_where_one_fails_it_is_named_and_the_others_get_a_checkpoint(alone, tmp_path, monkeypatch):
    made = jobs(tmp_path)
    update = Adam.update

    def diverging(self, gradients):
        update(self, gradients)
        if self.sae is made[1].sae and next(iter(self.state.values()))["step"] == 5:
            self.sae.W_dec.data.fill_(float("nan"))

    monkeypatch.setattr(Adam, "update", diverging)
    with pytest.raises(UserError) as error:
        train_together(made, IndexedBatches(TwoPlaces(), range(12), config()))
    assert str(error.value).startswith(f"{tmp_path / 'here-contextual'}: the loss is nan at step 5: train again in")
    assert str(error.value).endswith("(the other 2 of 3 SAEs go on from step 6 by the same command)")
    steps = [last_checkpoint(tmp_path / name).name for name in CASES]
    assert steps == ["checkpoint-6", "checkpoint-4", "checkpoint-6"]
    monkeypatch.undo()
    check(tmp_path, together(tmp_path), alone)


def test_an_error_that_is_no_users_leaves_checkpoints_too(alone, tmp_path, monkeypatch):
    def broken(sae):
        raise MemoryError("no more")

    made = jobs(tmp_path)
    track = TopKSAE.track
    count = itertools.count()
    monkeypatch.setattr(TopKSAE, "track", lambda sae, *given: broken(sae) if next(count) == 9 else track(sae, *given))
    with pytest.raises(MemoryError) as error:
        train_together(made, IndexedBatches(TwoPlaces(), range(12), config()))
    assert error.value.__notes__ == [f"(in the training of {tmp_path / 'there-topk'})"]
    steps = [last_checkpoint(tmp_path / name).name for name in CASES]
    assert steps == ["checkpoint-5", "checkpoint-5", "checkpoint-3"]
    monkeypatch.undo()
    check(tmp_path, together(tmp_path), alone)


def test_where_the_data_fail_all_get_a_checkpoint(alone, tmp_path):
    def fail(count):
        if count == 6:
            raise UserError("the connection was lost")

    with pytest.raises(UserError, match="the connection was lost"):
        together(tmp_path, TwoPlaces(fail))
    assert {last_checkpoint(tmp_path / name).name for name in CASES} == {"checkpoint-5"}
    check(tmp_path, together(tmp_path), alone)


def test_data_that_end_are_one_line_and_a_checkpoint(tmp_path):
    batches = IndexedBatches(TwoPlaces(), range(12), config())
    endless = batches.start
    batches.start = lambda step, state: itertools.islice(endless(step, state), 5 - step)
    with pytest.raises(UserError, match="the data end before step 5 of 11: give more, or fewer --tokens"):
        train_together(jobs(tmp_path), batches)
    assert last_checkpoint(tmp_path / "here-topk").name == "checkpoint-5"


class Stream:
    """Batches whose state is a tensor, and without it there is no going on."""

    places, n_ctx, n_windows = (HERE,), Windows.n_ctx, None

    def __init__(self, on_read=lambda count: None):
        self.source = Windows(on_read)

    def describe(self, place):
        return {"stream": True}

    def start(self, step, state):
        at = torch.zeros(1, dtype=torch.int64) if state is None else state["at"]
        assert (step == 0) == (state is None)
        while True:
            windows = [(int(at) + i) % 12 for i in range(3)]
            at = at + 5
            yield Step({HERE: self.source.read(windows)}, {"at": at}, f"text {int(at)}")


def test_the_state_of_a_stream_is_in_the_checkpoint(tmp_path):
    whole, parts, extended = new_sae("topk"), new_sae("topk"), new_sae("topk")
    train_together([Job(whole, tmp_path / "whole", config())], Stream())
    stream = Stream(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None)
    with pytest.raises(Stopped):
        train_together([Job(parts, tmp_path / "parts", config())], stream)
    train_together([Job(parts, tmp_path / "parts", config())], Stream())
    assert same(whole, parts)
    # A run that has ended goes on in the text where it was.
    reads = []
    stream = Stream()
    read = stream.source.read
    stream.source.read = lambda windows: reads.append(windows) or read(windows)
    train_together([Job(extended, tmp_path / "whole", config(steps=13))], stream)
    assert reads == [[55 % 12, 56 % 12, 57 % 12], [60 % 12, 61 % 12, 62 % 12]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 12}, r"steps: given \[11, 12\]; needed the same for all SAEs"),
        ({"seed": 1}, r"seed: given \[0, 1\]; needed the same"),
    ],
)
def test_jobs_that_cannot_share_batches_are_refused(changed, message, tmp_path):
    made = jobs(tmp_path)
    made[1].config = config(**changed)
    with pytest.raises(UserError, match=message):
        train_together(made, IndexedBatches(TwoPlaces(), range(12), config()))
    assert not list(tmp_path.iterdir())


def test_two_saes_in_one_folder_and_a_place_that_is_not_there_are_refused(tmp_path):
    batches = IndexedBatches(TwoPlaces(), range(12), config())
    made = jobs(tmp_path)
    made[1].run = made[0].run
    with pytest.raises(UserError, match="given for two SAEs; needed a folder for each"):
        train_together(made, batches)
    made = jobs(tmp_path)
    made[1].place = Place("elsewhere")
    with pytest.raises(UserError, match="place: given"):
        train_together(made, batches)
    made[1].place = None
    with pytest.raises(UserError, match="place: not given"):
        train_together(made, batches)
    assert not list(tmp_path.iterdir())


# Lines of metrics, each of several steps.


@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_a_line_is_the_mean_of_its_steps_and_a_stop_between_two_lines_changes_nothing(stop_at, tmp_path):
    each, whole, parts = (new_sae("topk") for _ in range(3))
    train(each, Windows(), range(12), tmp_path / "each", config(steps=10))
    train(whole, Windows(), range(12), tmp_path / "whole", config(steps=10, log_every=3))
    found, single = lines(tmp_path / "whole"), lines(tmp_path / "each")
    assert [line["step"] for line in found] == [2, 5, 8, 9]
    assert found[0]["loss"] == pytest.approx(sum(line["loss"] for line in single[:3]) / 3)
    assert found[0]["tokens"] == 3 * 3 * 7
    assert any(line["dead"] > 0 for line in found[1:])  # not before the fourth step
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == stop_at else None)
    with pytest.raises(Stopped):
        train(parts, source, range(12), tmp_path / "parts", config(steps=10, log_every=3))
    parts = new_sae("topk")
    train(parts, Windows(), range(12), tmp_path / "parts", config(steps=10, log_every=3))
    assert same(whole, parts)
    assert [*map(timeless, lines(tmp_path / "parts"))] == [*map(timeless, found)]


def test_a_loss_that_is_not_finite_is_that_of_its_step(tmp_path, monkeypatch):
    update = Adam.update

    def diverging(self, gradients):
        update(self, gradients)
        if next(iter(self.state.values()))["step"] == 5:
            self.sae.W_dec.data.fill_(float("nan"))

    monkeypatch.setattr(Adam, "update", diverging)
    with pytest.raises(UserError, match="the loss is nan at step 5: train again in another folder"):
        train(new_sae("topk"), Windows(), range(12), tmp_path, config(log_every=8))


def test_a_batch_that_cannot_be_learnt_is_named_though_others_came_after(tmp_path):
    source = Windows()
    source.acts[3] = 2.0
    with pytest.raises(UserError, match="all positions of windows 3 that take part have the same activations"):
        train(new_sae("topk"), source, range(12), tmp_path, config(steps=12, batch_windows=1, log_every=12))


def test_no_number_is_read_from_the_device_between_two_lines(tmp_path):
    """On a GPU each of these would wait until all that was asked for before is done."""
    asked = ("aten::item", "aten::nonzero")
    # The CPU's kernels, which read numbers that are on the CPU. On a GPU theirs stay there.
    kernels = ("aten::_fused_adam_", "csae::adam_rows")

    def is_of_a_kernel(event):
        while event is not None and event.name not in kernels:
            event = event.cpu_parent
        return event is not None

    def counted(log_every, steps):
        sae, cfg = new_sae("topk"), config(steps=steps, log_every=log_every, checkpoint_every=1000)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train(sae, Windows(), range(12), tmp_path / f"{log_every}-{steps}", cfg)
        return sum(event.name in asked and not is_of_a_kernel(event) for event in profile.events())

    assert counted(15, 30) == counted(30, 60), "two lines each, of 15 steps and of 30"
    assert counted(1, 30) > counted(15, 30)


# In the background.


def test_in_the_background_the_bits_are_the_same(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("csae.train.ready_steps", functools.partial(ready_steps, in_background=True))
    source = TwoPlaces(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 6 else None)
    with pytest.raises(Stopped):
        together(tmp_path, source)
    check(tmp_path, together(tmp_path), alone)


def test_a_failure_in_the_background_comes_after_the_steps_before_it(tmp_path, monkeypatch):
    def fail(count):
        if count == 6:
            raise UserError("the connection was lost")

    monkeypatch.setattr("csae.train.ready_steps", functools.partial(ready_steps, in_background=True))
    with pytest.raises(UserError, match="the connection was lost"):
        together(tmp_path, TwoPlaces(fail))
    assert last_checkpoint(tmp_path / "here-topk").name == "checkpoint-5"


def test_no_more_is_made_ahead_than_asked_for_and_the_order_is_kept():
    made = []

    def numbers():
        for number in range(100):
            made.append(number)
            yield number

    with ahead(numbers(), 2) as given:
        for expected in range(20):
            assert next(given) == expected
            assert len(made) <= expected + 1 + 3  # two that wait, and one in the making
    assert len(made) < 30


def test_leaving_early_closes_the_source_in_its_thread():
    closed = []

    def numbers():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    with ahead(numbers(), 2) as given:
        assert next(given) == 0
    assert closed == [True]
    with ahead(iter([1, 2]), 2) as given:
        assert list(given) == [1, 2]
