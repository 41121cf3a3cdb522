"""Peak memory of a training step on a CPU, beyond weights and the optimizer's state.

    python -m csae.bench.memory [--n 4096 --d-in 576 --d-sae 36864 --k 32 --arch topk --dead 0]

Resident memory as Linux counts it: the high-water mark of the step, minus what was resident before the model was made,
minus the bytes of weights and moments. The second step is measured, since the first one makes the moments. glibc is
told to return freed memory at once: otherwise the same step took between 210 and 285 MB, for 196 MB of tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path

import torch

from csae import SAE, ContextualSAE, TopKSAE
from csae.adam import Adam
from csae.config import TrainConfig
from csae.data.activations import Batch
from csae.step import adam, train_step

from .measure import resident

T = 256
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def measure(n: int, d_in: int, d_sae: int, k: int, arch: str, dead: int) -> dict[str, float]:
    """In MiB: the step's peak beyond weights and moments, and the weights and moments."""
    config = TrainConfig(steps=10)
    _step(TopKSAE(8, 16, 2), 64, 0, config)  # starts the libraries' threads and fills their caches
    before = resident("VmRSS")
    torch.manual_seed(0)
    sae: SAE = TopKSAE(d_in, d_sae, k) if arch == "topk" else ContextualSAE(d_in, d_sae, k)
    optimizer, _ = _step(sae, n, dead, config)
    held = sum(parameter.numel() * 4 for parameter in sae.parameters()) * 3  # weight, two moments
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    _step(sae, n, dead, config, optimizer)
    return {"beyond_mb": (resident("VmHWM") - before - held) / 2**20, "held_mb": held / 2**20}


def _step(sae: SAE, n: int, dead: int, config: TrainConfig, optimizer: Adam | None = None) -> tuple[Adam, object]:
    optimizer = optimizer or adam(sae, config)
    shape = (max(1, n // T), min(n, T))
    batch = Batch(
        torch.randn(*shape, sae.d_in), torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64), None
    )
    sae.tokens_since_fired[:dead] = sae.dead_after
    return optimizer, train_step(sae, optimizer, batch, config.steps - 1, config)  # with all of its sweeps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 4096), ("d-in", 576), ("d-sae", 36864), ("k", 32), ("dead", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arch", choices=["topk", "contextual"], default="topk")
    args = parser.parse_args()
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, 1 << 16)
    print(json.dumps(vars(args) | measure(**vars(args)), indent=2))


if __name__ == "__main__":
    main()
