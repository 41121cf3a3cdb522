"""One step of training: from a batch to the SAE's next parameters. No number is read from the device.

A step is a function of the parameters, the optimizer's state, the dead features and the step's number alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from csae.adam import Adam
from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import Batch
from csae.dead_rows import Dead, pad
from csae.graphs import Graphs, Inputs
from csae.losses import fraction_unexplained, here
from csae.sae import SAE, Losses, Sweeps


def train_step(
    sae: SAE,
    optimizer: Adam,
    batch: Batch,
    step: int,
    config: TrainConfig,
    dead: Tensor | None = None,
    graphs: Graphs | None = None,
) -> tuple[Losses, Tensor]:
    """Step number `step` of training, on a batch; gives the losses before it, and the dead features [n_dead].

    dead: those that were found before; by default they are looked for now, which waits for the device.
    graphs: captures the step and replays it (`step_graphs`); the losses are then valid until the next step. AuxK then
        chooses from padded features (`csae.dead_rows.pad`), so a few graphs do for any number of them.
    """
    if dead is None:
        dead = sae.dead_features()
    inputs = {"acts": batch.acts, "mask": batch.mask, "documents": batch.documents, "dead": dead}
    if batch.target is not None:
        inputs["target"] = batch.target
    sweeps, groups = sweeps_at(step, config, sae), optimizer.param_groups
    rates = [learning_rate(step, config) * group["share"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    half = config.precision == "bfloat16"
    if graphs is None or (sweeps is not None and sweeps.from_exact):  # the recurrence has graphs of its own
        here = {name: of.to(sae.W_dec.device, non_blocking=True) for name, of in inputs.items()}
        return _step(sae, optimizer, here, sweeps, half), dead
    inputs["dead"] = pad(dead, sae.W_dec.shape[0])
    inputs["rates"] = torch.tensor(rates, dtype=torch.float32)

    def captured(given: Inputs) -> Losses:
        given = dict(given)
        for group, rate in zip(groups, given.pop("rates").unbind(), strict=True):
            group["lr"] = rate
        return _step(sae, optimizer, given, sweeps, half, padded=True)

    def replayed() -> None:
        optimizer.replayed()
        increment_version(list(sae.buffers()))

    buffers = tuple(of.data_ptr() for of in sae.buffers())
    key = sweeps, half, sae.training, repr(sae.config), buffers, optimizer.marks()
    try:
        return graphs.run(key, captured, inputs, replayed, optimizer.copies.forget), dead
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _step(sae: SAE, optimizer: Adam, inputs: Inputs, sweeps: Sweeps | None, half: bool, padded: bool = False) -> Losses:
    """A step with the learning rates of the optimizer's groups. padded: whether the dead features are."""
    of_transcoder = {"target": inputs["target"]} if "target" in inputs else {}
    with torch.autocast(sae.W_dec.device.type, dtype=torch.bfloat16, enabled=half):
        acts, mask, documents, dead = (inputs[name] for name in ("acts", "mask", "documents", "dead"))
        among = Dead.unpadded(dead) if padded else dead
        losses, gradients = sae.gradients(acts, mask, documents, among, sweeps, **of_transcoder)
    optimizer.update(gradients)
    sae.track(losses.code, mask)
    return losses


def step_graphs(sae: SAE) -> Graphs | None:
    """What captures the steps of this SAE, on CUDA; None where they are launched kernel by kernel.

    They are where other processes own rows too: their exchange is not captured.
    """
    device = sae.W_dec.device
    return None if device.type != "cuda" or sae.shard is not None else Graphs(device)


def adam(sae: SAE, config: TrainConfig) -> Adam:
    """The optimizer that `config` asks for."""
    return Adam(sae, config.lr, config.look_back_lr, lazy=config.lazy, moments=getattr(torch, config.moments))


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: it rises from zero over the warm-up, stays at the peak, falls to zero at the end."""
    steps = config.steps - config.start
    rise = (step - config.start + 1) / max(1.0, config.warmup * steps)
    fall = (config.steps - step) / max(1.0, config.decay * steps)
    return config.lr * min(1.0, rise, fall)


def sweeps_at(step: int, config: TrainConfig, sae: SAE) -> Sweeps | None:
    """The sweeps of a contextual SAE in a step; None for another SAE.

    In the decay every second step has one sweep less. With a fixed number, an SAE can learn to be right after exactly
    that number: a feature that suppresses itself at the next position is on and off in turns, from sweep to sweep, and
    then from position to position in the exact form. That was seen on synthetic windows, with four sweeps: an exact FVU
    of 0.14 against 0.03.
    """
    if not isinstance(sae, ContextualSAE):
        return None
    steps = config.steps - config.start
    if step - config.start >= config.exact_from * steps:
        return Sweeps(min(sae.sweeps, config.early_sweeps), from_exact=True)
    if step - config.start >= min((1 - config.decay) * steps, steps - 1):
        return Sweeps(max(sae.sweeps - (config.steps - 1 - step) % 2, min(sae.sweeps, 1)))
    return Sweeps(min(sae.sweeps, config.early_sweeps))


@torch.no_grad()
def exact_gap(sae: ContextualSAE, batch: Batch, sweeps: Sweeps | None = None) -> tuple[float, float]:
    """The FVU of a batch in the exact form, and how much larger it is than that of the sweeps, as a share.

    Where other processes own rows too, all call this, and the batch is that of all.
    """
    acts, mask, documents = (tensor.to(sae.W_dec.device) for tensor in (batch.acts, batch.mask, batch.documents))
    wanted = acts if batch.target is None else batch.target.to(acts.device)
    forms = (
        sae.forward_anywhere(acts, mask, documents, exact, None if exact else sweeps).x_hat.double()
        for exact in (True, False)
    )
    # In float64, to see small differences.
    x, weight = wanted.double().masked_fill(~mask.unsqueeze(-1), 0), mask.double()
    total = here if sae.shard is None else sae.shard.total
    exact, swept = (float(fraction_unexplained(x, x - x_hat, weight, total)) for x_hat in forms)
    return exact, exact / swept - 1 if swept > 0 else 0.0
