"""The command line, from end to end on a tiny language model, and what it says of bad input."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from csae import Adam, ContextualSAE
from csae.cli import cli, main
from csae.config import SAEConfig, TrainConfig
from csae.errors import shown

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60


def csae(*args, capsys=None):
    """Run the program in this process; gives exit code, stdout and stderr."""
    before = sys.argv
    sys.argv = ["csae", *map(str, args)]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "fox.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def from_model(tiny_model_path, text):
    return ["--model", tiny_model_path, "--layer", "2", "--text", text, "--n-ctx", "16", "--device", "cpu"]


PLAIN = ["--d-sae", "40", "--k", "4", "--batch-windows", "4"]
SMALL = [*PLAIN, "--heads", "2", "--d-head", "4", "--d-value", "4"]


def test_train_cache_eval_from_end_to_end(from_model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = csae(
        "train", "-o", "run", *from_model, *SMALL, "--tokens", "640", "--exact-from", "0.5", capsys=capsys
    )
    assert code == 0
    assert "trained: run" in out
    code, _, err = csae("cache", "-o", "acts", *from_model, "--dtype", "float32", capsys=capsys)
    assert code == 0, err
    shards = load_file(next((tmp_path / "acts").glob("*.safetensors")))
    assert shards["activations"].shape[1:] == (16, 16)
    args = ["--activations", "acts", "--device", "cpu"]
    assert csae("train", "-o", "plain", "--arch", "topk", *args, *PLAIN, "--tokens", "640", capsys=capsys)[0] == 0

    code, out, err = csae("eval", "run", "plain", "--device", "cpu", "--ce-windows", "2", capsys=capsys)
    assert code == 0, err
    assert "run" in out
    assert "plain" in out
    assert err.count("loading tiny-model") == 1
    for bar in ("evaluating of run", "cross-entropy of run", "evaluating of plain"):
        assert f"{bar}: " in err
    contextual, plain = (json.loads((tmp_path / run / "eval.json").read_text()) for run in ("run", "plain"))
    assert {"fvu", "fvu_exact", "fvu_sweeps", "l0", "dead", "cosine", "tokens_per_s"} <= set(contextual)
    assert {"ce_clean", "ce_sae", "ce_zero", "loss_recovered"} <= set(contextual)
    assert contextual["arch"] == "contextual"
    assert plain["arch"] == "topk"
    assert "ce_clean" not in plain  # it was trained on saved activations, and no model was named

    # By another route, and with a model to splice into. The text repeats itself: each window was trained on.
    again = ["eval", "plain", *args, "--windows", "5", "--model", from_model[1], "--layer", "2"]
    code, _, err = csae(*again, capsys=capsys)
    assert code == 2
    assert "it trained on all" in err
    code, _, err = csae(*again, "--trained-windows", capsys=capsys)
    assert code == 0, err
    again = json.loads((tmp_path / "plain" / "eval.json").read_text())
    assert again["windows"] == 5
    assert again["loss_recovered"] is not None


def test_a_folder_that_someone_else_wrote(tmp_path, capsys):
    save_file({"activations": torch.randn(20, 9, 12).half()}, tmp_path / "theirs.safetensors")
    args = ["--activations", tmp_path, "--device", "cpu"]
    run = tmp_path / "run"
    code, _, err = csae("train", "-o", run, *args, *SMALL, "--held-out", "0.2", "--tokens", "400", capsys=capsys)
    assert code == 0, err
    assert csae("eval", run, *args, capsys=capsys)[0] == 0
    assert json.loads((run / "eval.json").read_text())["tokens"] == 4 * 8  # position 0 is left out
    assert csae("eval", run, *args, "--trained-windows", capsys=capsys)[0] == 0
    assert json.loads((run / "eval.json").read_text())["tokens"] == 20 * 8


def test_the_same_command_goes_on(from_model, tmp_path, capsys):
    args = ["train", "-o", tmp_path / "run", *from_model, *SMALL, "--tokens", "640"]
    assert csae(*args, capsys=capsys)[0] == 0
    assert csae(*args, capsys=capsys)[0] == 0  # it is done: nothing to do
    code, _, err = csae(*args, "--lr", "0.5", capsys=capsys)
    assert code == 2
    assert "holds another run (--lr: given 0.5, the run has 0.001)" in err


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_a_clear_line(from_model, tmp_path):
    args = ["train", "-o", tmp_path / "run", *from_model, *SMALL, "--tokens", "6400000"]
    program = subprocess.Popen(
        [sys.executable, "-c", "from csae.cli import main; main()", *map(str, args)], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size > 0):
        time.sleep(0.2)
    os.kill(program.pid, signal.SIGINT)
    _, err = program.communicate(timeout=120)
    assert program.returncode == 130
    assert "stopped after step" in err.splitlines()[-1]
    assert "the same command goes on from there" in err.splitlines()[-1]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_info_says_what_is_here(capsys, monkeypatch):
    code, out, _ = csae("info", capsys=capsys)
    assert code == 0
    for word in ("csae", "torch", "triton", "topk_encode", "sparse_decode", "lookback_attention"):
        assert word in out
    from csae.kernels import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "no compiler was found")
    assert "no compiler was found" in csae("info", capsys=capsys)[1]


def test_help_lists_the_commands(capsys):
    out = csae("--help", capsys=capsys)[1]
    assert all(command in out for command in ("demo", "train", "eval", "cache", "info"))
    assert "--activations" in csae("train", "--help", capsys=capsys)[1]


def test_the_options_of_train_are_the_fields_of_what_they_fill():
    options = {parameter.name: parameter for parameter in cli.commands["train"].params}
    fields = [field for config in (SAEConfig, TrainConfig) for field in dataclasses.fields(config)]
    for field in fields:
        if field.name not in ("steps", "start"):
            option = options[field.name]
            default = option.get_default(click.Context(cli.commands["train"]))
            assert field.default is None or default in (field.default, (field.default,), [field.default])
            assert option.help == field.metadata["help"]
    # The SAE's own arguments have the same defaults, but for the selection: a TopKSAE selects k unless it is told.
    own = inspect.signature(ContextualSAE).parameters
    for field in dataclasses.fields(SAEConfig):
        if field.name == "selection":
            continue
        name = {"heads": "n_heads"}.get(field.name, field.name)
        if name in own and own[name].default is not inspect.Parameter.empty:
            assert own[name].default == field.default
    assert inspect.signature(Adam).parameters["look_back_lr"].default == TrainConfig(steps=1).look_back_lr


def bad(name, tmp_path, model, text):
    """Arguments that can't work."""
    data = ["--model", model, "--layer", "2", "--text", text, "--n-ctx", "16", "--device", "cpu"]
    train = ["train", "-o", tmp_path / "run", *SMALL]
    empty, binary, nan, cut, foreign = (
        tmp_path / part for part in ("empty.txt", "binary.txt", "nan", "cut", "foreign")
    )
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00\x01" * 99)
    for folder in (nan, cut, foreign):
        folder.mkdir()
    acts = torch.randn(20, 9, 12)
    save_file({"activations": acts}, cut / "a.safetensors")
    (cut / "a.safetensors").write_bytes((cut / "a.safetensors").read_bytes()[:-50])
    acts[:, 4] = float("nan")
    save_file({"activations": acts}, nan / "a.safetensors")
    save_file({"decoder": torch.zeros(3)}, foreign / "a.safetensors")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_text('{"arch": "gated"}')
    return {
        "missing model": [*train, *data, "--model", tmp_path / "nowhere"],
        "missing layer": [*train, *data, "--layer", "4"],
        "layer zero": [*train, *data, "--layer", "0"],
        "k above d_sae": [*train, *data, "--k", "41"],
        "empty text": [*train, *data, "--text", empty],
        "binary text": [*train, *data, "--text", binary],
        "missing text": [*train, *data, "--text", tmp_path / "nowhere.txt"],
        "long windows": [*train, *data, "--n-ctx", "65"],
        "too little text": [*train, *data, "--batch-windows", "4000"],
        "no source": train,
        "no layer": [*train, "--model", model, "--text", text],
        "two texts": [*train, *data, "--dataset", "some/data"],
        "no activations": [*train, "--activations", tmp_path / "nowhere"],
        "nan activations": [*train, "--activations", nan, "--held-out", "0.2"],
        "cut activations": [*train, "--activations", cut],
        "foreign activations": [*train, "--activations", foreign],
        "held out all": [*train, *data, "--held-out", "1.0"],
        "no device": [*train, *data, "--device", "abacus"],
        "negative lr": [*train, *data, "--lr", "-1"],
        "no run": ["eval", tmp_path / "nowhere"],
        "foreign run": ["eval", saved],
        "no command": ["trian"],
        "no option": ["train", "--layres", "3"],
        "no number": ["train", "-o", tmp_path / "run", "--k", "many"],
        "demo without model": ["demo", "-o", tmp_path / "demo", "--model", tmp_path / "nowhere"],
        "demo with empty text": ["demo", "-o", tmp_path / "demo", "--model", model, "--layer", "2", "--text", empty],
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing model", "no such file or folder; give a Hugging Face id, a folder or a .gguf file"),
        ("missing layer", "after the last is resid.out:2, which is layer 3"),
        ("layer zero", "layer: given 0; "),
        ("k above d_sae", "k: given 41; needed 1 <= k <= d_sae = 40"),
        ("empty text", "is empty; give a file or folder with text in it"),
        ("binary text", "is not UTF-8"),
        ("missing text", "no such file or folder"),
        ("long windows", "--n-ctx: given 65; the context of "),
        ("too little text", "batch_windows: given 4000, but there are "),
        ("no source", "--model: not given; needed with --text or --dataset (or give --activations DIR)"),
        ("no layer", "--layer: not given; needed"),
        ("two texts", "--text, --dataset: needed one of them"),
        ("no activations", "no such folder"),
        ("nan activations", "NaN or Inf in the activations"),
        ("cut activations", "is no whole safetensors file"),
        ("foreign activations", "holds no tensor `activations`"),
        ("held out all", "--held-out: given 1.0; needed a share"),
        ("no device", "--device: given 'abacus'; it can't be used here"),
        ("negative lr", "lr: given -1.0; needed a positive number"),
        ("no run", "no such folder, and not to be had from the hub"),
        ("foreign run", "not an SAE of csae: arch is 'gated'"),
        ("no command", "No such command 'trian'"),
        ("no option", "No such option"),
        ("no number", "'many' is not a valid integer"),
        ("demo without model", "no such file or folder"),
        ("demo with empty text", "is empty"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    name, message, tiny_model_path, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = bad(name, tmp_path, tiny_model_path, text)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = csae(*args, capsys=capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(("csae:", "Error:"))]
    assert len(lines) == 1, err
    left = set(tmp_path.rglob("*")) - set(before)
    assert not [path for path in left if path.is_file() and path.suffix in (".safetensors", ".tmp")]


NAMES = {"not UTF-8": os.fsdecode(b"run-\xff"), "escape sequence": "run-\x1b[31m", "markup": "[red]run[/blue]"}


@pytest.mark.parametrize("kind", NAMES)
def test_a_run_and_data_of_any_name(kind, tiny_model_path, tmp_path, capsys, monkeypatch):
    """Trained, evaluated, viewed, and looked at in every file: nothing breaks at the end of the work."""
    monkeypatch.chdir(tmp_path)
    name = NAMES[kind].replace("/", "")
    run = "run" if kind == "not UTF-8" else name  # such a run is refused at once: safetensors can't open it
    (tmp_path / f"{name}.txt").write_text(TEXT)
    data = ["--model", tiny_model_path, "--layer", "2", "--text", f"{name}.txt", "--n-ctx", "16", "--device", "cpu"]
    code, out, err = csae("train", "-o", run, *data, *SMALL, "--tokens", "320", capsys=capsys)
    assert code == 0, err
    assert "\x1b[31m" not in out + err
    code, out, err = csae("eval", run, "--device", "cpu", "--ce-windows", "1", capsys=capsys)
    assert code == 0, err
    assert "\x1b[31m" not in out + err
    code, out, err = csae("view", run, "--text", f"{name}.txt", "-o", f"{name}.html", "--device", "cpu", capsys=capsys)
    assert code == 0, err
    assert "\x1b[31m" not in out + err
    for file in (tmp_path / run / "eval.json", tmp_path / run / "README.md", tmp_path / f"{name}.html"):
        assert "\x1b" not in file.read_text(encoding="utf-8")
    assert json.loads((tmp_path / run / "eval.json").read_text())["data"] in (f"{name}.txt", shown(f"{name}.txt"))


def test_no_path_of_this_machine_in_what_is_shared(from_model, tmp_path, capsys):
    run = tmp_path / "run"
    assert csae("train", "-o", run, *from_model, *SMALL, "--tokens", "320", capsys=capsys)[0] == 0
    assert csae("eval", run, "--device", "cpu", capsys=capsys)[0] == 0
    page = tmp_path / "view.html"
    assert csae("view", run, "--text", from_model[5], "-o", page, "--device", "cpu", capsys=capsys)[0] == 0
    for file in (run / "config.json", run / "README.md", run / "eval.json", run / "model.safetensors", page):
        for path in (tmp_path, from_model[1]):
            assert str(path).encode() not in file.read_bytes(), file.name


def test_options_beside_activations_are_followed_or_refused(from_model, text, tmp_path, capsys):
    acts, run = tmp_path / "acts", tmp_path / "run"
    assert csae("cache", "-o", acts, *from_model, capsys=capsys)[0] == 0
    small = ["train", "--activations", acts, "--arch", "topk", "--d-sae", "40", "--k", "4", "--batch-windows", "4"]
    for option, value, message in (
        ("--layer", "1", "--layer: given 1, but"),
        ("--model", "other/lm", "--model: given other/lm, but"),
        ("--n-ctx", "77", "--n-ctx: given 77, but"),
        ("--max-tokens", "99", "--activations, --max-tokens: both given"),
        ("--text", text, "--activations, --text: both given"),
    ):
        code, _, err = csae(*small, option, value, "-o", run, capsys=capsys)
        assert (code, message in err) == (2, True), err
    assert not run.exists()
    assert csae(*small, "--tokens", "256", "-o", run, capsys=capsys)[0] == 0
    assert json.loads((run / "config.json").read_text())["trained_on"]["n_ctx"] == 16
    code, _, err = csae("eval", run, "--layer", "1", capsys=capsys)
    assert (code, "--layer: given 1, but" in err) == (2, True), err


def test_a_saved_sae_alone_is_viewed_as_its_config_says(
    from_model, tiny_model_path, text, tmp_path, capsys, monkeypatch
):
    run, alone = tmp_path / "run", tmp_path / "alone"
    options = ["--arch", "topk", "--d-sae", "40", "--k", "4", "--batch-windows", "4", "--tokens", "256"]
    assert csae("train", "-o", run, *from_model, *options, capsys=capsys)[0] == 0
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        (alone / name).write_bytes((run / name).read_bytes())
    monkeypatch.chdir(tiny_model_path.parent)  # the config knows no more of a folder than its name
    view = ["--text", text, "-o", tmp_path / "page.html", "--max-tokens", "60"]
    code, _, err = csae("view", alone, "--beside", run, *view, capsys=capsys)
    assert code == 0, err
