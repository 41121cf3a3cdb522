"""Transcoders of an MLP: does a look-back help to predict what it writes?

    python -m csae.bench.evidence.transcoders OUT

SmolLM2-135M, from the input of block 11's MLP to its output, on the prose that comes with Python.

    OUT/activations/     both hook points, from one pass of the model; made once
    OUT/NAME/            a run of csae.train for each transcoder, with its figures (evidence.json)

A second call continues where the first was stopped. With --only NAME it trains one of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ModelActivations, Place, estimate_normalisation, held_out
from csae.data.cache import write_cache
from csae.data.language_model import LanguageModel
from csae.data.loading import smollm2
from csae.data.shard_activations import ShardActivations
from csae.data.text import beginning, python_prose, tokenize
from csae.evaluate import evaluate
from csae.files import write_json
from csae.progress import track
from csae.sae import SAE
from csae.topk_sae import TopKSAE
from csae.train import train

PLACE = Place("mlp.in:11", "mlp.out:11")
FOUND = "evidence.json"
D_SAE, K, N_CTX, HELD_OUT = 2304, 16, 256, 48
MAKE: dict[str, Callable[[int, int], SAE]] = {
    "topk": lambda d, out: TopKSAE(d, D_SAE, K, d_out=out),
    "contextual": lambda d, out: ContextualSAE(d, D_SAE, K, d_out=out),
    "topk-wide": lambda d, out: TopKSAE(d, wide_as(ContextualSAE(d, D_SAE, K, d_out=out), d, out), K, d_out=out),
    "contextual-past": lambda d, out: ContextualSAE(d, D_SAE, K, d_out=out, query="past"),
    "topk-skip": lambda d, out: TopKSAE(d, D_SAE, K, d_out=out, skip=True),
    "contextual-skip": lambda d, out: ContextualSAE(d, D_SAE, K, d_out=out, skip=True),
}


def wide_as(sae: SAE, d_in: int, d_out: int) -> int:
    """The d_sae with which a TopK transcoder has the parameters of `sae`."""
    return round((sae.n_params - d_out) / (d_in + d_out + 1))


def measure(out: Path, name: str, source: ShardActivations, lm: LanguageModel, passes: int) -> dict[str, Any]:
    """Train and evaluate a transcoder, or read its earlier figures."""
    folder = out / name
    if (folder / FOUND).is_file():
        found: dict[str, Any] = json.loads((folder / FOUND).read_text(encoding="utf-8"))
        return found
    train_windows, test_windows = held_out(source.n_windows, HELD_OUT)
    config = TrainConfig(steps=passes * (len(train_windows) // 8), batch_windows=8, lr=4e-3, gap_every=10**6)
    torch.manual_seed(0)
    sae = MAKE[name](source.d_in, source.d_out)
    sae.initialise(*estimate_normalisation(source, train_windows))
    train(sae, source, train_windows, folder, config)
    found = evaluate(sae, source, test_windows, lm, PLACE, ce_windows=8, progress=track)
    write_json(folder / FOUND, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=400, help="distinct windows of 256 to train on")
    parser.add_argument("--passes", type=int, default=3, help="over them")
    parser.add_argument("--only", action="append", choices=list(MAKE), help="may be repeated")
    given = parser.parse_args()
    lm = LanguageModel.load(smollm2(), device="cpu")
    tokens = tokenize(
        python_prose(), lm.tokenizer, N_CTX, (given.windows + HELD_OUT) * N_CTX, 0, track, beginning(lm.tokenizer)
    )
    folder = given.out / "activations"
    write_cache(ModelActivations(lm, [str(hook) for hook in PLACE], tokens), folder, progress=track)
    source = ShardActivations(folder, places=[PLACE])
    for name in given.only or MAKE:
        found = measure(given.out, name, source, lm, given.passes)
        kept = ("n_params", "fvu", "l0", "ce_clean", "ce_sae", "ce_zero", "loss_recovered", "fvu_sweeps")
        print(name, {part: found[part] for part in kept if part in found}, flush=True)


if __name__ == "__main__":
    main()
