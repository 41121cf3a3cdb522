"""`csae evidence`: does the contextual SAE work? All of the evidence, in one folder:

    OUT/activations/CORPUS-layerN/   (or CORPUS-HOOK) activations of the language model, as shards; made once
    OUT/runs/NAME/                   a run of csae.train for each cell, with its results (evidence.json)
    OUT/parts/NAME.json              the other measurements, one file each
    OUT/evidence.json                all results so far, written again after each run
    OUT/report.html, OUT/figures/    the page to open, and its figures

A second call continues where the first was stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from csae.bench.evidence import grid, long_windows, page, power, redundancy, switches, synthetic, texts
from csae.bench.evidence.grid import CURRENT, PAST, TOPK, Budget, Cell
from csae.data.activations import ActivationSource, ModelActivations, held_out
from csae.data.language_model import LanguageModel
from csae.data.loading import smollm2
from csae.data.places import layer_of
from csae.data.text import TokenWindows, beginning
from csae.distributed.hosts import Hosts
from csae.distributed.ranks import Ranks
from csae.errors import UserError
from csae.files import read_json, write_json
from csae.progress import Progress, quiet, track

KS = (4, 8, 16, 32, 64)
LAYERS = (6, 12, 20)
CORPORA = ("english", "multilingual")
ALL_CORPORA = (*CORPORA, "documentation")
SEEDS = 3
POWER_WINDOWS = 8
SWITCH_WINDOWS = 96
LONGER = 8  # length of long windows, as a multiple of those trained on
LONG_WINDOWS = 12
REGION_TOKENS = 64


def run_evidence(
    out: Path | str = Path("evidence"),
    model: str | None = None,
    ks: Sequence[int] = KS,
    layers: Sequence[int] | None = None,
    corpora: Sequence[str] = CORPORA,
    seeds: int = SEEDS,
    budget: Budget | None = None,
    languages: Path | None = None,
    device: str | None = None,
    limit: int | None = None,
    progress: Progress = track,
    ranks: Ranks | None = None,
    hooks: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, evaluate and measure everything, and write the report; returns what is in evidence.json.

    Args:
        out: the folder for all results; if it is there, the work is continued.
        model: what LanguageModel.load takes; by default SmolLM2-135M from its PyPI package.
        ks, layers, corpora, seeds: the grid (`grid.cells`); seeds are 0 to seeds - 1. Layers are LAYERS where neither
            they nor hooks are given.
        budget: of each SAE.
        languages: a folder with a folder of .txt files for each language, in place of Debian's books.
        limit: train at most this many SAEs, in the order of `grid.cells`.
        ranks: each calls this with the same arguments, and makes a share of the SAEs and measurements.
        hooks: names or patterns of hook points (`csae.data.hook_points`), in the grid as layers are.

    Raises UserError where the model or a text is missing, or `out` holds evidence of another model or budget.
    """
    layers = (() if hooks else LAYERS) if layers is None else layers
    _check(ks, [*layers, *hooks], corpora, seeds, limit)
    out, budget = Path(out), budget or Budget()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    hosts = Hosts(ranks)
    lm = LanguageModel.load(hosts.from_first(smollm2) if model is None else model, device=device)
    if beginning(lm.tokenizer):
        raise UserError(
            f"model {lm.name!r} wants texts to begin with a beginning of sequence, and these windows begin with none: "
            "give a model that wants none"
        )
    places = _places(lm, layers, hooks)
    progress = progress if hosts.is_first else quiet
    about = hosts.from_first(lambda: _about(out, lm, budget))
    evidence: dict[str, Any] = {"about": about, "runs": []}
    chosen = grid.cells(ks, places, corpora, range(seeds))[:limit]
    opened: dict[tuple[str, int | str], ActivationSource] = {}

    def source_of(cell: Cell) -> ActivationSource:
        where = (cell.corpus, cell.layer)
        if where not in opened:
            opened[where] = grid.activations(out, lm, *where, budget, languages, progress, ranks)
        return opened[where]

    def others(parts: Parts) -> dict[str, Any]:
        return _others(parts, out, lm, chosen, budget, languages, source_of, progress)

    if ranks is not None:
        # Each rank makes what falls to it; rank 0 finds all of it in the files then.
        for cell in chosen:
            source_of(cell)  # made by all ranks together
        missing = hosts.from_first(lambda: [cell for cell in chosen if not grid.is_done(out, cell)])
        for cell in progress(missing[ranks.rank :: ranks.size], "SAEs of this rank"):
            grid.run(out, cell, source_of(cell), lm, budget)
        hosts.gather(None)
        others(Parts(out / "parts", (ranks.rank, ranks.size)))
        hosts.gather(None)
    if hosts.is_first:
        for number, cell in enumerate(progress(chosen, "SAEs")):
            evidence["runs"].append(grid.run(out, cell, source_of(cell), lm, budget))
            evidence["headline"] = grid.headline(evidence["runs"])
            write_json(out / grid.FOUND, evidence)
            if number % 10 == 9:  # to be looked at meanwhile
                page.write_page(out / "report.html", evidence)
        evidence |= others(Parts(out / "parts"))
        write_json(out / grid.FOUND, evidence)
        page.write_figures(out / "figures", evidence)
        page.write_page(out / "report.html", evidence)
    hosts.gather(None)
    return evidence if hosts.is_first else read_json(out / grid.FOUND)


class Parts:
    """Measurements with a file each: made once, and read from it from then on.

    share: (rank, size), where this is one of several processes. It makes those that fall to it; of the others it gives
    nothing where they are not there.
    """

    def __init__(self, folder: Path, share: tuple[int, int] = (0, 1)) -> None:
        self.folder, self.share, self.asked = folder, share, 0

    def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        rank, size = self.share
        is_mine = self.asked % size == rank
        self.asked += 1
        file = self.folder / f"{name}.json"
        if not file.is_file():
            if not is_mine:
                return {}
            write_json(file, make())
        return read_json(file)


def _others(
    parts: Parts,
    out: Path,
    lm: LanguageModel,
    chosen: Sequence[Cell],
    budget: Budget,
    languages: Path | None,
    source_of: Callable[[Cell], ActivationSource],
    progress: Progress,
) -> dict[str, Any]:
    """All measurements but the runs."""
    places = {(cell.corpus, cell.layer): cell for cell in chosen}
    return {
        "redundancy": [
            {"corpus": corpus, "layer": layer}
            | parts(f"redundancy-{grid.place_name(corpus, layer)}", partial(_redundancy, source_of(cell), progress))
            for (corpus, layer), cell in places.items()
        ],
        "power": [
            _named(cell) | parts(f"power-{cell.name}", partial(_power, out, cell, source_of(cell)))
            for cell in chosen
            if cell.arch in (CURRENT, PAST) and cell.seed == 0 and (cell.corpus, cell.layer, cell.k) == _first(chosen)
        ],
        "long": _long_windows(parts, out, lm, chosen, budget, progress),
        "synthetic": [
            parts(f"synthetic-{case.name}", partial(synthetic.run, case, progress=progress))
            for case in synthetic.cases()
        ],
        "switches": _switches(parts, out, lm, chosen, budget, languages, progress),
    }


def _places(lm: LanguageModel, layers: Sequence[int], hooks: Sequence[str]) -> list[int | str]:
    """The layers, and the places that the hooks stand for, as layers where they are. Raises UserError where none is."""
    for layer in layers:
        lm.block(layer)
    names = [point.name for hook in hooks for point in lm.hook_points.find(hook)]
    return list(dict.fromkeys([*layers, *(layer_of(name) or name for name in names)]))


def _check(
    ks: Sequence[int], places: Sequence[int | str], corpora: Sequence[str], seeds: int, limit: int | None
) -> None:
    for name, given in (("ks", ks), ("layers, hooks", places), ("corpora", corpora)):
        if not given:
            raise UserError(f"{name}: none given; needed at least one")
    for corpus in corpora:
        if corpus not in ALL_CORPORA:
            raise UserError(f"corpora: given {corpus!r}; needed some of {', '.join(ALL_CORPORA)}")
    for name, number in (("seeds", seeds), ("limit", 1 if limit is None else limit), ("ks", min(ks))):
        if number < 1:
            raise UserError(f"{name}: given {number}; needed at least 1")


def _about(out: Path, lm: LanguageModel, budget: Budget) -> dict[str, Any]:
    """What is the same for all of the evidence; an earlier one in `out` must have it too."""
    about = {
        "model": Path(lm.name).name,
        "budget": dataclasses.asdict(budget),
        "lr": grid.LR,
        "batch_windows": grid.BATCH_WINDOWS,
        "held_out_windows": grid.HELD_OUT,
        "dead_after": grid.DEAD_AFTER,
    }
    file = out / "about.json"
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in about if earlier.get(name) != json.loads(json.dumps(about[name]))]
        if differing:
            raise UserError(
                f"{out}: holds other evidence (it differs in {', '.join(differing)}): give another --out, or the "
                "options that it was begun with"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty, and no evidence of csae: give another --out")
    else:
        write_json(file, about)
    now = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if lm.device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    return about | now


def _first(chosen: Sequence[Cell]) -> tuple[str, int | str, int]:
    return chosen[0].corpus, chosen[0].layer, chosen[0].k


def _named(cell: Cell) -> dict[str, Any]:
    return {
        "name": cell.name,
        "arch": cell.arch,
        "query": "past" if cell.arch == PAST else "current",
        "k": cell.k,
        "k_mem": cell.k_mem,
    }


def _redundancy(source: ActivationSource, progress: Progress) -> dict[str, Any]:
    return redundancy.measure(source, *held_out(source.n_windows, grid.HELD_OUT), progress=progress)


def _power(out: Path, cell: Cell, source: ActivationSource) -> dict[str, Any]:
    sae: Any = grid.trained(out, cell)
    return power.measure(sae, source, held_out(source.n_windows, grid.HELD_OUT)[1][:POWER_WINDOWS])


def _long_windows(
    parts: Parts, out: Path, lm: LanguageModel, chosen: Sequence[Cell], budget: Budget, progress: Progress
) -> list[dict[str, Any]]:
    """SAEs on windows longer than those trained on. The English text is that of training, in longer windows."""
    n_ctx = LONGER * budget.n_ctx
    cells = [
        cell
        for cell in chosen
        if cell.arch in (TOPK, CURRENT, PAST) and cell.seed == 0 and cell.k_mem is None
        if (cell.corpus, cell.layer, cell.k) == _first(chosen) and cell.corpus == "english"
    ]
    if not cells or (lm.max_ctx is not None and lm.max_ctx < n_ctx):
        return []
    windows = texts.windows("english", lm.tokenizer, n_ctx, seed=1)
    first = TokenWindows(windows.tokens[:LONG_WINDOWS], windows.documents[:LONG_WINDOWS])
    source = ModelActivations(lm, cells[0].layer, first, 1)
    return [
        _named(cell) | parts(f"long-{cell.name}", partial(_long, out, cell, source, budget, progress)) for cell in cells
    ]


def _long(out: Path, cell: Cell, source: ActivationSource, budget: Budget, progress: Progress) -> dict[str, Any]:
    return long_windows.measure(grid.trained(out, cell), source, range(source.n_windows), budget.n_ctx, progress)


def _switches(
    parts: Parts,
    out: Path,
    lm: LanguageModel,
    chosen: Sequence[Cell],
    budget: Budget,
    languages: Path | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Language switches, for one SAE of each kind that was trained on several languages."""
    on_many = [cell for cell in chosen if cell.corpus == "multilingual" and cell.k_mem is None]
    if not on_many:
        return []
    layer, k = on_many[0].layer, _first(chosen)[2]
    cells = [cell for cell in on_many if (cell.layer, cell.k, cell.seed) == (layer, k, 0)]
    documents = texts.multilingual(progress=progress) if languages is None else texts.read_languages(languages)
    documents = texts.split(documents)[1]
    held = texts.switching(documents, lm.tokenizer, budget.n_ctx, SWITCH_WINDOWS, REGION_TOKENS)
    source = ModelActivations(lm, layer, held.windows)
    names = [name for name in (TOPK, CURRENT, PAST) if any(cell.arch == name for cell in cells)]
    found = []
    for name in names:
        cell = next(cell for cell in cells if cell.arch == name)

        def measured(cell: Cell = cell) -> dict[str, Any]:
            windows = range(len(held.regions))
            return switches.measure(
                grid.trained(out, cell), source, windows, held.regions, held.languages, held.names, progress=progress
            )

        found.append({"name": cell.name} | parts(f"switches-{cell.name}", measured) | {"arch": cell.arch})
    return found
