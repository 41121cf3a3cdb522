"""The demo from end to end on a tiny language model, twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from csae import TopKSAE
from csae.checkpoint import load_sae
from csae.data.activations import ModelActivations
from csae.demo import run_demo, wide_as
from csae.errors import UserError
from csae.progress import quiet

SENTENCE = "The sluice at the lower mill was opened on the third morning; water came down the race, slowly. "


@pytest.fixture
def options(tmp_path: Path, tiny_model_path: Path) -> dict[str, Any]:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"Chapter {number}. " + SENTENCE * (3 + number % 4))
    return {
        "out": tmp_path / "demo",
        "model": str(tiny_model_path),
        "text": text,
        "layer": 2,
        "k": 4,
        "d_sae": 48,
        "tokens": 1600,
        "epochs": 3,
        "n_ctx": 32,
        "batch_windows": 4,
        "eval_windows": 8,
        "device": "cpu",
        "progress": quiet,
    }


def test_demo_twice(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run_demo(**options)
    out = options["out"]
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results) >= {"model", "layer", "tokens", "saes"}
    assert (results["layer"], results["hook"]) == (2, "resid.out:1")
    topk, wide, contextual = results["saes"]
    assert [sae["arch"] for sae in results["saes"]] == ["topk", "topk-wide", "contextual"]
    for sae in results["saes"]:
        assert set(sae) >= {"arch", "k", "d_sae", "n_params", "fvu", "l0", "dead", "tokens_per_s"}
        assert sae["k"] == 4
        assert 0 < sae["l0"] <= 4
        assert sae["fvu"] > 0
        run = out / "runs" / sae["arch"]
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert metrics[-1]["tokens"] == results["tokens"]
        assert json.loads((run / "eval.json").read_text())["fvu"] == sae["fvu"]
        assert load_sae(run).n_params == sae["n_params"]
    assert contextual["fvu_exact"] == contextual["fvu"]
    assert topk["d_sae"] == contextual["d_sae"] == 48
    assert 0 <= wide["n_params"] - contextual["n_params"] < 2 * 16 + 1
    html = (out / "report.html").read_text()
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert len(data["tokens"]) > 32, "more than one passage"
    assert data["index"]["features"].keys() >= data["features"].keys() != set()
    assert data["beside"]["figures"]["arch"] == "topk"
    assert "How much each SAE misses" in html
    assert html.count("layer 2 (resid.out:1)") >= 2, "in the comparison and above the text"
    printed = capsys.readouterr()
    assert "topk-wide" in printed.out
    assert str(out / "report.html") in printed.err

    # The second run reads neither the language model's activations nor a training window.
    def forbidden(*args: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(ModelActivations, "read", forbidden)
    monkeypatch.setattr("csae.train.ready_steps", forbidden)
    again = run_demo(**options)
    for before, after in zip(results["saes"], again["saes"], strict=True):
        for key in before.keys() - {"tokens_per_s_sweeps", "eval_tokens_per_s"}:
            assert before[key] == after[key], key

    with pytest.raises(UserError, match=r"holds the activations of another demo \(layer: 2, wanted 1"):
        run_demo(**options | {"layer": 1})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 49}, "k: given 49; needed 1 to d_sae = 48"),
        ({"d_sae": 0}, "d_sae: given 0; needed at least 1"),
        ({"layer": 4}, "layer: given 4"),
        ({"n_ctx": 65}, "n_ctx: given 65"),
        ({"tokens": 0}, "tokens: given 0; needed at least 1"),
        ({"epochs": 0}, "epochs: given 0; needed at least 1"),
        ({"text": "no-such-file"}, "no such file or folder"),
    ],
)
def test_bad_options_are_said_before_the_long_steps(
    options: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_demo(**options | changed)
    assert not (options["out"] / "activations").exists()


def test_activations_that_a_kill_cut_short_are_made_again(options: dict[str, Any]) -> None:
    unfinished = options["out"] / "activations.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "activations-00001-of-00009.safetensors").write_bytes(b"half")
    run_demo(**options)
    assert not unfinished.exists()
    assert (options["out"] / "activations" / "activations.json").is_file()


def test_a_folder_with_other_activations_is_refused(options: dict[str, Any]) -> None:
    (options["out"] / "activations").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no activations of a demo: give another --out, or delete it"):
        run_demo(**options)


@pytest.mark.parametrize("d_in", [16, 576])
def test_wide_as(d_in: int) -> None:
    for n_params in (50_000, 50_001, 4_868_944):
        d_sae = wide_as(n_params, d_in)
        assert TopKSAE(d_in, d_sae, 1).n_params >= n_params > TopKSAE(d_in, d_sae - 1, 1).n_params


def test_a_demo_at_another_hook_point(options: dict[str, Any]) -> None:
    del options["layer"]
    results = run_demo(**options, hook="model.layers.1.mlp")
    assert (results["layer"], results["hook"]) == (None, "mlp.out:1")
    assert all("loss_recovered" in sae for sae in results["saes"])
    html = (options["out"] / "report.html").read_text()
    assert "mlp.out:1" in html
    assert "layer None" not in html
    assert load_sae(options["out"] / "runs" / "contextual").trained_on.hook == "mlp.out:1"
    with pytest.raises(UserError, match="holds the activations of another demo"):
        run_demo(**options, layer=2)
    with pytest.raises(UserError, match="--layer, --hook: both given"):
        run_demo(**options, layer=2, hook="mlp.out:1")
