"""What an SAE was trained on: read from the source, kept by every way of saving, and compared."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import csae
from csae import ContextualSAE, TopKSAE
from csae.checkpoint import load_sae
from csae.config import TrainConfig
from csae.data.activations import ShardActivations
from csae.errors import UserError
from csae.train import train
from csae.trained_on import RESIDUAL, TrainedOn, card, check_place, hook_place, model_name, same_model

ON = TrainedOn("org/lm", 12, RESIDUAL, 256, "prose.txt", True, False, "0.1.0", 0.2, 0.25)


def made(arch):
    torch.manual_seed(0)
    if arch == "topk":
        return TopKSAE(8, 32, 2)
    return ContextualSAE(8, 32, 2, n_heads=2, d_head=4, d_value=4, d_memory=8)


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_it_is_saved_and_loaded(arch, tmp_path):
    sae = made(arch)
    sae.save_pretrained(tmp_path / "by hand")
    assert load_sae(tmp_path / "by hand").trained_on is None
    assert "trained_on" not in json.loads((tmp_path / "by hand" / "config.json").read_text())
    sae.trained_on = ON
    sae.save_pretrained(tmp_path / "trained")
    loaded = type(sae).from_pretrained(str(tmp_path / "trained"))
    assert loaded.trained_on == ON
    loaded.save_pretrained(tmp_path / "again")
    assert load_sae(tmp_path / "again").trained_on == ON
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["trained_on"] == {name: value for name, value in dataclasses.asdict(ON).items() if value is not None}
    assert config["k"] == 2


def test_training_sets_it_and_checkpoints_keep_it(tmp_path):
    acts = tmp_path / "somewhere" / "acts"
    acts.mkdir(parents=True)
    save_file({"activations": torch.randn(12, 6, 8)}, acts / "a.safetensors")
    about = {"model": str(tmp_path / "lm"), "layer": 3, "hook": "mlp_out", "data": "a book"}
    (acts / "activations.json").write_text(json.dumps(about))
    source, sae = ShardActivations(acts), made("contextual")
    train(sae, source, range(8), tmp_path / "run", TrainConfig(steps=6, batch_windows=2, checkpoint_every=4))
    expected = TrainedOn("lm", 3, "mlp_out", 6, "a book", version=csae.__version__)
    on = load_sae(tmp_path / "run").trained_on
    assert on.train_fvu == json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["fvu_exact"]
    assert dataclasses.replace(on, train_fvu=None) == expected
    assert sae.trained_on == on
    for name in ("config.json", "README.md"):
        text = (tmp_path / "run" / name).read_text()
        assert str(tmp_path) not in text
        assert "mlp_out" in text
    again = made("contextual")  # the run is done: what it was trained on is the run's
    train(again, source, range(8), tmp_path / "run", TrainConfig(steps=6, batch_windows=2, checkpoint_every=4))
    assert again.trained_on == on


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"text": "/home/me/book.txt"}, "book.txt"),
        ({"text": "folder/"}, "folder"),
        ({"dataset": "org/corpus"}, "org/corpus"),
        ({"activations": "/data/acts", "folder": "/data/acts"}, "acts"),
        ({"data": "a book", "text": "/home/me/book.txt"}, "a book"),
        ({"text": "a\x1b[31m.txt"}, "a\\x1b[31m.txt"),
        ({}, None),
    ],
    ids=["text", "folder", "hub data set", "activations", "given", "escape sequence", "unknown"],
)
def test_the_name_of_the_data(known, expected):
    assert TrainedOn.of(known).data == expected


def test_a_local_data_set_is_called_by_its_last_part(tmp_path):
    (tmp_path / "tokens").mkdir()
    assert TrainedOn.of({"dataset": str(tmp_path / "tokens")}).data == "tokens"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("/models/SmolLM2-135M/", "SmolLM2-135M"),
        ("./lm", "lm"),
        ("/c/hub/models--org--lm/snapshots/0a1b2c", "org/lm"),
        ("/cache/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ],
)
def test_the_name_of_a_model(name, expected):
    assert model_name(name) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("org/SmolLM2-135M", "/models/SmolLM2-135M", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "/x/SmolLM2-135M-Instruct.Q4_1.gguf", True),
        ("openai-community/gpt2", "gpt2-small", True),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped", True),
        ("roneneldan/TinyStories-1M", "tiny-stories-1M", True),
        ("gpt2", "gpt2-medium", False),
        ("org/SmolLM2-135M", "org/SmolLM2-360M", False),
        ("org/SmolLM2-135M", "org/SmolLM2-135M-Instruct", False),
    ],
)
def test_which_names_are_of_one_model(one, other, same):
    assert same_model(one, other) is same
    assert same_model(other, one) is same


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.11.hook_resid_post", (12, RESIDUAL)),
        ("blocks.12.hook_resid_pre", (12, RESIDUAL)),
        ("model.layers.11", (12, RESIDUAL)),
        ("transformer.h.11", (12, RESIDUAL)),
        ("layers.11", (12, RESIDUAL)),
        ("resid_post_layer_11", (12, RESIDUAL)),
        ("resid_post", (None, RESIDUAL)),
        ("blocks.11.hook_mlp_out", (12, "blocks.11.hook_mlp_out")),
        ("layers.11.mlp", (12, "layers.11.mlp")),
        ("mlp_out", (None, "mlp_out")),
    ],
)
def test_hook_points_as_others_name_them(name, expected):
    assert hook_place(name) == expected


@pytest.mark.parametrize(
    ("model", "layer", "hook"),
    [("gpt2", 12, None), ("org/lm", 11, None), (None, 11, None), ("gpt2", None, None), ("org/lm", 12, "mlp_out")],
    ids=["model", "layer", "layer alone", "model alone", "hook"],
)
def test_another_place_is_refused_unless_asked_for(model, layer, hook):
    with pytest.raises(UserError, match=r"trained on layer 12 of org/lm .*and this is .*or give elsewhere=True"):
        check_place(ON, model, layer, hook)
    check_place(ON, model, layer, hook, elsewhere=True)


def test_the_same_place_or_an_unknown_one_is_not_refused():
    check_place(None, "gpt2", 3)
    check_place(ON, "/models/lm", 12)
    check_place(ON, None, 12, RESIDUAL)
    check_place(ON, None, None)
    check_place(TrainedOn(n_ctx=16), "gpt2", 3)  # made in Python, of a source that says nothing


def test_an_sae_of_other_activations_is_refused_at_the_residual_stream():
    of_mlp = TrainedOn.of({"model": "org/lm", "layer": 12, "hook": "mlp_out"})
    with pytest.raises(UserError, match=r"trained on mlp_out of layer 12 of org/lm, and this is layer 12 of org/lm"):
        check_place(of_mlp, "org/lm", 12)
    unsaid = TrainedOn.of({"folder": "/data/mlp-outputs", "n_ctx": 16})
    with pytest.raises(UserError, match=r"the activations in 'mlp-outputs', which don't say what they are of"):
        check_place(unsaid, "org/lm", 12)


@pytest.mark.parametrize(
    "value", [3, [], {"model": 3}, {"layer": True}, {"layer": "12"}, {"bos": 1}, {"train_fvu": "0.1"}]
)
def test_a_damaged_record_is_one_line(value):
    with pytest.raises(UserError, match=r"config\.json: .*trained_on"):
        TrainedOn.from_config({"trained_on": value}, "config.json")


def test_what_a_later_version_adds_is_left_out():
    assert TrainedOn.from_config({"trained_on": {"layer": 3, "weather": "fair"}}, "") == TrainedOn(layer=3)


def test_the_card_names_it():
    sae = made("topk")
    assert "base_model" not in card(sae)
    sae.trained_on = ON
    text = card(sae)
    for part in ("base_model: org/lm", "layer 12", "prose.txt", "| k | 2 |", "| d_sae | 32 |", "0.2500", "0.1.0"):
        assert part in text
    sae.trained_on = dataclasses.replace(ON, model="x\n---\nlicense: mine | <b>")
    assert "\nlicense" not in card(sae)
    assert "<b>" not in card(sae).replace("\\<b\\>", "")
