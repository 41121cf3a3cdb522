"""What an SAE was trained on goes along into other libraries' files and back; other names than its own are refused."""

from __future__ import annotations

import json

import pytest
from interop_saes import contextual, topk

from csae import interop
from csae.errors import UserError
from csae.interop.sae_bench import SAEBenchSAE
from csae.trained_on import RESIDUAL, TrainedOn, named_in

ON = TrainedOn("org/lm", 12, RESIDUAL, 256, "prose.txt", True, False, "0.1.0", 0.2, 0.25)


@pytest.mark.parametrize("library", ["sae_lens", "sparsify", "dictionary_learning"])
def test_it_comes_back(library, tmp_path):
    sae = topk()
    interop.save(library, sae, tmp_path / "by hand")
    assert interop.load(library, tmp_path / "by hand").trained_on is None
    sae.trained_on = ON
    interop.save(library, sae, tmp_path / "trained")
    assert interop.load(library, tmp_path / "trained").trained_on == ON


def test_that_of_a_contextual_one_comes_back(tmp_path):
    sae = contextual()
    sae.trained_on = ON
    interop.save("sae_lens", sae, tmp_path)
    assert interop.load("sae_lens", tmp_path).trained_on == ON


@pytest.mark.parametrize(
    ("library", "file", "expected"),
    [
        ("sae_lens", "cfg.json", {"model_name": "org/lm", "hook_name": "blocks.11.hook_resid_post"}),
        (
            "dictionary_learning",
            "config.json",
            {"lm_name": "org/lm", "layer": 11, "submodule_name": "resid_post_layer_11"},
        ),
    ],
)
def test_the_library_s_own_names_are_filled_in(library, file, expected, tmp_path):
    sae = topk()
    sae.trained_on = ON
    interop.save(library, sae, tmp_path)
    config = json.loads((tmp_path / file).read_text())
    assert expected.items() <= config["metadata" if library == "sae_lens" else "trainer"].items()


@pytest.mark.parametrize(
    ("hook", "sae_lens", "dictionary_learning"),
    [
        ("mlp.out:11", {"hook_name": "blocks.11.hook_mlp_out"}, (11, "mlp_out_layer_11")),
        ("attn.out:0", {"hook_name": "blocks.0.hook_attn_out"}, (0, "attn_out_layer_0")),
        ("resid.in:0", {"hook_name": "blocks.0.hook_resid_pre"}, (0, "resid_in_layer_0")),
        ("blocks.3.hook_mlp_out", {"hook_name": "blocks.3.hook_mlp_out"}, (3, "mlp_out_layer_3")),
        ("mlp_out_layer_3", {"hook_name": "blocks.3.hook_mlp_out"}, (3, "mlp_out_layer_3")),
        (
            "model.layers.3.mlp.down_proj",
            {"hook_name": "model.layers.3.mlp.down_proj", "model_class_name": "AutoModelForCausalLM"},
            (None, "model.layers.3.mlp.down_proj"),
        ),
        ("my activations", {}, (None, "my activations")),
    ],
)
def test_names_of_other_hook_points_are_filled_in(hook, sae_lens, dictionary_learning, tmp_path):
    sae = topk()
    sae.trained_on = TrainedOn(model="org/lm", hook=hook)
    interop.save("sae_lens", sae, tmp_path / "a")
    metadata = json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]
    assert {key: value for key, value in metadata.items() if key in ("hook_name", "model_class_name")} == sae_lens
    interop.save("dictionary_learning", sae, tmp_path / "b")
    trainer = json.loads((tmp_path / "b" / "config.json").read_text())["trainer"]
    assert (trainer.get("layer"), trainer["submodule_name"]) == dictionary_learning
    assert interop.load("dictionary_learning", tmp_path / "b").trained_on == sae.trained_on
    if sae_lens:  # the same place by another name is no other place
        interop.save("sae_lens", sae, tmp_path / "a", {"hook_name": sae_lens["hook_name"]})


def test_the_stream_before_the_first_block_is_known_by_the_names_of_others(tmp_path):
    for library, key, name in (
        ("sae_lens", "hook_name", "blocks.0.hook_resid_pre"),
        ("dictionary_learning", "submodule_name", "resid_in_layer_0"),
        ("dictionary_learning", "submodule_name", "resid_pre_layer_0"),
    ):
        sae = topk()
        folder = tmp_path / name / library
        interop.save(library, sae, folder, {key: name})
        on = interop.load(library, folder).trained_on
        assert (on.layer, on.hook, on.place()) == (None, "resid.in:0", "resid.in:0")


@pytest.mark.parametrize("hook", ["mlp.in:11", "attn.in:2", "model.layers.3.mlp.down_proj.in"])
def test_a_place_that_saelens_has_no_name_for_is_refused(hook, tmp_path):
    sae = topk()
    sae.trained_on = TrainedOn(model="org/lm", hook=hook)
    with pytest.raises(UserError, match=rf"{hook}: SAELens has no name for what a module is given: give metadata"):
        interop.save("sae_lens", sae, tmp_path)
    assert list(tmp_path.iterdir()) == []
    interop.save("sae_lens", sae, tmp_path, {"hook_name": "blocks.11.hook_mlp_in"}, elsewhere=True)


@pytest.mark.parametrize(
    ("library", "metadata"),
    [
        ("sae_lens", {"model_name": "other"}),
        ("sae_lens", {"hook_name": "blocks.12.hook_resid_post"}),
        ("sae_lens", {"hook_name": "blocks.11.hook_mlp_out"}),
        ("dictionary_learning", {"lm_name": "other"}),
        ("dictionary_learning", {"layer": 12}),
        ("dictionary_learning", {"submodule_name": "resid_post_layer_12"}),
    ],
)
def test_other_names_are_refused_unless_asked_for(library, metadata, tmp_path):
    sae = topk()
    sae.trained_on = ON
    with pytest.raises(UserError, match=r"trained on layer 12 of org/lm .*and this is .* or give elsewhere=True"):
        interop.save(library, sae, tmp_path, metadata)
    assert list(tmp_path.iterdir()) == []
    interop.save(library, sae, tmp_path, metadata, elsewhere=True)


@pytest.mark.parametrize(
    "metadata",
    [
        {"model_name": "lm", "hook_name": "blocks.11.hook_resid_post"},
        {"model_name": "/models/lm", "hook_name": "blocks.12.hook_resid_pre"},
        {"hook_name": "model.layers.11", "dataset_path": "org/data"},
    ],
)
def test_the_same_place_under_another_name_is_none(metadata, tmp_path):
    sae = topk()
    sae.trained_on = ON
    interop.save("sae_lens", sae, tmp_path, metadata)


def test_what_another_library_says_is_known_here(tmp_path):
    interop.save(
        "sae_lens", topk(), tmp_path / "a", {"model_name": "gpt2-small", "hook_name": "blocks.5.hook_resid_pre"}
    )
    assert interop.load("sae_lens", tmp_path / "a").trained_on == TrainedOn("gpt2-small", 5, RESIDUAL)
    interop.save("dictionary_learning", topk(), tmp_path / "b", {"lm_name": "org/lm", "layer": 3})
    assert interop.load("dictionary_learning", tmp_path / "b").trained_on == TrainedOn("org/lm", 4, RESIDUAL)
    assert named_in({"dataset_path": "org/data"}) is None


@pytest.mark.parametrize("bos", [True, False])
def test_what_sae_lens_says_of_the_beginning_is_known_here(bos, tmp_path):
    named = {"model_name": "org/lm", "hook_name": "blocks.11.hook_resid_post", "context_size": 64, "prepend_bos": bos}
    interop.save("sae_lens", topk(), tmp_path / "new", named)
    loaded = interop.load("sae_lens", tmp_path / "new")
    assert loaded.trained_on == TrainedOn("org/lm", 12, RESIDUAL, n_ctx=64, bos=bos)
    file = tmp_path / "new" / "cfg.json"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key != "metadata"}
    file.write_text(json.dumps(old | named | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": loaded.k}}))
    assert interop.load("sae_lens", tmp_path / "new").trained_on == loaded.trained_on, "as it was before version 6"


def test_sae_bench_at_another_layer_is_refused():
    sae = topk()
    sae.trained_on = ON
    with pytest.raises(UserError, match=r"trained on layer 12 of org/lm .*and this is layer 13 of lm"):
        SAEBenchSAE(sae, "lm", 12)
    assert SAEBenchSAE(sae, "lm", 11).cfg.hook_name == "blocks.11.hook_resid_post"
    assert SAEBenchSAE(sae, "lm", 12, elsewhere=True).cfg.hook_layer == 12
