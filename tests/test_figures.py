"""The figures in docs/evidence.md, docs/performance.md and README.md are those of the files that they name."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
EVIDENCE = json.loads((ROOT / "bench/results/evidence/evidence.json").read_text())
RUNS = [run | {"query": run["query"] if "contextual" in run["arch"] else None} for run in EVIDENCE["runs"]]


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a page by their first cell, each row by the names of its columns."""
    found: dict[str, list[dict[str, str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        found[head[0]] = [dict(zip(head, row, strict=True)) for row in rows]
    return found


SAES = {
    "TopK": ("topk", 16),
    "TopK, k = 24": ("topk", 24),
    "TopK, k = 32": ("topk", 32),
    "TopK, wider": ("topk-wide", 16),
    "BatchTopK": ("batch-topk", 16),
    "Temporal SAE": ("temporal-sae", 16),
    "Temporal Feature Analysis": ("temporal-features", 16),
    'contextual, `query="past"`': ("contextual-past", 16),
    'contextual, `query="current"`': ("contextual", 16),
}


@pytest.mark.parametrize("row", tables("docs/evidence.md")["SAE, k = 16"], ids=lambda row: row["SAE, k = 16"])
def test_fvu_and_bits(row: dict[str, str]) -> None:
    arch, k = SAES[row["SAE, k = 16"]]
    runs = [
        run
        for run in RUNS
        if (run["arch"], run["k"], run["corpus"], run["layer"], run["k_mem"]) == (arch, k, "english", 12, None)
    ]
    assert len(runs) == int(row["seeds"])
    assert f"{mean(run['fvu_exact'] for run in runs):.4f}" == row["FVU"]
    assert f"{runs[0]['n_params'] / 1e6:.2f}M" == row["parameters"]
    if row["bits a token"]:
        assert round(mean(run["bits_per_token"] for run in runs)) == int(row["bits a token"])


def test_how_many_features_it_is_worth() -> None:
    ratios = defaultdict(list)
    for cell in EVIDENCE["headline"]:
        ratios[cell["corpus"], cell["layer"], cell["query"], cell["k"]].append(cell["topk_ratio"])
    corpora = {"English": "english", "six languages": "multilingual"}
    for row in tables("docs/evidence.md")["k"]:
        for query in ("past", "current"):
            found = ratios[corpora[row["corpus"]], int(row["layer"]), query, int(row["k"])]
            assert f"{mean(found):.1f}" == row[f'`query="{query}"`'], row


def test_how_far_back_it_reads() -> None:
    runs = {cell["query"]: cell["look_back"] for cell in EVIDENCE["power"] if cell["k_mem"] is None}
    for row in tables("docs/evidence.md")["positions seen"]:
        (query,) = re.findall(r'"(\w+)"', row.pop("positions seen"))
        assert {far: f"{fvu:.4f}" for far, fvu in runs[query].items()} == row


def test_lasting_features() -> None:
    found = {(cell["region_length"], cell["seed"], cell["d_in"], cell["query"]): cell for cell in EVIDENCE["synthetic"]}
    seeds = {"second": 1, "third": 2}
    for row in tables("docs/evidence.md")["a feature lasts"]:
        lasts = row.pop("a feature lasts")
        seed = next((of for word, of in seeds.items() if word in lasts), 0)
        for name, shown in row.items():
            (query,) = re.findall(r'"(\w+)"', name) or [None]
            if shown:
                cell = found[int(lasts.split()[0]), seed, 64 if "half" in lasts else 128, query]
                assert shown == f"{cell['fires_per_region']:.1f} ({cell['fires_per_region_median']:.0f})", lasts


def test_times_and_memory() -> None:
    found = (ROOT / "bench" / "RESULTS.md").read_text()

    def measured(case: str, name: str) -> tuple[float, str]:
        (block,) = re.findall(rf"^{re.escape(case)}, cpu .*\n((?:  .*\n)+)", found, re.MULTILINE)
        (line,) = re.findall(rf"^  {re.escape(name)} {{2,}}([\d.]+) ms .*?(\d+) MiB$", block, re.MULTILINE)
        return float(line[0]), line[1]

    ops = {
        "the encoder's product alone (`torch.mm`)": ("topk_encode forward", "mm"),
        "`topk_encode`": ("topk_encode forward", "csae"),
        "`sparse_decode`": ("sparse_decode forward", "csae"),
        "look-back, forward and backward": ("look-back forward + backward", "csae"),
    }
    shown = tables("docs/performance.md")
    steps = {
        row["TopK training step"]: ("TopK training step", row["TopK training step"])
        for row in shown["TopK training step"]
    }
    for title, names in (("", ops), ("TopK training step", steps)):
        for row in shown[title]:
            case, name = names[row[title]]
            time, memory = measured(case, name.replace("PyTorch, dense", "PyTorch dense"))
            assert row["time"] == (f"{time:,.0f} ms" if time >= 10 else f"{time:.1f} ms"), row
            peak = row["memory beyond weights and moments"]
            assert not peak or peak.replace(",", "") == f"{memory} MiB", row


def test_what_a_shared_budget_and_looking_back_add() -> None:
    results = json.loads((ROOT / "bench/results/selections/cpu.json").read_text())["results"]
    found = {(result["case"], result["impl"]): result["median_ms"] for result in results}
    pairs = [
        ("topk_encode forward", "csae, above a threshold", "csae"),
        ("TopK training step", "csae, shared budget", "csae"),
        ("contextual training step, one sweep", "csae", "csae TopK step"),
    ]
    for row, (case, of, to) in zip(tables("docs/performance.md")["of"], pairs, strict=True):
        ms, other = found[case, of], found[case, to]
        assert (row["times"], row["ratio"]) == (f"{ms:.0f}, {other:.0f} ms", f"{ms / other:.2f}")


def test_the_lead_at_other_places() -> None:
    runs, leads = [], []
    for name in ("lead", "lead_hooks"):
        report = json.loads((ROOT / "bench/results/evidence" / f"{name}.json").read_text())
        runs, leads = runs + report["runs"], leads + report["leads"]
    same = {"selection": "batch", "d_sae": 2304, "tokens": 840_000, "lr": 4e-3, "seed": 0}
    same |= {"n_heads": 8, "d_value": 64, "d_memory": 256}

    def only(entries: list[dict], **wanted: object) -> dict:
        (entry,) = (of for of in entries if (same | wanted).items() <= of.items())
        return entry

    for row in tables("docs/evidence.md")["hook point"]:
        (hook,) = re.findall(r"`(.*?)`", row["hook point"])
        shown = list(row.values())[1:]
        for k, cell in zip((16, 24, 32), shown, strict=False):
            run = only(runs, hook=hook, arch="topk-wide", k=k)
            assert cell == f"{run['fvu']:.4f} ({run['l0']:.1f})"
        for arch, cell, lead in (("contextual-past", *shown[3:5]), ("contextual", *shown[5:])):
            run, worth = only(runs, hook=hook, arch=arch), only(leads, hook=hook, arch=arch)
            assert cell == f"{run['fvu']:.4f} ({run['l0']:.1f})"
            times = f"{worth['lead']:.{2 if arch == 'contextual-past' else 1}f}"
            assert lead == (f"({times})" if worth["beyond"] else times)
