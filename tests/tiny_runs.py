"""Tiny runs: their windows, SAE and config, how they are stopped and finished, and what they refuse."""

import json
import os
import signal

import pytest
import torch

from csae import ContextualSAE, TopKSAE
from csae.checkpoint import load_sae
from csae.config import TrainConfig
from csae.data.activations import Batch, estimate_normalisation
from csae.errors import Stopped, UserError
from csae.train import train

D_IN = 6


class Windows:
    """12 windows of 7 positions with three directions in them; calls back at each read."""

    n_windows, n_ctx, d_in = 12, 7, D_IN

    def __init__(self, on_read=lambda count: None):
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(3, D_IN, generator=generator)
        strengths = torch.rand(12, 7, 3, generator=generator) * 3
        self.acts = strengths @ directions + 0.05 * torch.randn(12, 7, D_IN, generator=generator)
        self.reads, self.on_read = 0, on_read

    def read(self, window_indices):
        self.reads += 1
        self.on_read(self.reads)
        acts = self.acts[list(window_indices)]
        mask = torch.ones(acts.shape[:2], dtype=torch.bool)
        mask[:, 0] = False
        return Batch(acts, mask, torch.zeros(acts.shape[:2], dtype=torch.int64), None)

    def describe(self):
        return {"made": "in a test"}


def new_sae(kind="contextual", source=None):
    torch.manual_seed(0)
    if kind == "topk":
        sae = TopKSAE(D_IN, 12, 2, dead_after=50)
    elif kind == "jumprelu":
        sae = ContextualSAE(D_IN, 12, 2, n_heads=2, d_head=3, d_value=3, dead_after=50, selection="jumprelu")
    else:
        sae = ContextualSAE(D_IN, 12, 2, n_heads=2, d_head=3, d_value=3, dead_after=50)
    sae.initialise(*estimate_normalisation(source or Windows())[:2])
    return sae


def config(**changed):
    return TrainConfig(
        **({"steps": 11, "batch_windows": 3, "lr": 0.01, "checkpoint_every": 3, "log_every": 1} | changed)
    )


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(line):
    return {name: figure for name, figure in line.items() if not name.endswith("tokens_per_s")}


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def stopped(run, at=4, sae=None, **changed):
    """A run that was stopped after some steps."""
    source = Windows(lambda count: os.kill(os.getpid(), signal.SIGINT) if count == at else None)
    with pytest.raises(Stopped):
        train(sae or new_sae(), source, range(12), run, config(**changed))
    return run


def finish(run, **changed):
    sae = new_sae()
    train(sae, Windows(), range(12), run, config(**changed))
    return sae


def edit(file, **changed):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | changed).items() if v != "gone"}))


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(run, *do):
    """What each of `do` (by default: training on, and loading) says in one line."""
    found = []
    for call in do or (finish, load_sae):
        with pytest.raises(UserError) as error:
            call(run)
        found.append(str(error.value))
        assert "\n" not in found[-1]
        assert len(found[-1]) < 600
        assert str(run) in found[-1]
    return found


def everything(folder):
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }
