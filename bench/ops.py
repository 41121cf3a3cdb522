"""The ops and a training step on this machine, as ratios to the encoder product alone.

    python -m bench.ops [--n 2048 --d-in 576 --d-sae 18432 --k 32 --rounds 9]

Each round runs every case once, in turn, so that a noisy machine disturbs all alike; medians are printed. The
product (`torch.mm` of the same shapes) is the floor of encoding: nothing makes it smaller.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from csae import SAE, ContextualSAE, TopKSAE
from csae.activations import Batch
from csae.ops import sparse_decode, topk_encode
from csae.train import TrainConfig, adam, train_step

T = 256


def cases(n: int, d_in: int, d_sae: int, k: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the first is the product that the others are divided by."""
    torch.manual_seed(0)
    config = TrainConfig(steps=10)
    windows, positions = max(1, n // T), min(n, T)
    shape = (windows, positions)
    acts = torch.randn(*shape, d_in, device=device)
    batch = Batch(acts, torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64), None)
    x = acts.view(-1, d_in)
    topk, contextual = TopKSAE(d_in, d_sae, k).to(device), ContextualSAE(d_in, d_sae, k, sweeps=1).to(device)
    W_enc, b_enc, W_dec = (parameter.detach() for parameter in (topk.W_enc, topk.b_enc, topk.W_dec))
    product = torch.empty(x.shape[0], d_sae, device=device)
    values, indices = topk_encode(x, W_enc, b_enc, k)

    def dense() -> None:
        """What plain PyTorch does: the same SAE with dense pre-activations and a dense decoder."""
        W_e, b_e, W_d = (tensor.clone().requires_grad_() for tensor in (W_enc, b_enc, W_dec))
        found = torch.topk(x @ W_e.T + b_e, k)
        feature_acts = torch.zeros_like(product).scatter(1, found.indices, found.values.relu())
        (x - feature_acts @ W_d).square().sum().backward()

    def sparse() -> None:
        topk.zero_grad()
        topk.loss(acts).loss.backward()

    def step(sae: SAE) -> Callable[[], object]:
        optimizer = adam(sae, config)
        return lambda: train_step(sae, optimizer, batch, 1e-4, config, device)

    return {
        "product": lambda: torch.mm(x, W_enc.T, out=product),
        "topk_encode": lambda: topk_encode(x, W_enc, b_enc, k),
        "sparse_decode": lambda: sparse_decode(values, indices, W_dec),
        "TopK forward + backward": sparse,
        "dense PyTorch forward + backward": dense,
        "TopK training step": step(topk),
        "contextual training step, one sweep": step(contextual),
    }


def measure(timed: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each case, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 2):
        for name, run in timed.items():
            start = _now(device)
            run()
            if turn >= 2:
                times[name].append(1000 * (_now(device) - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 2048), ("d-in", 576), ("d-sae", 18432), ("k", 32), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    found = measure(cases(args.n, args.d_in, args.d_sae, args.k, device), args.rounds, device)
    shape = f"n={args.n} d_in={args.d_in} d_sae={args.d_sae} k={args.k}"
    print(f"{shape}, float32, {device}, {torch.get_num_threads()} threads")
    for name, median in found.items():
        print(f"{name:<38}{median:9.1f} ms   {median / found['product']:6.2f} x the product")


if __name__ == "__main__":
    main()
