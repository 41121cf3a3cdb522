"""How cost grows with d_sae and k: time beyond the encoder's product against n * k * d_in.

Sparse work costs n * k * d_in, whatever d_sae is. Work on every pre-activation costs n * d_sae. Adam moves every row,
whether its feature fired or not: 2 * d_sae * d_in weights and twice as many moments, whatever n and k are. The product
is the one that the encoder computes: in bfloat16 on a CPU with units for that.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from csae.kernels.cpu import topk_coarse
from csae.ops import topk_encode

from . import plain
from .data import Data, Shape
from .harness import Report, device_name
from .measure import Clock, median_and_spread
from .ours import factors, step, topk_sae

N, D_IN = 1024, 576
ROUNDS = 3
D_SAE, K = (4096, 16384, 65536, 262144), (8, 32, 128)
TIMED = {
    "encode": plain.encode(topk_encode),
    "forward + backward": factors(topk_sae),
    "training step, with Adam": step(topk_sae),
}


def run(
    d_sae: Sequence[int] = D_SAE,
    k: Sequence[int] = K,
    n: int = N,
    d_in: int = D_IN,
    rounds: int = ROUNDS,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """The median over rounds of the time of each of TIMED minus the time of the product in the same round.

    Returns device, threads and results; each result has d_sae, k, n, d_in, what, product_ms, beyond_ms, spread_ms.
    """
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clock, results = Clock(on), []
    for F in d_sae:
        for active in k:
            say(f"d_sae = {F}, k = {active}")
            shape = Shape("growth", n, d_in, F, active, T=n, heads=1, d_head=16, d_value=16)
            data = Data(shape, torch.float32 if on.type == "cpu" else torch.bfloat16, on)
            product = _product(data)
            runs = {what: build(data).run for what, build in TIMED.items()}
            products: list[float] = []
            beyond: dict[str, list[float]] = {what: [] for what in runs}
            for turn in range(rounds + 1):
                took = clock(product)
                times = {what: clock(timed) for what, timed in runs.items()}
                if turn > 0:  # the first warms up
                    products.append(took)
                    for what, time in times.items():
                        beyond[what].append(time - took)
            for what, differences in beyond.items():
                median, spread = median_and_spread(differences)
                sizes = {"n": n, "d_in": d_in, "d_sae": F, "k": active, "what": what}
                times_found = {"beyond_ms": median, "spread_ms": spread}
                results.append(sizes | {"product_ms": median_and_spread(products)[0]} | times_found)
            del data, product, runs
            gc.collect()
    return {"device": device_name(on), "threads": torch.get_num_threads(), "results": results}


def _product(data: Data) -> Callable[[], object]:
    """The product that `topk_encode` does."""
    coarse = data.shape.n >= topk_coarse.LEAST_ROWS and topk_coarse.worthwhile(data.W_enc, data.shape.k)
    return plain.product(Data(data.shape, torch.bfloat16, data.device) if coarse else data).run


def draw(report: Report, file: Path) -> None:
    """Time beyond the product against n * k * d_in, a line for each d_sae, a panel for each of TIMED."""
    import matplotlib.pyplot as plt

    results: list[dict[str, Any]] = report["results"]
    panels = list(dict.fromkeys(r["what"] for r in results))
    sizes = sorted({r["d_sae"] for r in results})
    figure, grid = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axes, what in zip(grid[0], panels, strict=True):
        for shade, d_sae in enumerate(sizes):
            line = sorted((r["n"] * r["k"] * r["d_in"], r) for r in results if (r["what"], r["d_sae"]) == (what, d_sae))
            product = line[0][1]["product_ms"]
            axes.errorbar(
                [x / 1e6 for x, _ in line],
                [r["beyond_ms"] for _, r in line],
                yerr=[r["spread_ms"] / 2 for _, r in line],
                marker="o",
                markersize=3,
                capsize=2,
                color=plt.get_cmap("viridis")(shade / max(1, len(sizes))),
                label=f"d_sae = {d_sae:,} (product {product:,.0f} ms)",
            )
        axes.set(xlabel="n k d_in, millions", ylabel="ms beyond the product", title=what)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['device']}, {report['threads']} threads", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def table(report: Report) -> str:
    """A line for each size."""
    lines = [f"{report['device']}, {report['threads']} threads"]
    for r in report["results"]:
        lines.append(
            f"d_sae {r['d_sae']:>7}  k {r['k']:>4}  {r['what']:<26}product {r['product_ms']:9.1f} ms  "
            f"beyond it {r['beyond_ms']:8.1f} ms (spread {r['spread_ms']:.1f})"
        )
    return "\n".join(lines)
