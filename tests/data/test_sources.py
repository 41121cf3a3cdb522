"""What a run remembers of its data: a beginning of sequence, and whether position 0 takes part."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_kinds import with_bos
from transformers import AutoTokenizer

from csae import TopKSAE, demo
from csae.cli import main
from csae.data.hook_points import HookPoint
from csae.data.language_model import LanguageModel
from csae.data.sources import open_source
from csae.data.text import TokenWindows, beginning
from csae.errors import UserError
from csae.pages.view import read_windows
from csae.trained_on import TrainedOn

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
BOS = 0
SMALL = ["--d-sae", "40", "--k", "4", "--arch", "topk", "--batch-windows", "4", "--tokens", "64"]


@pytest.fixture(scope="module")
def bos_model(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a tokenizer that begins each text."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(tiny_model_path, folder)
    with_bos(AutoTokenizer.from_pretrained(folder), "<|endoftext|>").save_pretrained(folder)
    assert beginning(AutoTokenizer.from_pretrained(folder)) == (BOS,)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "fox.txt").write_text(TEXT)
    return tmp_path / "fox.txt"


def csae(*args: object) -> None:
    """Run a command; what it refuses is raised."""
    before = sys.argv
    sys.argv = ["csae", *map(str, args)]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise UserError(f"exit code {stop.code}") from stop
    finally:
        sys.argv = before


def from_model(model: Path, text: Path) -> list[object]:
    return ["--model", model, "--layer", 2, "--text", text, "--n-ctx", 16, "--device", "cpu"]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tokens of all windows that go through a model from now on."""
    read: list[torch.Tensor] = []
    original = LanguageModel.read

    def noting(self: LanguageModel, tokens: torch.Tensor, points: Sequence[HookPoint]) -> list[torch.Tensor]:
        read.append(tokens)
        return original(self, tokens, points)

    monkeypatch.setattr(LanguageModel, "read", noting)
    return read


def remembered(run: Path) -> tuple[Any, Any]:
    job = json.loads((run / "run.json").read_text())
    return job["origin"].get("bos"), job["data"].get("bos")


@pytest.mark.parametrize(
    ("convention", "options", "found"),
    [(True, [], True), (True, ["--no-bos"], None), (False, [], None), (False, ["--bos"], True)],
    ids=["convention", "not given", "no convention", "given"],
)
def test_a_run_remembers_its_beginning(
    convention: bool,
    options: list[str],
    found: bool | None,
    bos_model: Path,
    tiny_model_path: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, run = bos_model if convention else tiny_model_path, tmp_path / "run"
    if not convention and options:  # the tiny tokenizer names none
        model = tmp_path / "named"
        shutil.copytree(tiny_model_path, model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.save_pretrained(model)
    args = from_model(model, text)
    csae("train", "-o", run, *args, *SMALL, *options)
    assert remembered(run) == (found, found)
    first = (run / "model.safetensors").read_bytes()
    csae("train", "-o", run, *args, *SMALL)  # goes on as it was, the option or not
    assert (run / "model.safetensors").read_bytes() == first

    read = watched(monkeypatch)
    csae("eval", run, "--device", "cpu", "--ce-windows", "1")
    csae("eval", run, "--text", text, "--device", "cpu", "--ce-windows", "1")
    csae("view", run, "--text", text, "--max-tokens", "40", "-o", tmp_path / "view.html", "--device", "cpu")
    assert len(read) > 3
    for tokens in read:
        assert (tokens[:, 0] == BOS).all() == bool(found)


@pytest.mark.parametrize("said", [True, False, None])
def test_an_sae_without_its_run_says_it_too(
    said: bool | None, bos_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tokenizer does, where it does not say."""
    sae = TopKSAE(16, 40, 4)
    sae.trained_on = TrainedOn(model=str(bos_model), layer=2, bos=said)
    sae.save_pretrained(tmp_path / "sae")
    read = watched(monkeypatch)
    csae("eval", tmp_path / "sae", *from_model(bos_model, text), "--ce-windows", "1")
    csae("view", tmp_path / "sae", *from_model(bos_model, text), "--max-tokens", "40", "-o", tmp_path / "view.html")
    assert len(read) > 3
    for tokens in read:
        assert (tokens[:, 0] == BOS).all() == (said is not False)


def test_an_older_run_goes_on_without_a_beginning(bos_model: Path, text: Path, tmp_path: Path) -> None:
    """Its run.json says nothing of it."""
    args = from_model(bos_model, text)
    csae("train", "-o", tmp_path / "run", *args, *SMALL, "--no-bos")
    assert remembered(tmp_path / "run") == (None, None)
    before = (tmp_path / "run" / "run.json").read_bytes()
    csae("train", "-o", tmp_path / "run", *args, *SMALL)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    with pytest.raises(UserError):
        csae("train", "-o", tmp_path / "run", *args, *SMALL, "--bos")


def test_a_cache_has_a_beginning_and_says_so(bos_model: Path, text: Path, tmp_path: Path) -> None:
    csae("cache", "-o", tmp_path / "acts", *from_model(bos_model, text))
    stored = load_file(next((tmp_path / "acts").glob("*.safetensors")))
    assert (stored["tokens"][:, 0] == BOS).all()
    assert not stored["mask"][:, 0].any()
    assert stored["mask"][:, 1:].all()
    csae("train", "-o", tmp_path / "run", "--activations", tmp_path / "acts", "--device", "cpu", *SMALL)
    assert remembered(tmp_path / "run") == (True, True)


@pytest.mark.parametrize("convention", [False, True])
def test_the_demo_begins_as_the_tokenizer_does(
    convention: bool,
    bos_model: Path,
    tiny_model_path: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Enough(Exception):
        pass

    def look(lm: LanguageModel, layer: int, windows: TokenWindows) -> None:
        assert (windows.tokens[:, 0] == BOS).all() == convention
        assert windows.begin == ((BOS,) if convention else ())
        raise Enough

    monkeypatch.setattr(demo, "ModelActivations", look)
    with pytest.raises(Enough):
        demo.run_demo(tmp_path / "demo", str(bos_model if convention else tiny_model_path), text, 2, n_ctx=16)


@pytest.mark.parametrize("keep", [False, True])
def test_position_0_is_kept_where_asked_for(keep: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    acts = torch.randn(24, 16, 8)
    acts[:, 3] *= 100
    (tmp_path / "acts").mkdir()
    save_file({"activations": acts}, tmp_path / "acts" / "a.safetensors")
    run, options = tmp_path / "run", ["--keep-first"] if keep else []
    where = ["--activations", tmp_path / "acts", "--device", "cpu"]
    csae("train", "-o", run, *where, *SMALL, *options)
    csae("train", "-o", run, *where, *SMALL)
    job = json.loads((run / "run.json").read_text())
    assert job["origin"].get("keep_first", False) is job["data"].get("keep_first", False) is keep
    csae("eval", run, "--device", "cpu")
    per_window = json.loads((run / "eval.json").read_text())["tokens"]
    assert per_window == 16 if keep else 14
    csae("eval", run, *where, "--trained-windows")
    assert json.loads((run / "eval.json").read_text())["tokens"] == 24 * (16 if keep else 14)
    csae("eval", run, *where, "--trained-windows", "--no-keep-first")
    assert json.loads((run / "eval.json").read_text())["tokens"] == 24 * 14


def test_with_a_beginning_it_stays_out_all_the_same(bos_model: Path, text: Path, tmp_path: Path) -> None:
    csae("cache", "-o", tmp_path / "acts", *from_model(bos_model, text), "--keep-first")
    stored = load_file(next((tmp_path / "acts").glob("*.safetensors")))
    assert not stored["mask"][:, 0].any()
    assert stored["mask"][:, 1:].all()
    assert json.loads((tmp_path / "acts" / "activations.json").read_text())["keep_first"] is True
    source, _ = open_source({"activations": str(tmp_path / "acts"), "keep_first": True})
    assert source.describe()["keep_first"] is True


def test_options_that_can_do_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = torch.ones(8, 16, dtype=torch.bool)
    save_file({"activations": torch.randn(8, 16, 8), "mask": mask}, tmp_path / "a.safetensors")
    for options, message in [
        (["--keep-first"], "was written with masks that leave position 0 and outliers out; needed activations without"),
        (["--bos"], "--bos, --no-bos: given with --activations, which are as they were made"),
        (["--no-bos"], "--bos, --no-bos: given with --activations"),
    ]:
        with pytest.raises(UserError):
            csae("train", "-o", tmp_path / "run", "--activations", tmp_path, "--device", "cpu", *SMALL, *options)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("amount", ["-0.5", "0", "1", "1.5", "nan", "inf", "-inf"])
def test_a_share_to_hold_out_is_checked_first(amount: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="exit code 2"):
        csae("train", "-o", tmp_path / "run", "--activations", tmp_path / "none", "--held-out", amount)
    said = capsys.readouterr().err
    assert said == f"csae: --held-out: given {float(amount)}; needed a share of the windows, above 0 and below 1\n"


def test_a_view_joins_to_its_text_with_a_beginning(bos_model: Path) -> None:
    lm = LanguageModel.load(bos_model, device="cpu")
    text = TEXT[:300] + " naïve 日本語"
    windows, whole = read_windows(lm, 2, text, 24, begin=beginning(lm.tokenizer))
    assert whole
    assert len(windows) > 3
    assert "".join(piece for window in windows for piece in window.pieces or []) == text
    for window in windows:
        assert window.tokens[0] == BOS
        assert (window.tokens[1:] != BOS).all()
        assert len(window.tokens) == len(window.mask) == len(window.pieces or []) <= 24
        assert window.mask.tolist() == [False] + [True] * (len(window.tokens) - 1)
    kept, _ = read_windows(lm, 2, text, 24, begin=(), keep_first=True)
    assert all(window.mask.all() for window in kept)
