"""Weights exported from a run: loaded by the library that they are for, at the place that the run says."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch
from exported import CLOSE, activations, needs, read
from runs_of_a_model import csae as command

from csae import ContextualSAE, TopKSAE, interop
from csae.checkpoint import load_sae
from csae.errors import UserError
from csae.export import TARGETS, export
from csae.interop.dense import DenseSAE
from csae.interop.weights import unscaled
from csae.trained_on import TrainedOn


def agree(run, feature_acts, x_hat, acts):
    expected = DenseSAE(unscaled(load_sae(run)))
    torch.testing.assert_close(feature_acts, expected.encode(acts), **CLOSE)
    torch.testing.assert_close(x_hat, expected(acts), **CLOSE)


@needs("sae_lens")
def test_sae_lens_gives_the_same(runs, tmp_path):
    import sae_lens

    (folder,) = export(runs["topk"], "sae_lens", tmp_path / "out")
    sae, acts = sae_lens.SAE.load_from_disk(str(folder)), activations()
    with torch.no_grad():
        agree(runs["topk"], sae.encode(acts), sae(acts), acts)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.context_size == 32


@needs("sae_lens")
def test_a_contextual_sae_in_sae_lens(runs, tmp_path):
    import sae_lens

    from csae.interop import sae_lens_class

    sae_lens_class.register()
    (folder,) = export(runs["contextual"], "sae_lens", tmp_path / "out")
    sae, acts = sae_lens.SAE.load_from_disk(str(folder)), activations()
    with torch.no_grad():
        agree(runs["contextual"], sae.encode(acts).as_subclass(torch.Tensor), sae(acts), acts)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


@needs("sparsify")
def test_sparsify_gives_the_same(runs, tmp_path, monkeypatch):
    from sparsify import SparseCoder, sparse_coder, utils

    monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)  # the other one needs a GPU

    (folder,) = export(runs["topk"], "sparsify", tmp_path / "out")
    assert folder == tmp_path / "out" / "layers.1"
    sae, acts = SparseCoder.load_many(str(tmp_path / "out"), local=True)["layers.1"], activations()
    found = sae.encode(acts.flatten(0, 1))
    dense = torch.zeros(len(acts) * 32, sae.num_latents).scatter(-1, found.top_indices, found.top_acts)
    with torch.no_grad():
        x_hat = sae(acts.flatten(0, 1)).sae_out
    agree(runs["topk"], dense.view(*acts.shape[:2], -1).detach(), x_hat.view_as(acts), acts)


@needs("dictionary_learning")
def test_dictionary_learning_gives_the_same(runs, tmp_path):
    from dictionary_learning.utils import load_dictionary

    (folder,) = export(runs["topk"], "dictionary_learning", tmp_path / "out")
    (sae, config), acts = load_dictionary(str(folder), "cpu"), activations()
    with torch.no_grad():
        agree(runs["topk"], sae.encode(acts), sae(acts), acts)
    assert config["trainer"]["layer"] == 1
    assert config["trainer"]["submodule_name"] == "resid_post_layer_1"


@pytest.mark.parametrize("to", ["sae_lens", "sparsify", "dictionary_learning"])
def test_what_is_exported_comes_back(runs, tmp_path, to):
    (folder,) = export(runs["topk"], to, tmp_path / "out")
    loaded, sae = interop.load(to, folder), load_sae(runs["topk"])
    assert loaded.trained_on == sae.trained_on
    acts = activations()
    torch.testing.assert_close(loaded(acts).x_hat, sae(acts).x_hat, **CLOSE)


def at(run, folder, hook):
    """The SAE of a run, as if it were trained at another hook point."""
    sae = load_sae(run)
    sae.trained_on = dataclasses.replace(sae.trained_on, hook=hook, layer=None)
    sae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("hook", "sae_lens", "sparsify", "dictionary_learning"),
    [
        ("mlp.out:2", "blocks.2.hook_mlp_out", "layers.2.mlp", (2, "mlp_out_layer_2")),
        ("attn.out:0", "blocks.0.hook_attn_out", "layers.0.self_attn", (0, "attn_out_layer_0")),
        (
            "model.layers.1.post_attention_layernorm",
            "model.layers.1.post_attention_layernorm",
            "layers.1.post_attention_layernorm",
            (None, "model.layers.1.post_attention_layernorm"),
        ),
    ],
)
def test_other_places(runs, tmp_path, tiny_model_path, hook, sae_lens, sparsify, dictionary_learning):
    run, given = at(runs["topk"], tmp_path / "sae", hook), {"model": str(tiny_model_path)}
    export(run, "sae_lens", tmp_path / "lens", given)
    metadata = read(tmp_path / "lens" / "cfg.json")["metadata"]
    assert metadata["hook_name"] == sae_lens
    assert ("model_class_name" in metadata) == sae_lens.startswith("model.")
    assert export(run, "sparsify", tmp_path / "coder", given) == [tmp_path / "coder" / sparsify]
    export(run, "dictionary_learning", tmp_path / "dictionary")
    trainer = read(tmp_path / "dictionary" / "config.json")["trainer"]
    assert (trainer.get("layer"), trainer["submodule_name"]) == dictionary_learning


def test_places_that_have_no_name(runs, tmp_path, tiny_model_path):
    run, given = at(runs["topk"], tmp_path / "sae", "mlp.in:1"), {"model": str(tiny_model_path)}
    with pytest.raises(UserError, match=r"--to sparsify: it reads what a module gives, and mlp\.in:1"):
        export(run, "sparsify", tmp_path / "out", given)
    with pytest.raises(UserError, match=r"mlp\.in:1: SAELens has no name"):
        export(run, "sae_lens", tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [TopKSAE, ContextualSAE])
@pytest.mark.parametrize("to", ["sae_lens", "dictionary_learning"])
def test_a_transcoder_has_no_place_there(tmp_path, tiny_model_path, to, kind):
    sae = kind(16, 40, 4, d_out=16)
    sae.trained_on = TrainedOn(model="lm", hook="mlp.in:1", hook_to="mlp.out:1")
    sae.save_pretrained(tmp_path / "sae")
    with pytest.raises(UserError, match=rf"--to {to}: it has no class for this kind of transcoder") as refused:
        export(tmp_path / "sae", to, tmp_path / "out", {"model": str(tiny_model_path)})
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="sae: given a "):
        interop.save(to, sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_transcoder_to_sparsify(tmp_path, tiny_model_path):
    sae = TopKSAE(16, 40, 4, d_out=16, skip=True)
    sae.initialise(torch.ones(16), 0.5, torch.ones(16), 3.0)
    sae.trained_on = TrainedOn(model="lm", hook="mlp.in:1", hook_to="mlp.out:1")
    sae.save_pretrained(tmp_path / "sae")
    (folder,) = export(tmp_path / "sae", "sparsify", tmp_path / "out", {"model": str(tiny_model_path)})
    assert folder == tmp_path / "out" / "layers.1.mlp"
    acts = activations()
    torch.testing.assert_close(interop.load("sparsify", folder)(acts).x_hat, sae(acts).x_hat, **CLOSE)


def test_a_transcoder_of_two_places_is_none_of_sparsifys(tmp_path, tiny_model_path):
    sae = TopKSAE(16, 40, 4, d_out=16)
    sae.trained_on = TrainedOn(model="lm", hook="mlp.in:1", hook_to="mlp.out:2")
    sae.save_pretrained(tmp_path / "sae")
    with pytest.raises(UserError, match=r"this one reads mlp\.in:1 and predicts mlp\.out:2"):
        export(tmp_path / "sae", "sparsify", tmp_path / "out", {"model": str(tiny_model_path)})


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning"])
def test_a_contextual_sae_is_no_per_token_sae(runs, tmp_path, to):
    with pytest.raises(UserError, match=rf"--to {to}: it runs each token by itself.*would be lost") as refused:
        export(runs["contextual"], to, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_refusals(runs, tmp_path):
    with pytest.raises(UserError, match="--to: given 'onnx'; needed one of sae_lens, "):
        export(runs["topk"], "onnx", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for to in ("sae_lens", "dictionary_learning", "neuronpedia"):
        with pytest.raises(UserError, match="not empty: give a new folder"):
            export(runs["topk"], to, tmp_path / "full")
    sae = load_sae(runs["topk"])
    sae.trained_on = None
    sae.save_pretrained(tmp_path / "unknown")
    with pytest.raises(UserError, match=r"--model: not given, and .* does not say"):
        export(tmp_path / "unknown", "sparsify", tmp_path / "out")
    with pytest.raises(UserError, match="does not say what text"):
        export(tmp_path / "unknown", "delphi", tmp_path / "out")


def test_command(runs, tmp_path, capsys):
    from csae.cli.export import TARGETS as OFFERED

    assert OFFERED == TARGETS
    command("export", runs["topk"], "--to", "sparsify", "-o", tmp_path / "out", "--device", "cpu")
    assert capsys.readouterr().out == f"written: {tmp_path / 'out' / 'layers.1'}\n"
    shutil.rmtree(tmp_path / "out")
    command("export", runs["topk"], "--to", "delphi", "-o", tmp_path / "out", "--windows", 3, "--device", "cpu")
    assert read(tmp_path / "out" / "latents" / "layers.1" / "config.json")["n_tokens"] == 3 * 32


@pytest.mark.parametrize("to", [to for to in TARGETS if to != "gemma_scope"])  # which takes other SAEs
def test_nothing_is_there_before_all_of_it_is(runs, tmp_path, monkeypatch, to):
    def stop(*_, **__):
        raise KeyboardInterrupt

    rename = os.rename
    monkeypatch.setattr("csae.files.os.rename", stop)
    with pytest.raises(KeyboardInterrupt):
        export(runs["topk"], to, tmp_path / "out", n_windows=3)
    assert [file for file in tmp_path.rglob("*") if not file.is_dir()] == []
    monkeypatch.setattr("csae.files.os.rename", rename)
    export(runs["topk"], to, tmp_path / "out", n_windows=3)
