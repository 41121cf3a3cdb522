"""`csae evidence` under torchrun: each rank makes a share of the SAEs and measurements, and all are made once."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import run

SPEEDS = ("tokens_per_s", "tokens_per_s_sweeps", "train_seconds", "seconds")


def _evidence(ranks: Any, out: Path, model: str) -> tuple[dict[str, Any], list[str]]:
    """What it gives, and what was made in this process."""
    from csae.bench.evidence import command, grid, synthetic, texts
    from csae.progress import quiet

    topics = pydoc_data.topics.topics
    texts.python_prose = lambda: [topics[name] for name in sorted(topics)[:40]]
    grid.HELD_OUT, command.LONGER, command.REGION_TOKENS = 8, 2, 8
    synthetic.run = partial(synthetic.run, steps=3)
    synthetic.cases = lambda: [synthetic.Case(16, query, d_in=32) for query in (None, "current")]
    command.page.write_page = lambda path, evidence: None
    command.page.write_figures = lambda folder, evidence: []
    made: list[str] = []
    train, write = grid.train, command.write_json

    def noted_train(sae: Any, source: Any, windows: Any, folder: Path, config: Any) -> None:
        made.append(folder.name)
        train(sae, source, windows, folder, config)

    def noted_write(file: Path, content: Any) -> None:
        if file.parent.name == "parts":
            made.append(file.stem)
        write(file, content)

    grid.train, command.write_json = noted_train, noted_write
    budget = grid.Budget(d_sae=40, tokens=1024, distinct=1024, n_ctx=32)
    how: dict[str, Any] = {"ks": (2,), "layers": (2,), "corpora": ("english",), "seeds": 1, "limit": 4}
    found = command.run_evidence(out, model, budget=budget, device="cpu", progress=quiet, ranks=ranks, **how)
    return json.loads(json.dumps(found)), made


def without_speeds(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: without_speeds(of) for name, of in found.items() if name not in SPEEDS}
    return [without_speeds(of) for of in found] if isinstance(found, list) else found


@pytest.mark.slow
def test_two_ranks_make_what_one_process_makes(tiny_model_path: Path, tmp_path: Path) -> None:
    ((alone, made_alone),) = run(1, _evidence, tmp_path / "alone", tiny_model_path)
    (first, by_first), (second, by_second) = run(2, _evidence, tmp_path / "ranks", tiny_model_path)
    assert first == second
    assert without_speeds(first) == without_speeds(alone)
    assert sorted(by_first + by_second) == sorted(made_alone)  # all once
    assert min(len(by_first), len(by_second)) >= len(made_alone) // 2 - 1
    ((again, made_again),) = run(1, _evidence, tmp_path / "ranks", tiny_model_path)
    assert again == first
    assert not made_again
    os.remove(next((tmp_path / "ranks" / "runs").iterdir()) / "evidence.json")
    found = run(3, _evidence, tmp_path / "ranks", tiny_model_path)
    assert sorted(len(made) for _, made in found) == [0, 0, 1]
