"""`csae train`, `csae eval` and `csae hooks` at hook points other than the residual stream, and for transcoders."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import PROSE

from csae.__main__ import main
from csae.checkpoint import load_sae
from csae.cli import cli
from csae.data.activations import ModelActivations
from csae.data.language_model import LanguageModel
from csae.data.places import Place
from csae.data.text import TokenWindows
from csae.errors import UserError
from csae.evaluate import evaluate
from csae.evaluate_run import evaluate_run, evaluate_runs

SMALL = ["--d-sae", "32", "--k", "3", "--batch-windows", "2", "--tokens", "400", "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(PROSE * 12)
    return file


def csae(*args: object) -> None:
    cli([str(arg) for arg in args], standalone_mode=False)


def test_runs_are_evaluated_where_each_reads(
    tiny_model_path: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--model", tiny_model_path, "--text", text, "--n-ctx", "16", "--held-out", "0.2"]
    places = {
        "stream": ["--layer", "2"],
        "mlp": ["--hook", "layers.1.mlp"],
        "same stream": ["--hook", "resid.in:2"],
        "transcoder": ["--from", "mlp.in:1", "--to", "mlp.out:1"],
    }
    for name, where in places.items():
        csae("train", "-o", tmp_path / name, *data, *where, *SMALL)
    origins = {name: json.loads((tmp_path / name / "run.json").read_text())["origin"] for name in places}
    assert {name: {key: origins[name].get(key) for key in ("layer", "hook", "hook_to")} for name in places} == {
        "stream": {"layer": 2, "hook": None, "hook_to": None},
        "mlp": {"layer": None, "hook": "mlp.out:1", "hook_to": None},
        "same stream": {"layer": 2, "hook": None, "hook_to": None},
        "transcoder": {"layer": None, "hook": "mlp.in:1", "hook_to": "mlp.out:1"},
    }
    loads: list[str] = []
    load = LanguageModel.load.__func__  # type: ignore[attr-defined]

    def counted(of: type[LanguageModel], name: str, *args: Any, **options: Any) -> LanguageModel:
        loads.append(name)
        return load(of, name, *args, **options)

    monkeypatch.setattr(LanguageModel, "load", classmethod(counted))
    capsys.readouterr()
    csae("eval", *(tmp_path / name for name in places), "--device", "cpu", "--ce-windows", "2")
    assert len(loads) == 1, "the model is loaded once for all"
    csae(
        "view", tmp_path / "mlp", "--text", text, "--max-tokens", "40", "-o", tmp_path / "view.html", "--device", "cpu"
    )
    assert "mlp.out:1" in (tmp_path / "view.html").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"stream: on .* layer 2 of \S+ \(resid.out:1\)", shown)
    assert re.search(r"transcoder: on .* mlp.in:1 to mlp.out:1 of", shown)
    found = {name: json.loads((tmp_path / name / "eval.json").read_text()) for name in places}
    assert found["stream"]["fvu"] == found["same stream"]["fvu"]
    assert (found["transcoder"]["hook"], found["transcoder"]["hook_to"]) == ("mlp.in:1", "mlp.out:1")
    assert all("ce_sae" in one and one["which"] == "held out" for one in found.values())


def untimed(found: dict[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in found.items() if not name.startswith("tokens_per_s")}


def test_several_runs_are_evaluated_in_one_go_to_the_same_figures(
    tiny_model_path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--model", tiny_model_path, "--text", text, "--n-ctx", "16", "--held-out", "0.2"]
    places = {
        "topk": ["--layer", "2", "--arch", "topk"],
        "contextual": ["--layer", "2"],
        "mlp": ["--hook", "layers.1.mlp"],
        "transcoder": ["--from", "mlp.in:1", "--to", "mlp.out:1"],
    }
    for name, where in places.items():
        csae("train", "-o", tmp_path / name, *data, *where, *SMALL)
    alone = {}
    for name in places:
        csae("eval", tmp_path / name, "--device", "cpu", "--ce-windows", "3")
        alone[name] = untimed(json.loads((tmp_path / name / "eval.json").read_text()))

    counts = {"read": 0, "cross_entropy": 0}

    def count(name: str) -> None:
        method = getattr(LanguageModel, name)

        def counted(self: LanguageModel, *args: Any) -> Any:
            counts[name] += 1
            return method(self, *args)

        monkeypatch.setattr(LanguageModel, name, counted)

    for name in counts:
        count(name)
    folders = [tmp_path / name for name in places]
    csae("eval", *folders, "--device", "cpu", "--ce-windows", "3")
    for name in places:
        assert untimed(json.loads((tmp_path / name / "eval.json").read_text())) == alone[name]
    # One clean pass, one of zeros for each of three places, and each contextual SAE has two forms.
    assert counts["cross_entropy"] == 1 + 3 + 1 + 3 * 2
    together, counts["read"] = counts["read"], 0
    csae("eval", folders[0], "--device", "cpu", "--ce-windows", "3")
    assert together == counts["read"], "the model reads the windows once for all places"
    monkeypatch.setattr(sys.modules["csae.cli.evaluate"], "AT_ONCE_BYTES", 1)
    csae("eval", *folders, "--device", "cpu", "--ce-windows", "3")
    for name in places:
        assert untimed(json.loads((tmp_path / name / "eval.json").read_text())) == alone[name]


def test_of_several_runs_the_one_that_is_broken_is_named(tiny_model_path: Path, text: Path, tmp_path: Path) -> None:
    data = ["--model", tiny_model_path, "--text", text, "--n-ctx", "16", "--held-out", "0.2", "--layer", "2"]
    for name in ("one", "other"):
        csae("train", "-o", tmp_path / name, *data, *SMALL)
    saes = {name: load_sae(tmp_path / name) for name in ("one", "other")}
    with torch.no_grad():
        saes["other"].W_dec[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"other: NaN or Inf in W_dec of the SAE"):
        evaluate_runs([(tmp_path / name, sae) for name, sae in saes.items()], device="cpu")


def test_saved_activations_of_several_places_share_the_passes(
    tiny_model_path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--model", tiny_model_path, "--text", text, "--n-ctx", "16"]
    hooks = ["--hook", "mlp.out:0", "--hook", "mlp.out:1"]
    csae("cache", "-o", tmp_path / "acts", *data, *hooks, "--device", "cpu")
    saes = {}
    for hook in ("mlp.out:0", "mlp.out:1"):
        run = tmp_path / hook[-1]
        csae("train", "-o", run, "--activations", tmp_path / "acts", "--hook", hook, "--held-out", "0.2", *SMALL)
        saes[run] = load_sae(run)
    given = {"model": str(tiny_model_path)}
    alone = [untimed(evaluate_run(run, sae, given, ce_windows=2, device="cpu")) for run, sae in saes.items()]
    passes: list[bool] = []
    monkeypatch.setattr(
        LanguageModel,
        "cross_entropy",
        lambda self, *args, of=LanguageModel.cross_entropy: passes.append(len(args) == 1) or of(self, *args),
    )
    together = evaluate_runs(list(saes.items()), given, ce_windows=2, device="cpu")
    assert [untimed(found) for found in together] == alone
    assert (len(passes), sum(passes)) == (1 + 2 + 2 * 2, 1)


@torch.no_grad()
def test_the_figures_of_a_transcoder(tiny_model_path: Path, text: Path, tmp_path: Path) -> None:
    data = ["--model", tiny_model_path, "--text", text, "--n-ctx", "16", "--held-out", "0.2"]
    csae("train", "-o", tmp_path / "run", *data, "--from", "mlp.in:1", "--to", "mlp.out:1", *SMALL)
    sae = load_sae(tmp_path / "run")
    lm = LanguageModel.load(tiny_model_path, device="cpu")
    tokens = torch.randint(1, 290, (6, 16), generator=torch.Generator().manual_seed(0)).int()
    source = ModelActivations(lm, Place("mlp.in:1", "mlp.out:1"), TokenWindows(tokens, torch.zeros_like(tokens)))
    found = evaluate(sae, source, range(6), lm, ce_windows=6)
    batch = source.read(range(6))
    assert batch.target is not None
    x_hat = sae(batch.acts, batch.mask).x_hat
    x, wrong = batch.target[batch.mask].double(), (batch.target - x_hat)[batch.mask].double()
    expected = float(wrong.square().sum() / (x - x.mean(dim=0)).square().sum())
    assert found["fvu"] == pytest.approx(expected, rel=1e-5)
    mlp, counted = lm.model.model.layers[1].mlp, batch.mask[:, :-1]
    for name, put_in in (("ce_sae", x_hat), ("ce_zero", torch.zeros_like(x_hat))):
        handle = mlp.register_forward_hook(
            lambda module, args, output, put_in=put_in: put_in.where(batch.mask[..., None], output)
        )
        loss = float(lm.cross_entropy(tokens.long())[counted].double().mean())
        handle.remove()
        assert found[name] == pytest.approx(loss, rel=1e-6)
    own = ModelActivations(lm, "mlp.out:1", source.token_windows)
    with pytest.raises(ValueError, match=r"trained on mlp.in:1 to mlp.out:1 of .*, and this is mlp.out:1 of"):
        evaluate(sae, own, range(6), lm)


def test_hooks_are_listed(tiny_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csae("hooks", tiny_model_path, "--device", "cpu")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mlp.out:*", "0", "to", "2", "16", "model.layers.*.mlp", "blocks.*.hook_mlp_out"] in rows
    assert ["model.layers.*.mlp.down_proj", "32", "16"] in rows
    assert "resid.out:2 is --layer 3." in " ".join(word for row in rows for word in row)
    csae("hooks", tiny_model_path, "resid.out:*", "--device", "cpu")
    out = capsys.readouterr().out
    assert out.count("resid.out:1 ") == out.count("blocks.1.hook_resid_post") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hook", "mlp.uot:1"], "has no such place; `csae hooks MODEL` lists"),
        (["--hook", "mlp.out:7"], "has blocks 0 to 2"),
        (["--hook", "model.rotary_emb"], "needed [2, 4, d]"),
        (["--from", "mlp.in:1"], "--from, --to: given one without the other"),
        (["--from", "mlp.in:1", "--to", "mlp.out:1", "--layer", "2"], "--from and --to: given with --layer or --hook"),
        (["--from", "mlp.out:1", "--to", "mlp.in:1"], "before mlp.out:1; needed the other order"),
        (["--from", "mlp.in:*", "--to", "mlp.out:1"], "3 and 1 places"),
    ],
)
def test_a_bad_place_is_one_line(
    options: list[str],
    message: str,
    tiny_model_path: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["train", "-o", tmp_path / "run", "--model", tiny_model_path, "--text", text, "--n-ctx", "16", *options]
    monkeypatch.setattr("sys.argv", ["csae", *map(str, [*args, *SMALL])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert not (tmp_path / "run").exists()
