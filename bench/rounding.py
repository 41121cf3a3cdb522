"""What rounding alone does to a training: the same one again, with W_enc changed in its last bits before it begins.

    python -m csae.bench.rounding ACTIVATIONS [--times 4] [--tokens N] [--out rounding]

ACTIVATIONS is a folder of `csae cache` or of the demo. The SAEs are those of `csae.bench.killed`, in one process.
So the spread of their FVU is what sums in another order may do too, as several ranks make them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from csae.bench.killed import ARCHS, HELD_OUT, SETTINGS
from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import estimate_normalisation, held_out
from csae.data.shard_activations import ShardActivations
from csae.evaluate import evaluate
from csae.topk_sae import TopKSAE
from csae.train import train

KINDS = {"topk": TopKSAE, "contextual": ContextualSAE}
BATCH_WINDOWS = 8


def fvus(source: ShardActivations, arch: str, times: int, tokens: int | None, out: Path) -> list[float]:
    """The held-out FVU as the weights are drawn, and then with each number of W_enc one up or down, `times` times."""
    train_windows, test_windows = held_out(source.n_windows, HELD_OUT)
    tokens = 2 * len(train_windows) * source.n_ctx if tokens is None else tokens
    config = TrainConfig(
        steps=tokens // (BATCH_WINDOWS * source.n_ctx), batch_windows=BATCH_WINDOWS, lr=SETTINGS["lr"], gap_every=10**9
    )
    found = []
    for number in range(times + 1):
        torch.manual_seed(0)
        sae = KINDS[arch](
            source.d_in, int(SETTINGS["d-sae"]), int(SETTINGS["k"]), dead_after=int(SETTINGS["dead-after"])
        )
        sae.initialise(*estimate_normalisation(source, train_windows)[:2])
        if number:
            with torch.no_grad():
                up = torch.rand(sae.W_enc.shape, generator=torch.Generator().manual_seed(number)) < 0.5
                sae.W_enc.copy_(torch.nextafter(sae.W_enc, torch.where(up, torch.inf, -torch.inf)))
        train(sae, source, train_windows, out / f"{arch}-{number}", config)
        found.append(float(evaluate(sae, source, test_windows)["fvu"]))
        print(arch, number, f"{found[-1]:.5f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", type=Path)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="two passes over the windows if not given")
    parser.add_argument("--out", type=Path, default=Path("rounding"))
    given = parser.parse_args(arguments)
    source = ShardActivations(given.activations)
    found = {arch: fvus(source, arch, given.times, given.tokens, given.out) for arch in ARCHS}
    (given.out / "rounding.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
