"""`csae view` on the command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import command
from tiny_model import D_IN
from viewed import D_SAE, LAYER, TEXT, K, fitted

from csae import ContextualSAE
from csae.data.language_model import LanguageModel
from csae.pages.view import Window
from csae.sae import SAE


@pytest.fixture
def runs(tmp_path: Path, tiny_model_path: Path, windows: list[Window], per_token: SAE) -> tuple[Path, Path]:
    torch.manual_seed(0)
    sae = fitted(ContextualSAE(D_IN, D_SAE, K, n_heads=2, d_head=4, d_value=6), windows)
    data = {"model": str(tiny_model_path), "layer": LAYER, "n_ctx": 8}
    for name, one in (("contextual", sae), ("topk", per_token)):
        one.save_pretrained(tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps({"sae": {}, "train": {}, "data": data, "origin": None}))
    return tmp_path / "contextual", tmp_path / "topk"


def view_command(*args: Any, **options: Any) -> tuple[int, str]:
    code, out, errors = command("view", *args, "--device", "cpu", **options)
    return code, out + errors


def test_command(runs: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "mill.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    args = ["--text", text, "-o", tmp_path / "view.html"]
    code, printed = view_command(runs[0], "--beside", runs[1], *args, **options)
    assert code == 0, printed
    written = (tmp_path / "view.html").read_text()
    assert "topk, the per-token SAE beside it" in written
    data = re.search(r'id="data">(.*?)</script>', written, re.DOTALL)
    assert data is not None
    found = json.loads(data[1])
    assert len(found["cuts"]) == math.ceil(len(found["tokens"]) / 64) - 1, "8 times the 8 that were trained on"
    assert view_command(runs[1], *args, "--max-tokens", 30, "--n-ctx", 10, **options)[0] == 0
    assert "30 tokens, where the text was cut" in (tmp_path / "view.html").read_text()
    code, printed = view_command(runs[1], *args, "--n-ctx", 0, **options)
    assert code == 2
    assert "Invalid value for '--n-ctx': 0 is not in the range x>=2" in printed
    assert "loading" not in printed
    assert view_command(runs[1], *args[:2], "-o", tmp_path, "--max-tokens", 5, **options)[0] == 2

    (runs[1] / "run.json").write_text(json.dumps({"sae": {}, "train": {}, "data": {"layer": 1}, "origin": None}))
    code, printed = view_command(runs[0], "--beside", runs[1], *args, **options)
    assert code == 2
    assert f"topk is of layer 1 (resid.out:0); needed layer {LAYER} (resid.out:1)" in printed
    code, printed = view_command(runs[1], *args, **options)
    assert code == 2
    assert "--model: not given, and" in printed
    (runs[1] / "run.json").unlink()  # what says nothing may stand beside anything
    assert view_command(runs[0], "--beside", runs[1], *args, **options)[0] == 0
    assert view_command(runs[0], "--text", tmp_path / "none.txt", **options)[0] == 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such folder" in view_command(tmp_path / "nowhere", *args, **options)[1]


def test_the_model_runs_as_it_did_in_training(runs: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "mill.txt"
    text.write_text(TEXT, encoding="utf-8")
    job = json.loads((runs[1] / "run.json").read_text())
    config = json.loads((runs[1] / "config.json").read_text())
    on = {"model": job["data"]["model"], "layer": LAYER, "hook": "resid_post"}
    (runs[1] / "config.json").write_text(json.dumps(config | {"trained_on": on}))
    dtypes = []
    load = LanguageModel.load.__func__  # type: ignore[attr-defined]
    noted = classmethod(lambda cls, name, device, dtype: dtypes.append(dtype) or load(cls, name, device, dtype))
    monkeypatch.setattr(LanguageModel, "load", noted)
    options = {"monkeypatch": monkeypatch, "capsys": capsys}
    for said, dtype in ({}, None), ({"lm_dtype": "bfloat16"}, torch.bfloat16):
        (runs[1] / "run.json").write_text(json.dumps(job | {"origin": {**job["data"], **said}}))
        commands = [
            ("view", runs[1], "--text", text, "-o", tmp_path / "view.html"),
            ("features", runs[1], "--text", text, "-o", tmp_path / f"{dtype}.db"),
            ("export", runs[1], "--to", "delphi", "--text", text, "-o", tmp_path / str(dtype)),
        ]
        for given in commands:
            dtypes.clear()
            code, _, errors = command(*given, "--device", "cpu", **options)
            assert code == 0, errors
            assert set(dtypes) == {dtype}, given[0]
