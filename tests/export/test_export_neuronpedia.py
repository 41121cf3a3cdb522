"""Dashboards for Neuronpedia: what they say, and that SAEDashboard's own classes and figures agree."""

from __future__ import annotations

import json

import pytest
import torch
from exported import dense_codes, needs, read
from runs_of_a_model import ARCHS, D_SAE, N_CTX, TEXT

from csae.checkpoint import load_sae
from csae.data.language_model import LanguageModel
from csae.export import export, neuronpedia


@pytest.fixture(scope="module", params=ARCHS)
def exported(request, runs, tmp_path_factory):
    """The run, and the dashboards of its features on all of its text."""
    folder = tmp_path_factory.mktemp("neuronpedia") / "out"
    assert export(runs[request.param], "neuronpedia", folder) == [folder]
    return runs[request.param], folder


def features_of(folder):
    return {of["feature_index"]: of for of in read(folder / "batch-0.json")["features"]}


def test_every_feature_is_shown_or_skipped(exported):
    run, folder = exported
    feature_acts, _, tokens = dense_codes(run)
    alive = (feature_acts > 0).any(dim=0).any(dim=0).nonzero().squeeze(1).tolist()
    batch, skipped = read(folder / "batch-0.json"), read(folder / "skipped_indexes.json")
    assert list(features_of(folder)) == alive
    assert skipped["skipped_indexes"] == sorted(set(range(D_SAE)) - set(alive))
    assert (batch["layer"], batch["sae_set"]) == (1, run.name)
    assert all(of["n_prompts_total"] == len(tokens) for of in batch["features"])
    assert all(of["dataset"] == "text.txt" for of in batch["features"])


def test_passages(exported):
    run, folder = exported
    feature_acts, mask, _ = dense_codes(run)
    for feature, of in features_of(folder).items():
        acts = feature_acts[..., feature]
        assert of["frac_nonzero"] == pytest.approx(float((acts > 0).sum() / mask.sum()), abs=1e-5)
        groups = {}
        for passage in of["activations"]:
            groups.setdefault((passage["bin_min"], passage["bin_max"]), []).append(passage)
            qualifying = passage["values"][passage["qualifying_token_index"]]
            assert len(passage["tokens"]) == len(passage["values"]) == N_CTX
            same = (acts - torch.tensor(passage["values"])).abs().amax(dim=1) < 6e-4
            assert same.any()
            assert "".join(passage["tokens"]).strip("\ufffd") in TEXT
            if passage["bin_min"] >= 0:
                assert passage["bin_min"] - 1e-3 <= qualifying <= passage["bin_max"] + 1e-3
        (_, top), *intervals = groups.items()
        assert top[0]["bin_max"] == pytest.approx(float(acts.max()), abs=6e-4)
        largest = [max(passage["values"]) for passage in top]
        assert largest == sorted(largest, reverse=True)
        assert largest == pytest.approx(acts.amax(dim=1).sort(descending=True).values[: len(top)].tolist(), abs=6e-4)
        assert 1 <= len(intervals) <= 5
        assert sum(of["freq_hist_data_bar_heights"]) == int((acts > 0).sum())


def test_logits(exported, tiny_model_path):
    run, folder = exported
    lm, sae = LanguageModel.load(tiny_model_path, device="cpu"), load_sae(run)
    for feature, of in features_of(folder).items():
        logits = lm.model.lm_head(lm.model.model.norm.weight * sae.W_dec[feature]).detach()
        scores = (logits - logits.mean()) / logits.std()
        best = scores.topk(10)
        assert of["pos_values"] == pytest.approx(best.values.tolist(), abs=2e-3)
        assert of["pos_str"][0] == lm.tokenizer.decode([best.indices[0]])
        assert of["neg_values"][0] == pytest.approx(float(scores.min()), abs=2e-3)
        assert sum(of["logits_hist_data_bar_heights"]) == len(scores)
        row = sae.W_dec[feature]
        assert of["neuron_alignment_indices"][0] == int(row.argmax())


def test_long_windows_are_cut_around_the_activation(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "PASSAGE", 8)
    monkeypatch.setattr(neuronpedia, "FEATURES_A_FILE", 16)
    export(runs["topk"], "neuronpedia", tmp_path / "out")
    feature_acts, _, _ = dense_codes(runs["topk"])
    files = sorted(tmp_path.glob("out/batch-*.json"))
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json", "batch-2.json"]
    for file in files:
        for of in read(file)["features"]:
            assert of["n_tokens_in_prompt"] == 8
            for passage in of["activations"]:
                assert len(passage["tokens"]) == len(passage["values"]) == 8
                assert passage["values"][passage["qualifying_token_index"]] > 0
            best = of["activations"][0]
            most = float(feature_acts[..., of["feature_index"]].max())
            assert best["values"][best["qualifying_token_index"]] == pytest.approx(most, abs=6e-4)


@needs("sae_dashboard")
def test_saedashboards_classes_hold_the_same(exported):
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    batch = read(exported[1] / "batch-0.json")
    loaded = NeuronpediaDashboardBatch(**batch).to_dict()
    assert loaded == batch


@pytest.fixture(scope="module")
def transformer_lens_model(tiny_model_path):
    """The tiny language model in TransformerLens."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    of = model.config
    width = of.hidden_size // of.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=of.num_hidden_layers, d_model=of.hidden_size, d_head=width, n_heads=of.num_attention_heads,
        n_key_value_heads=of.num_key_value_heads, d_mlp=of.intermediate_size, n_ctx=of.max_position_embeddings,
        d_vocab=of.vocab_size, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True,
        eps=of.rms_norm_eps, positional_embedding_type="rotary", rotary_dim=width, rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM", device="cpu",
    )  # fmt: skip
    hooked = HookedSAETransformer(config, tokenizer=AutoTokenizer.from_pretrained(tiny_model_path))
    as_it_is = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    hooked.load_and_process_state_dict(convert_llama_weights(model, config), **dict.fromkeys(as_it_is, False))
    return hooked


@needs("sae_dashboard")
def test_saedashboard_itself_says_the_same(runs, tmp_path, transformer_lens_model):
    """It runs the language model and our SAE, as exported to SAELens, on the same tokens."""
    from sae_dashboard.components_config import (
        ActsHistogramConfig,
        Column,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.layout import SaeVisLayoutConfig
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    (of_weights,) = export(runs["topk"], "sae_lens", tmp_path / "weights")
    export(runs["topk"], "neuronpedia", tmp_path / "ours")
    _, mask, tokens = dense_codes(runs["topk"])
    assert mask[:, 1:].all()
    assert not mask[:, 0].any()
    sae, ours = SAE.load_from_disk(str(of_weights)), features_of(tmp_path / "ours")
    sae.fold_W_dec_norm = lambda: None  # SAELens refuses it for a TopK SAE, and ours has rows of unit norm
    sequences = SequencesConfig(stack_mode="stack-all", buffer=None, compute_buffer=True, n_quantiles=5)
    parts = (sequences, ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig())
    config = SaeVisConfig(
        hook_point=sae.cfg.metadata.hook_name, features=list(ours), ignore_positions=[0],
        feature_centric_layout=SaeVisLayoutConfig(columns=[Column(*parts)]),
    )  # fmt: skip
    shown = SaeVisRunner(config).run(encoder=sae, model=transformer_lens_model, tokens=tokens)
    vocabulary = {token: str(token) for token in range(transformer_lens_model.cfg.d_vocab)}
    np_config = NeuronpediaRunnerConfig("set", "path", "out", n_prompts_total=len(tokens), n_tokens_in_prompt=N_CTX)
    theirs = NeuronpediaConverter.convert_to_np_json(transformer_lens_model, shown, np_config, vocabulary)
    of_theirs = {of["feature_index"]: of for of in json.loads(theirs)["features"]}
    assert list(of_theirs) == list(ours)
    for feature, of in of_theirs.items():
        mine = ours[feature]
        assert set(mine) == set(of)
        assert {*mine["activations"][0]} == {name for name in of["activations"][0] if not name.startswith("dfa_")}
        assert mine["neuron_alignment_indices"] == of["neuron_alignment_indices"]
        assert mine["neuron_alignment_l1"] == pytest.approx(of["neuron_alignment_l1"], abs=2e-3)
        assert mine["freq_hist_data_bar_values"] == pytest.approx(of["freq_hist_data_bar_values"], abs=2e-3)
        assert sum(mine["freq_hist_data_bar_heights"]) == sum(of["freq_hist_data_bar_heights"])
        assert mine["frac_nonzero"] * (N_CTX - 1) / N_CTX == pytest.approx(of["frac_nonzero"], abs=2e-5)
        assert mine["activations"][0]["bin_max"] == pytest.approx(of["activations"][0]["bin_max"], abs=2e-3)
        assert max(mine["activations"][0]["values"]) == pytest.approx(max(of["activations"][0]["values"]), abs=2e-3)
