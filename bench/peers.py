"""Training steps of other libraries, by their own classes, where they are installed.

Each runs what its trainer runs for one batch, without logging and checkpoints: forward, loss, backward, clipping,
optimizer, schedule, the decoder's norm, the count of dead features. The optimizer is torch's Adam, made as their
trainers make it. No feature is dead after so few steps, so AuxK costs only the check for dead features. A name that
ends in `_patched` is the same step under `csae.patch`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import csae

from .data import Built, Data, Skip
from .step import LR, Step

# The name, among the compared tensors, of the step of a decoder whose rows don't keep unit norm.
FREE_ROWS = "W_dec, free rows"

PACKAGES = ("eai-sparsify", "sae-lens", "dictionary-learning")


def _patched(library: str, build: Callable[[Data], Built]) -> Callable[[Data], Built]:
    """The same under our patch, which is applied only while it runs: other implementations run in between."""

    def build_patched(data: Data) -> Built:
        built = build(data)

        def outputs() -> dict[str, Tensor]:
            with csae.patch(library):
                return built.outputs()

        def run() -> None:
            with csae.patch(library):
                built.run()

        return built._replace(run=run, outputs=outputs)

    return build_patched


def sparsify(data: Data) -> Built:
    """EleutherAI's SparseCoder; the step is what `sparsify.Trainer.fit` and its hook do for one hookpoint."""
    needs("eai-sparsify")
    if data.device.type == "cuda" and data.dtype == torch.float32:
        raise Skip("its forward pass on CUDA is always in bfloat16")
    if data.device.type == "cpu":
        if "sparsify.utils" in sys.modules and os.environ.get("SPARSIFY_DISABLE_TRITON") != "1":
            raise Skip("it was imported with its Triton decoder, which can't run on a CPU")
        os.environ["SPARSIFY_DISABLE_TRITON"] = (
            "1"  # otherwise it uses Triton wherever that is installed, also on a CPU
        )
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    shape = data.shape
    config = SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    sae = SparseCoder(shape.d_in, config, device=data.device, dtype=torch.float32)
    state = Step(data.weights)
    own = {"W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    state.load(own)
    optimizer = torch.optim.Adam([{"params": sae.parameters(), "lr": LR}])
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 10**6)
    since_fired = torch.zeros(shape.d_sae, dtype=torch.int64, device=data.device)
    fired = torch.zeros(shape.d_sae, dtype=torch.bool, device=data.device)
    acts = data.x.float()

    def run() -> None:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (acts - acts.mean(0)).pow(2).sum()
        # Its own autocast works on CUDA only.
        with data.autocast:
            out = sae(x=acts, y=acts, dead_mask=None, total_variance=total_variance)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            since_fired.add_(shape.n)
            since_fired[fired] = 0
            fired.zero_()

    return state.built(run)


sparsify_patched = _patched("sparsify", sparsify)


def sae_lens(data: Data) -> Built:
    """SAELens's TopKTrainingSAE, by `SAETrainer.step`."""
    return _sae_lens(data, sparse=False)


def sae_lens_sparse(data: Data) -> Built:
    """The same with its sparse activations, which it advises for float32 only."""
    if data.dtype != torch.float32:
        raise Skip("its sparse activations are for float32")
    return _sae_lens(data, sparse=True)


sae_lens_patched = _patched("sae_lens", sae_lens)


def _sae_lens(data: Data, sparse: bool) -> Built:
    needs("sae-lens")
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape = data.shape
    config = TopKTrainingSAEConfig(
        d_in=shape.d_in,
        d_sae=shape.d_sae,
        k=shape.k,
        device=str(data.device),
        decoder_init_norm=1.0,
        use_sparse_activations=sparse,
        # Its backward pass can't divide a sparse tensor by the norms. At norm 1 they change nothing.
        rescale_acts_by_decoder_norm=not sparse,
    )
    sae = TopKTrainingSAE(config)
    state = Step(data.weights, transposed=("W_enc",))
    state.load(dict(sae.named_parameters()))
    trainer_config = SAETrainerConfig(
        total_training_samples=10**6 * shape.n,
        train_batch_size_samples=shape.n,
        lr=LR,
        lr_end=LR,
        device=str(data.device),
        autocast=data.dtype == torch.bfloat16,
    )
    trainer = SAETrainer(trainer_config, sae, data_provider=iter(()))
    acts = data.x.float()

    def run() -> None:
        trainer.step(acts)
        trainer.n_training_steps += 1

    built = state.built(run)

    def outputs() -> dict[str, Tensor]:
        found = built.outputs()
        return {FREE_ROWS if name == "W_dec" else name: direction for name, direction in found.items()}

    return built._replace(outputs=outputs)


def dictionary_learning(data: Data) -> Built:
    """dictionary_learning's AutoEncoderTopK, by `TopKTrainer.update` as `trainSAE` calls it."""
    needs("dictionary-learning")
    with contextlib.redirect_stdout(io.StringIO()):
        from dictionary_learning.trainers.top_k import TopKTrainer
    _undo_nnsight()

    shape = data.shape
    with data.device:
        trainer = TopKTrainer(
            steps=10**6,
            activation_dim=shape.d_in,
            dict_size=shape.d_sae,
            k=shape.k,
            layer=0,
            lm_name="",
            lr=LR,
            warmup_steps=0,
            device=str(data.device),
        )
    ae = trainer.ae
    own = {"W_enc": ae.encoder.weight, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight, "b_dec": ae.b_dec}
    state = Step(data.weights, transposed=("W_dec",))
    state.load(own)
    acts = data.x

    def run() -> None:
        # A step number from the middle of training, where it updates its threshold in every step.
        with data.autocast:
            trainer.update(2000, acts)

    return state.built(run)


dictionary_learning_patched = _patched("dictionary_learning", dictionary_learning)


def _undo_nnsight() -> None:
    """dictionary_learning imports nnsight, which replaces functions of torch: torch.compile no longer works then."""
    patcher = getattr(sys.modules.get("nnsight"), "DEFAULT_PATCHER", None)
    if patcher is not None:
        patcher.__exit__(None, None, None)


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def needs(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise Skip(f"{package} is not installed (`make bench-peers` has it)") from error
