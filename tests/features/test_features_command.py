"""`csae features`: builds beside a run, goes on, searches, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import command
from tiny_model import D_IN, PROSE

from csae import TopKSAE
from csae.data.language_model import LanguageModel
from csae.features.index import FeatureIndex

LAYER, N_CTX, D_SAE = 2, 16, 40


@pytest.fixture
def run(tmp_path: Path, tiny_model_path: Path, tiny_lm: LanguageModel) -> Path:
    torch.manual_seed(0)
    sae = TopKSAE(D_IN, D_SAE, 4)
    tokens = torch.tensor([tiny_lm.tokenizer.encode(PROSE)[:40]])
    acts = tiny_lm.activations(tokens, LAYER)[0, 1:].float()
    sae.initialise(acts.mean(dim=0), float(acts.std()))
    sae.save_pretrained(tmp_path / "run")
    data = {"model": str(tiny_model_path), "layer": LAYER, "n_ctx": N_CTX}
    job = {"sae": {}, "train": {}, "data": data, "origin": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps(job))
    (tmp_path / "mill.txt").write_text(PROSE, encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture
def csae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: Any) -> tuple[int, str]:
        given = ("features", *args, "--device", "cpu")
        code, out, errors = command(*given, monkeypatch=monkeypatch, capsys=capsys)
        return code, out + (errors if code else "")

    return call


def test_build_and_search(run: Path, csae: Any) -> None:
    code, printed = csae(run, "--text", run.parent / "mill.txt")
    assert code == 0, printed
    assert "tokens of mill.txt; search it" in printed
    with FeatureIndex(run / "features.db") as index:
        number, times, words = next(row for row in index.features() if row[2][0][0].strip().isalpha())
        assert index.about["place"].startswith(f"layer {LAYER} of ")
    (run / "labels.json").write_text(json.dumps({str(number): "of mills"}))
    code, printed = csae(run, "--find", words[0][0])
    assert code == 0
    assert f"#{number} (of mills)" in printed
    assert "#" not in csae(run, "--find", "no such token")[1]
    assert f"#{number} (of mills)  by its label" in csae(run, "--find", "MILLS")[1]
    code, printed = csae(run, "--feature", number)
    assert f"#{number} (of mills)  active at {times:,} of " in printed
    assert f"[{words[0][0]}]" in printed
    code, printed = csae(run, "--raises", words[0][0], "-n", 3)
    assert printed.count("raises") == 3
    code, printed = csae(run, "--passage", "lower", "-n", 1)
    assert printed.count("\n") == 1
    assert "window" in printed


def test_refused(run: Path, csae: Any) -> None:
    text = run.parent / "mill.txt"
    for args, says in (
        ((run,), "does not say what data it was trained on"),
        ((run, "--find", "a"), "no such file"),
        ((run, "--find", "a", "--feature", 1), "--find, --feature: both given; needed one search"),
        ((run, "--find", "a", "--text", text), "--text, --find: both given"),
        ((run, "--text", text, "--layer", 1, "-o", run), "it is a folder"),
    ):
        code, printed = csae(*args)
        assert code == 2
        assert says in printed.strip().splitlines()[-1]
    assert csae(run, "--text", text)[0] == 0
    code, printed = csae(run, "--text", text, "--n-ctx", 20)
    assert code == 2
    assert "an index of something else (n_ctx: 16, now 20" in printed
    code, printed = csae(run, "--feature", D_SAE)
    assert code == 2
    assert "nowhere new in the text" in printed
