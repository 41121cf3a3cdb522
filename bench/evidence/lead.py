"""Does the lead of looking back last? FVU against training tokens, at equal parameters and equal mean L0.

    python -m csae.bench.evidence.lead OUT [--tokens 840000 --distinct 420000] [--selection batch] [--corpus NAME]
    python -m csae.bench.evidence.lead OUT --d-memory 64 --d-value 32    # a smaller look-back, and a narrower opponent

SmolLM2-135M on English manuals (`documentation`), or another corpus of `texts`. At each budget: a per-token SAE widened
to equal parameters, with k, 1.5 k and 2 k features, and the contextual SAE with k, both queries. Each budget is a
training of its own, with the learning rate's whole course. `lead` is how many times the features of the contextual SAE
the per-token SAE needs for the same FVU.

    OUT/activations/        all hook points, from one pass of the model; made once
    OUT/runs/NAME/          a run of csae.train for each SAE, with its figures (evidence.json)
    OUT/lead.json           all figures so far

A second call continues where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from csae.bench.evidence import texts
from csae.bench.evidence.grid import BATCH_WINDOWS, CURRENT, DEAD_AFTER, HELD_OUT, LR, PAST, WIDE, Budget, matching_k
from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import ActivationSource, ModelActivations, Place, estimate_normalisation, held_out
from csae.data.cache import write_cache
from csae.data.dtypes import resolved_dtype
from csae.data.language_model import LanguageModel
from csae.data.loading import smollm2
from csae.data.shard_activations import ShardActivations
from csae.demo import wide_as
from csae.evaluate import evaluate
from csae.files import write_json
from csae.progress import track
from csae.sae import SAE
from csae.topk_sae import TopKSAE
from csae.train import train

FOUND = "evidence.json"
LOOK_BACK = {"n_heads": 8, "d_value": 64, "d_memory": 256}  # as `ContextualSAE` has them if not told otherwise
NO_GAPS = 10**9  # training needs no comparison of the exact form with sweeps: the evaluation makes it
KEPT = ("n_params", "fvu", "l0", "cosine", "dead", "silent", "fvu_sweeps", "l0_sweeps")
BUDGETS = [Budget(tokens=840_000, distinct=420_000), Budget(tokens=2_520_000, distinct=1_260_000)]
BUDGETS += [Budget(tokens=8_400_000, distinct=3_000_000)]


@dataclass(frozen=True)
class Cell:
    """One SAE: which, on what, and how long."""

    arch: str
    """topk-wide, contextual (query="current") or contextual-past"""
    k: int
    selection: str
    hook: str
    d_sae: int
    """of the contextual SAE; the per-token one has as many parameters"""
    tokens: int
    distinct: int
    seed: int
    lr: float = LR
    n_heads: int = LOOK_BACK["n_heads"]
    d_value: int = LOOK_BACK["d_value"]
    d_memory: int = LOOK_BACK["d_memory"]

    @property
    def look_back(self) -> dict[str, Any]:
        """The sizes of the look-back: of the contextual SAE, or of that with which the per-token one is compared."""
        return {name: getattr(self, name) for name in LOOK_BACK}

    @property
    def name(self) -> str:
        size = f"{self.tokens // 1000}k-of-{self.distinct // 1000}k"
        rate = "" if self.lr == LR else f"-lr{self.lr:g}"
        other = "".join(f"-{name}{given}" for name, given in self.look_back.items() if given != LOOK_BACK[name])
        hook = self.hook.replace(":", "-")
        return f"{hook}-{self.arch}-{self.selection}-k{self.k}-d{self.d_sae}-{size}{rate}{other}-seed{self.seed}"


def cells(of: Budget, hook: str, selection: str, k: int, seed: int, lr: float = LR, **look_back: Any) -> list[Cell]:
    """The SAEs of a budget."""
    archs = [(PAST, k), (WIDE, k), (WIDE, k + k // 2), (CURRENT, k), (WIDE, 2 * k)]
    same = selection, hook, of.d_sae, of.tokens, of.distinct, seed, lr
    return [Cell(arch, each, *same, **look_back) for arch, each in archs]


def make(cell: Cell, d_in: int) -> SAE:
    """The SAE of a cell, untrained. A seed gives the same weights each time."""
    sizes: dict[str, Any] = {"k": cell.k, "dead_after": DEAD_AFTER, "selection": cell.selection}
    torch.manual_seed(cell.seed)
    if cell.arch == WIDE:
        n_params = ContextualSAE(d_in, cell.d_sae, cell.k, **cell.look_back).n_params
        return TopKSAE(d_in, wide_as(n_params, d_in), **sizes)
    return ContextualSAE(d_in, cell.d_sae, query="past" if cell.arch == PAST else "current", **cell.look_back, **sizes)


def measure(out: Path, cell: Cell, source: ActivationSource) -> dict[str, Any]:
    """Train and evaluate the SAE of a cell, or read its earlier figures."""
    folder = out / "runs" / cell.name
    if (folder / FOUND).is_file():
        earlier: dict[str, Any] = json.loads((folder / FOUND).read_text(encoding="utf-8"))
        return earlier
    train_windows, test_windows = held_out(source.n_windows, HELD_OUT)
    train_windows = train_windows[: cell.distinct // source.n_ctx]
    sae = make(cell, source.d_in)
    sae.initialise(*estimate_normalisation(source, train_windows)[:2])
    steps = cell.tokens // (BATCH_WINDOWS * source.n_ctx)
    config = TrainConfig(steps=steps, batch_windows=BATCH_WINDOWS, lr=cell.lr, seed=cell.seed, gap_every=NO_GAPS)
    train(sae, source, train_windows, folder, config)
    found = evaluate(sae, source, test_windows)
    entry = {"name": cell.name, **asdict(cell)} | {name: found[name] for name in KEPT if name in found}
    write_json(folder / FOUND, entry)
    return entry


def leads(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contextual SAE: at which mean L0 the per-token SAE of the same training has its FVU, over its own L0.

    log FVU is taken as linear in log L0 between two SAEs and beyond the last (`beyond`). `at_equal_l0`: the FVU of the
    per-token SAE at the same L0, over its own, less one.
    """
    entries = list(entries)
    same = ("selection", "hook", "d_sae", "tokens", "distinct", "seed", "lr", *LOOK_BACK)
    found = []
    for entry in entries:
        if entry["arch"] == WIDE:
            continue
        curve = sorted(
            (other["l0"], other["fvu"])
            for other in entries
            if other["arch"] == WIDE and all(other[name] == entry[name] for name in same)
        )
        if len(curve) > 1:
            needed, beyond = matching_k(curve, entry["fvu"])
            row = {name: entry[name] for name in ("arch", *same, "k", "l0", "fvu")}
            found.append(row | {"lead": needed / entry["l0"], "beyond": beyond, "per_token": curve})
    return found


def cached(folder: Path, hooks: Sequence[str], distinct: int, n_ctx: int, corpus: str) -> Path:
    """A folder with the activations at these hook points, made where it is not complete."""
    dtype = getattr(torch, resolved_dtype("auto", torch.device("cpu")))
    lm = LanguageModel.load(smollm2(), device="cpu", dtype=dtype)
    windows = texts.windows(corpus, lm.tokenizer, n_ctx, (distinct // n_ctx + HELD_OUT) * n_ctx)
    write_cache(ModelActivations(lm, list(hooks), windows), folder, progress=track)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hook", action="append", help="default: resid.out:11; several are read in one pass")
    parser.add_argument("--selection", action="append", choices=["topk", "batch", "jumprelu"], help="default: batch")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--tokens", type=int, action="append", help="trained on; default: 840k, 2,520k and 8,400k")
    parser.add_argument("--distinct", type=int, action="append", help="of these; default: 420k, 1,260k and 3,000k")
    parser.add_argument("--lr", type=float, default=LR)
    for name, size in LOOK_BACK.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help="of the look-back")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--corpus", default="documentation", help="a folder OUT is of one corpus")
    given = parser.parse_args()
    look_back = {name: getattr(given, name) for name in LOOK_BACK}
    budgets = BUDGETS
    if given.tokens or given.distinct:
        if len(given.tokens or ()) != len(given.distinct or ()):
            parser.error("--tokens, --distinct: given different numbers of them; needed one of each for a budget")
        budgets = [Budget(tokens=n, distinct=d) for n, d in zip(given.tokens, given.distinct, strict=True)]
    hooks = given.hook or ["resid.out:11"]
    distinct, n_ctx = max(budget.distinct for budget in budgets), budgets[0].n_ctx
    folder = cached(given.out / "activations", hooks, distinct, n_ctx, given.corpus)
    entries = []
    for seed in range(given.seeds):
        for budget in budgets:
            sized = Budget(given.d_sae, budget.tokens, budget.distinct, n_ctx)
            for selection in given.selection or ["batch"]:
                for hook in hooks:
                    source = ShardActivations(folder, places=[Place(hook)])
                    for cell in cells(sized, hook, selection, given.k, seed, given.lr, **look_back):
                        entries.append(measure(given.out, cell, source))
                        print({name: entries[-1][name] for name in ("name", "fvu", "l0")}, flush=True)
                    write_json(given.out / "lead.json", {"runs": entries, "leads": leads(entries)})
    for row in leads(entries):
        print(
            f"{row['arch']:16} {row['tokens']:>9} tokens  FVU {row['fvu']:.4f}  L0 {row['l0']:.2f}  {row['lead']:.2f}"
        )


if __name__ == "__main__":
    main()
