"""Training: what a run folder holds, resuming to the same bits after a kill at any moment, stopping."""

import json
import os
import signal
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import D_IN, Windows, config, lines, new_sae, same, timeless

from csae import ContextualSAE, TopKSAE
from csae.adam import Adam
from csae.checkpoint import last_checkpoint, load_sae
from csae.data.activations import ShardActivations, estimate_normalisation
from csae.data.batches import batch_of
from csae.errors import Stopped, UserError
from csae.sae import Sweeps
from csae.step import exact_gap, learning_rate, sweeps_at
from csae.train import train


@pytest.mark.parametrize("kind", ["topk", "contextual"])
def test_it_learns_and_leaves_a_run(kind, tmp_path):
    sae = new_sae(kind)
    train(sae, Windows(), range(12), tmp_path / "run", config(steps=60))
    figures = lines(tmp_path / "run")
    assert [line["step"] for line in figures] == list(range(60))
    assert figures[-1]["fvu"] < 0.5 * figures[0]["fvu"]
    assert figures[-1]["tokens"] == 60 * 3 * 7
    every = {"step", "tokens", "loss", "fvu", "aux", "l0", "dead", "lr", "tokens_per_s", "sae_tokens_per_s"}
    compared = {"fvu_exact", "gap"} if kind == "contextual" else set()
    assert [set(line) - every for line in figures] == [compared if s in (0, 59) else set() for s in range(60)]
    assert all(every <= set(line) for line in figures)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["README.md", "config.json", "metrics.jsonl", "model.safetensors", "run.json", "windows.bin"]
    assert same(sae, load_sae(tmp_path / "run"))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("stop_at", [1, 2, 4, 7, 11])
def test_stopped_and_resumed_it_ends_at_the_same_bits(stop_at, tmp_path):
    whole = new_sae()
    train(whole, Windows(), range(12), tmp_path / "whole", config())
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == stop_at else None)
    with pytest.raises(Stopped, match=f"stopped after step {stop_at} of 11; the same command goes on"):
        train(new_sae(), source, range(12), tmp_path / "parts", config())
    resumed = new_sae()
    train(resumed, Windows(), range(12), tmp_path / "parts", config())
    assert same(whole, resumed)
    without_speed = [[timeless(line) for line in lines(tmp_path / run)] for run in ("whole", "parts")]
    assert without_speed[0] == without_speed[1]


def test_a_line_cut_short_and_lines_after_the_checkpoint_are_done_again(tmp_path):
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 5 else None)
    with pytest.raises(Stopped):
        train(new_sae(), source, range(12), tmp_path, config())
    assert last_checkpoint(tmp_path).name == "checkpoint-5"
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5}) + "\n" + '{"step": 6, "lo')
    train(new_sae(), Windows(), range(12), tmp_path, config())
    assert [line["step"] for line in lines(tmp_path)] == list(range(11))


def test_a_finished_run_is_not_trained_again(tmp_path):
    sae = new_sae()
    train(sae, Windows(), range(12), tmp_path, config())
    again, source = new_sae(), Windows()
    train(again, source, range(12), tmp_path, config())
    assert source.reads == 0
    assert same(sae, again)
    assert not again.training


def test_an_unfinished_run_gives_its_last_checkpoint(tmp_path):
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None)
    stopped = new_sae()
    with pytest.raises(Stopped):
        train(stopped, source, range(12), tmp_path, config())
    assert same(stopped, load_sae(tmp_path))


def test_each_epoch_sees_each_window_once_in_an_order_of_its_own():
    windows, cfg = range(100, 112), config()
    epochs = [[w for step in range(4 * e, 4 * e + 4) for w in batch_of(windows, step, cfg)] for e in range(3)]
    assert all(sorted(epoch) == list(windows) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_of(windows, 2, cfg) == batch_of(windows, 2, cfg)
    assert batch_of(windows, 2, cfg) != batch_of(windows, 2, config(seed=1))


def test_learning_rate_rises_stays_and_falls():
    cfg = config(steps=100, lr=1.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[50] == rates[79] == 1.0
    assert rates[99] == pytest.approx(0.05)
    assert min(learning_rate(step, config(warmup=0, decay=0)) for step in range(11)) == 0.01


@torch.no_grad()
def test_the_gap_is_that_of_the_exact_form_to_the_sweeps(tmp_path):
    sae = new_sae()
    sae.W_O.mul_(20)
    batch = Windows().read(range(12))
    fvus = []
    for exact in (True, False):
        x, x_hat = (acts[batch.mask].double() for acts in (batch.acts, sae(*batch[:3], exact=exact).x_hat))
        fvus.append(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()))
    assert fvus[0] != fvus[1]
    assert exact_gap(sae, batch) == pytest.approx((fvus[0], fvus[0] / fvus[1] - 1))
    # As many sweeps as positions are the recurrence.
    assert exact_gap(sae, batch, Sweeps(7))[1] == pytest.approx(0, abs=1e-5)


def sweeps_of(cfg, sweeps, from_exact=False):
    """The sweeps of each step; None where they start elsewhere."""
    sae = ContextualSAE(D_IN, 12, 2, sweeps=sweeps)
    found = [sweeps_at(step, cfg, sae) for step in range(cfg.steps)]
    return [of.times if of.from_exact == from_exact else None for of in found]


def test_sweeps_are_fewer_before_the_decay(tmp_path):
    cfg = config(steps=10, decay=0.3, early_sweeps=2)
    assert sweeps_of(cfg, 3) == [2] * 7 + [3, 2, 3]
    assert sweeps_of(config(steps=4, decay=0), 3) == [1, 1, 1, 3]
    assert sweeps_of(cfg, 1) == [1] * 10
    assert set(sweeps_of(cfg, 0)) == {0}
    assert sweeps_of(cfg, 3, from_exact=True) == [None] * 10
    exact = config(steps=10, decay=0.3, early_sweeps=2, exact_from=0.8)
    assert sweeps_of(exact, 3) == [2] * 7 + [3, None, None]
    assert sweeps_of(exact, 3, from_exact=True) == [None] * 8 + [2, 2]
    seen = []

    class Watched(ContextualSAE):
        def gradients(self, *arguments):
            seen.append(arguments[-1].times)
            return super().gradients(*arguments)

    sae = Watched(D_IN, 12, 2, n_heads=2, d_head=3, d_value=3)
    sae.initialise(*estimate_normalisation(Windows())[:2])
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 5 else None)
    with pytest.raises(Stopped):
        train(sae, source, range(12), tmp_path, cfg)
    train(sae, Windows(), range(12), tmp_path, cfg)
    assert (seen, sae.sweeps) == ([2] * 7 + [3, 2, 3], 3)


def test_from_the_exact_codes_there_is_no_gap(tmp_path):
    cfg = config(steps=20, gap_every=1, exact_from=0.7)
    sae = new_sae()
    sae.W_O.data.mul_(20)
    train(sae, Windows(), range(12), tmp_path / "whole", cfg)
    gaps = [abs(line["gap"]) for line in lines(tmp_path / "whole")]
    assert min(gaps[:14]) > 1e-4
    assert max(gaps[14:]) < 1e-5
    assert sae.sweeps == 3

    resumed = new_sae()
    resumed.W_O.data.mul_(20)
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 16 else None)
    with pytest.raises(Stopped):
        train(resumed, source, range(12), tmp_path / "stopped", cfg)
    train(resumed, Windows(), range(12), tmp_path / "stopped", cfg)
    assert same(sae, resumed)


def test_the_look_back_trains_at_its_own_rate(tmp_path):
    before, frozen = new_sae(), new_sae()
    train(frozen, Windows(), range(12), tmp_path, config(look_back_lr=1e-12))
    moved = {
        name for name, tensor in frozen.named_parameters() if not torch.allclose(tensor, before.get_parameter(name))
    }
    assert moved == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_bfloat16_keeps_float32_parameters(tmp_path):
    sae = new_sae()
    train(sae, Windows(), range(12), tmp_path, config(precision="bfloat16"))
    assert all(parameter.dtype == torch.float32 for parameter in sae.parameters())
    assert lines(tmp_path)[-1]["fvu"] < 1


def test_dead_features_are_trained_by_aux(tmp_path):
    train(new_sae("topk"), Windows(), range(12), tmp_path, config(steps=40))
    assert any(line["dead"] > 0 and line["aux"] > 0 for line in lines(tmp_path))


class Changed(Windows):
    """Windows of which some are changed: by their number, what is done to (acts [T, d_in], mask [T]) in place."""

    def __init__(self, changes):
        super().__init__()
        self.changes = changes

    def read(self, window_indices):
        batch = super().read(window_indices)
        for row, window in enumerate(window_indices):
            if window in self.changes:
                self.changes[window](batch.acts[row], batch.mask[row])
        return batch


def nothing(acts, mask):
    mask.fill_(False)


def one_position(acts, mask):
    mask.fill_(False)
    mask[3] = True


def constant(acts, mask):
    acts.copy_(acts[3].clone().expand_as(acts))


def not_a_number(acts, mask):
    acts[3, 2] = float("nan")


def outlier(acts, mask):
    acts[3] = 1e22


@pytest.mark.parametrize("kind", ["topk", "contextual"])
@pytest.mark.parametrize("change", [nothing, one_position])
def test_a_step_with_nothing_to_learn_from_is_left_out(change, kind, tmp_path):
    cfg = config(steps=12, batch_windows=1)
    left_out = [step for step in range(12) if batch_of(range(12), step, cfg)[0] in (3, 5)]
    whole = new_sae(kind)
    train(whole, Changed({3: change, 5: change}), range(12), tmp_path / "whole", cfg)
    figures = lines(tmp_path / "whole")
    assert [line["step"] for line in figures if line["loss"] is None] == left_out
    assert all(line["fvu"] is line["aux"] is line["l0"] is None for line in figures if line["loss"] is None)
    assert all(tensor.isfinite().all() for tensor in whole.state_dict().values())
    source, parts = Changed({3: change, 5: change}), new_sae(kind)
    source.on_read = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == left_out[0] + 1 else None
    with pytest.raises(Stopped):
        train(parts, source, range(12), tmp_path / "parts", cfg)
    resumed = new_sae(kind)
    train(resumed, Changed({3: change, 5: change}), range(12), tmp_path / "parts", cfg)
    assert same(whole, resumed)


def test_beside_others_a_window_with_nothing_in_its_mask_is_as_if_it_were_not_there(tmp_path):
    one, other = new_sae(), new_sae()
    train(
        one, Changed(dict.fromkeys(range(4), nothing)), range(12), tmp_path / "one", config(steps=4, batch_windows=12)
    )
    train(other, Windows(), range(4, 12), tmp_path / "other", config(steps=4, batch_windows=8))
    for name, tensor in one.state_dict().items():
        if name != "tokens_since_fired":
            torch.testing.assert_close(tensor, other.state_dict()[name], msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_in_which_every_step_was_left_out_is_no_training(tmp_path):
    with pytest.raises(UserError, match="the mask lets no two positions of a step take part, in any of 11"):
        train(new_sae(), Changed(dict.fromkeys(range(12), nothing)), range(12), tmp_path, config())
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_a_number, "NaN or Inf in the activations of windows 3: make them again, or leave those windows out"),
        (constant, "all positions of windows 3 that take part have the same activations: leave those windows out"),
        (outlier, "activations as large as 1e+22 in windows 3, at a scale of"),
    ],
    ids=["NaN", "constant", "outlier"],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_a_smaller_learning_rate_does_not_mend_is_named(change, message, precision, tmp_path):
    with pytest.raises(UserError) as error:
        train(
            new_sae(), Changed({3: change}), range(12), tmp_path, config(steps=12, batch_windows=1, precision=precision)
        )
    assert message in str(error.value)
    assert "--lr" not in str(error.value)


def test_an_sae_that_is_not_finite_is_refused_before_it_trains(tmp_path):
    sae, source = new_sae(), Windows()
    sae.W_mem.data[2, 1] = float("inf")
    with pytest.raises(UserError, match="sae: W_mem holds NaN or Inf: initialise it"):
        train(sae, source, range(12), tmp_path, config())
    assert source.reads == 0


def test_a_loss_that_is_not_finite_before_the_first_step_is_not_that_of_the_learning_rate(tmp_path):
    sae = new_sae("topk")
    sae.W_dec.data.mul_(1e30)
    with pytest.raises(UserError, match="before the first step: initialise the SAE") as error:
        train(sae, Windows(), range(12), tmp_path, config())
    assert "--lr" not in str(error.value)


@pytest.mark.parametrize("at", [6, 11], ids=["before a checkpoint", "at the end"])
def test_a_step_that_diverges_does_not_take_the_place_of_the_last_checkpoint(at, tmp_path, monkeypatch):
    update = Adam.update

    def diverging(self, gradients):
        update(self, gradients)
        if next(iter(self.state.values()))["step"] == at:
            next(iter(self.state)).data.fill_(float("nan"))

    monkeypatch.setattr(Adam, "update", diverging)
    with pytest.raises(UserError, match="holds NaN or Inf: train again in another folder, with a smaller --lr"):
        train(new_sae("topk"), Windows(), range(12), tmp_path, config())
    assert last_checkpoint(tmp_path).name == f"checkpoint-{3 if at == 6 else 9}"
    assert all(tensor.isfinite().all() for tensor in load_sae(tmp_path).state_dict().values())


class Shards:
    def __init__(self, folder, acts):
        save_file({"activations": acts}, folder / "a.safetensors")
        self.source = ShardActivations(folder)


def test_nan_activations_are_refused_with_their_place(tmp_path):
    acts = torch.randn(12, 7, D_IN)
    acts[8, 3, 2] = float("nan")
    source = Shards(tmp_path, acts).source
    with pytest.raises(UserError, match=r"a\.safetensors, window 8: NaN or Inf") as error:
        train(new_sae(), source, range(12), tmp_path / "run", config())
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    sae = new_sae()

    def poison(count):
        if count == 5:
            with torch.no_grad():
                sae.W_enc.fill_(float("nan"))

    with pytest.raises(
        UserError, match=r"the loss is nan at step 4: train again in another folder, with a smaller --lr"
    ):
        train(sae, Windows(poison), range(12), tmp_path, config())
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert all(tensor.isfinite().all() for tensor in load_sae(tmp_path).state_dict().values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps: given 0; needed at least 1"),
        ({"batch_windows": 0}, "batch_windows: given 0; needed at least 1"),
        ({"lr": 0.0}, "lr: given 0.0; needed a positive number"),
        ({"look_back_lr": 0.0}, "look_back_lr: given 0.0; needed a positive number"),
        ({"lr": float("nan")}, "lr: given nan; needed a positive number"),
        ({"warmup": 0.9}, "warmup, decay: given 0.9 and 0.2"),
        ({"warmup": float("nan")}, "warmup, decay: given nan and 0.2; needed shares"),
        ({"decay": float("nan")}, "warmup, decay: given 0.05 and nan; needed shares"),
        ({"batch_windows": 2.5}, "batch_windows: given 2.5; needed a whole number, at least 1"),
        ({"steps": float("nan")}, "steps: given nan; needed a whole number, at least 1"),
        ({"seed": -1}, "seed: given -1; needed a whole number, 0 to 2^63 - 1"),
        ({"seed": 10**20}, "seed: given 100000000000000000000; needed a whole number, 0 to 2^63 - 1"),
        ({"precision": "float16"}, "precision: given 'float16'; needed one of 'float32', 'bfloat16'"),
        ({"moments": "float16"}, "moments: given 'float16'; needed one of 'float32', 'bfloat16'"),
        ({"exact_from": -0.1}, "exact_from: given -0.1; needed a share of the steps, 0 to 1 (never)"),
        ({"checkpoint_every": 0}, "checkpoint_every: given 0; needed at least 1"),
        ({"batch_windows": 13}, "batch_windows: given 13, but there are 12 windows to train on"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changed, message, tmp_path):
    with pytest.raises(UserError) as error:
        train(new_sae(), Windows(), range(12), tmp_path / "run", config(**changed))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="not empty, and no run of csae"):
        train(new_sae(), Windows(), range(12), tmp_path, config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_another_run_is_refused(tmp_path):
    train(new_sae(), Windows(), range(12), tmp_path, config())
    with pytest.raises(UserError, match=r"holds another run \(--lr: given 0.02, the run has 0.01\): give another"):
        train(new_sae(), Windows(), range(12), tmp_path, config(lr=0.02))


def test_a_truncated_checkpoint_is_refused(tmp_path):
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None)
    with pytest.raises(Stopped):
        train(new_sae(), source, range(12), tmp_path, config())
    file = tmp_path / "checkpoint-4" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="checkpoint-4: not a whole checkpoint of this run"):
        train(new_sae(), Windows(), range(12), tmp_path, config())


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 64 kB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_written_file(small_disk):
    torch.manual_seed(0)
    sae = TopKSAE(D_IN, 2000, 2)  # its checkpoint does not fit
    with pytest.raises(UserError, match="the disk is full: free some space, or choose another folder"):
        train(sae, Windows(), range(12), small_disk / "run", config())
    left = sorted(path.name for path in (small_disk / "run").iterdir())
    assert left == ["metrics.jsonl", "run.json", "windows.bin"]
