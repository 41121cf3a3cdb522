"""The runs of the evidence: which SAEs are trained on which activations, and the results of each.

A cell is one SAE: its arch, k, seed, and the corpus and layer that it is trained on. `csae.train` trains each on the
same windows in the same order. It is evaluated on held-out windows. Each has a folder of its own, so that evidence that
was stopped can be continued. All SAEs have the same learning rate: the best one for the widened TopK SAE.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from csae.bench.baselines import BASELINES
from csae.bench.evidence import bits, texts
from csae.config import TrainConfig
from csae.contextual_sae import ContextualSAE
from csae.data.activations import (
    ActivationSource,
    ModelActivations,
    estimate_normalisation,
    held_out,
)
from csae.data.cache import write_cache
from csae.data.language_model import LanguageModel
from csae.data.shard_activations import ShardActivations
from csae.demo import wide_as
from csae.distributed.hosts import Hosts
from csae.distributed.ranks import Ranks
from csae.evaluate import evaluate
from csae.files import write_json
from csae.progress import Progress, quiet
from csae.sae import SAE
from csae.saving import CONFIG
from csae.topk_sae import TopKSAE
from csae.train import train

FOUND = "evidence.json"
BATCH_WINDOWS = 8
LR = 4e-3
DEAD_AFTER = 200_000
HELD_OUT = 100
CE_WINDOWS = 4  # each takes several passes through the whole language model
BITS_WINDOWS = 24
TOPK, WIDE, CURRENT, PAST = "topk", "topk-wide", "contextual", "contextual-past"


@dataclass(frozen=True)
class Cell:
    """One SAE of the evidence."""

    arch: str
    """topk, topk-wide, contextual (query="current"), contextual-past, or one of BASELINES"""
    k: int
    corpus: str
    layer: int | str
    """after how many blocks; or the name of a hook point"""
    seed: int
    k_mem: int | None = None
    """of a contextual SAE: how many features of a code are remembered"""

    @property
    def name(self) -> str:
        remembered = "" if self.k_mem is None else f"-mem{self.k_mem}"
        return f"{place_name(self.corpus, self.layer)}-{self.arch}{remembered}-k{self.k}-seed{self.seed}"


@dataclass(frozen=True)
class Budget:
    """Size and training data of every SAE."""

    d_sae: int = 2304
    tokens: int = 840_000
    """training tokens, in passes over `distinct` tokens"""
    distinct: int = 420_000
    n_ctx: int = 256


def place_name(corpus: str, layer: int | str) -> str:
    """A corpus and a place of the model, for the names of files and folders."""
    where = f"layer{layer}" if isinstance(layer, int) else re.sub(r"[^\w.-]", "-", layer)
    return f"{corpus}-{where}"


def cells(ks: Sequence[int], layers: Sequence[int | str], corpora: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The full grid, the most important cells first, so that a part of it is of use too.

    1. The middle k and layer and the first corpus: every seed of our SAEs and of Temporal Feature Analysis, which looks
       back too; one seed of the other baselines.
    2. Other k, layers and corpora, with one seed.
    3. All other cells. Baselines are at the place of 1 only.

    TopK is also trained at 1.5 and 2 times each k, for `headline`.
    """
    by_number = sorted(layers, key=lambda layer: (0, layer, "") if isinstance(layer, int) else (1, 0, layer))
    k, layer, corpus = sorted(ks)[len(ks) // 2], by_number[len(layers) // 2], corpora[0]
    ours = (TOPK, WIDE, CURRENT, PAST)

    def place(k: int, corpus: str, layer: int | str, seed: int) -> list[Cell]:
        archs = [Cell(arch, k, corpus, layer, seed) for arch in ours]
        return archs + [Cell(TOPK, more, corpus, layer, seed) for more in (k + k // 2, 2 * k)]

    here = [cell for seed in seeds for cell in place(k, corpus, layer, seed)]
    baselines = [Cell(arch, k, corpus, layer, seed) for seed in seeds for arch in BASELINES]
    here += [cell for cell in baselines if cell.seed == seeds[0] or cell.arch == "temporal-features"]
    here += [Cell(CURRENT, k, corpus, layer, seeds[0], k_mem) for k_mem in (1, max(1, k // 4)) if k_mem < k]
    elsewhere = [cell for other in corpora for cell in place(k, other, layer, seeds[0])]
    elsewhere += [cell for other in ks for cell in place(other, corpus, layer, seeds[0])]
    elsewhere += [cell for other in layers for cell in place(k, corpus, other, seeds[0])]
    rest = [
        cell for seed in seeds for la in layers for co in corpora for each in ks for cell in place(each, co, la, seed)
    ]
    return list(dict.fromkeys(here + elsewhere + rest + baselines))


def windows_needed(budget: Budget) -> int:
    return budget.distinct // budget.n_ctx + HELD_OUT


def activations(
    out: Path,
    lm: LanguageModel,
    corpus: str,
    layer: int | str,
    budget: Budget,
    languages: Path | None = None,
    progress: Progress = quiet,
    ranks: Ranks | None = None,
) -> ActivationSource:
    """The activations of a corpus at a layer or a hook point, from a cache in `out`, made first if it is not there.

    languages: a folder for `texts.read_languages`, for "multilingual". ranks: all call this, and share the work.
    """
    hosts = Hosts(ranks)
    folder = out / "activations" / place_name(corpus, layer)
    if not hosts.from_first(folder.exists):
        needed = windows_needed(budget) * budget.n_ctx
        token_windows = texts.windows(corpus, lm.tokenizer, budget.n_ctx, needed, languages, progress=progress)
        unfinished = folder.with_name(folder.name + ".unfinished")
        hosts.from_first(lambda: shutil.rmtree(unfinished, ignore_errors=True))  # a kill cut it short
        write_cache(ModelActivations(lm, layer, token_windows), unfinished, progress=progress, ranks=ranks)
        hosts.from_first(lambda: unfinished.rename(folder) and None)
    return ShardActivations(folder)


def make(cell: Cell, d_in: int, d_sae: int) -> SAE:
    """The SAE of a cell, untrained. A seed gives the same weights each time."""
    sizes: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "k": cell.k, "dead_after": DEAD_AFTER}
    torch.manual_seed(cell.seed)
    if cell.arch in (CURRENT, PAST):
        return ContextualSAE(**sizes, k_mem=cell.k_mem, query="past" if cell.arch == PAST else "current")
    if cell.arch == WIDE:
        sizes["d_sae"] = wide_as(ContextualSAE(d_in, d_sae, cell.k).n_params, d_in)
    return TopKSAE(**sizes) if cell.arch in (TOPK, WIDE) else BASELINES[cell.arch](**sizes)


def is_done(out: Path, cell: Cell) -> bool:
    """Whether `run` finds the results of a cell."""
    return (out / "runs" / cell.name / FOUND).is_file()


def run(
    out: Path, cell: Cell, source: ActivationSource, lm: LanguageModel, budget: Budget, progress: Progress = quiet
) -> dict[str, Any]:
    """Train and evaluate the SAE of a cell, or read its earlier results; returns its entry of `runs`."""
    folder = out / "runs" / cell.name
    if is_done(out, cell):
        return json.loads((folder / FOUND).read_text(encoding="utf-8"))
    train_windows, test_windows = held_out(source.n_windows, HELD_OUT)
    sae = make(cell, source.d_in, budget.d_sae)
    sae.initialise(*estimate_normalisation(source, train_windows)[:2])
    device = str(lm.device)
    steps = max(1, budget.tokens // (BATCH_WINDOWS * source.n_ctx))
    config = TrainConfig(steps=steps, batch_windows=BATCH_WINDOWS, lr=LR, seed=cell.seed)
    train(sae.to(device), source, train_windows, folder, config)
    found = evaluate(sae, source, test_windows, lm, cell.layer, ce_windows=CE_WINDOWS, progress=progress)
    # The probabilities of the coder come from other windows than those sent. The SAE was trained on neither.
    half = len(test_windows) // 2
    seen, sent = test_windows[:half][:BITS_WINDOWS], test_windows[half:][:BITS_WINDOWS]
    # Its prediction reads the true past, which codes don't determine: no number of bits is enough.
    account = None if cell.arch == "temporal-features" else bits.account(sae, source, seen, sent)
    entry = {
        "name": cell.name,
        **dataclasses.asdict(cell),
        "query": getattr(sae, "query", None),
        "n_params": sae.n_params,
        "model": Path(lm.name).name,
        "tokens": steps * BATCH_WINDOWS * source.n_ctx,
        "note": getattr(sae, "note", None),
        "fvu_exact": found["fvu"],
        "bits_per_token": None if account is None else account["bits_per_token"],
        "bits": account,
    }
    entry = {**{name: found[name] for name in found if name not in ("arch", "tokens", "query")}, **entry}
    write_json(folder / FOUND, entry)
    return entry


def trained(out: Path, cell: Cell) -> SAE:
    """The SAE of a cell that `run` trained."""
    folder = out / "runs" / cell.name
    ours: dict[str, type[SAE]] = {TOPK: TopKSAE, WIDE: TopKSAE, CURRENT: ContextualSAE, PAST: ContextualSAE}
    kind = (ours | BASELINES)[cell.arch]
    assert (folder / CONFIG).is_file(), folder
    return kind.from_pretrained(str(folder)).eval()


def headline(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many features a per-token SAE needs to match each contextual SAE, at equal d_sae and at equal parameters.

    For each contextual cell with at least two TopK cells of the same model, corpus, layer and seed:
    `topk`: the k at which TopK reaches its FVU; log FVU is taken as linear in log k between two cells and beyond the
    last. `topk_ratio`: that k divided by the contextual one. `topk_beyond`: whether that k is outside those measured.
    The same for the widened TopK: `wide`, `wide_ratio`, `wide_beyond`.
    """
    runs = list(runs)
    found = []
    for entry in runs:
        if entry["arch"] not in (CURRENT, PAST) or entry["k_mem"] is not None:
            continue
        row = {name: entry[name] for name in ("arch", "query", "k", "model", "corpus", "layer", "seed", "fvu")}
        for arch, label in ((TOPK, "topk"), (WIDE, "wide")):
            same = ("model", "corpus", "layer", "seed")
            curve = sorted(
                (other["k"], other["fvu"])
                for other in runs
                if other["arch"] == arch and all(other[name] == entry[name] for name in same)
            )
            if len(curve) > 1:
                needed, beyond = matching_k(curve, entry["fvu"])
                row |= {label: needed, f"{label}_ratio": needed / entry["k"], f"{label}_beyond": beyond}
        found.append(row)
    return found


def matching_k(curve: Sequence[tuple[int, float]], fvu: float) -> tuple[float, bool]:
    """The k at which a curve of (k, FVU), sorted by k, reaches `fvu`, and whether that k is outside the curve."""
    pairs = list(pairwise(curve))
    inside = [(one, two) for one, two in pairs if two[1] <= fvu <= one[1]]
    (k1, f1), (k2, f2) = inside[0] if inside else (pairs[-1] if fvu < curve[-1][1] else pairs[0])
    along = (math.log(fvu) - math.log(f1)) / (math.log(f2) - math.log(f1))
    return math.exp(math.log(k1) + along * (math.log(k2) - math.log(k1))), not inside
