"""delphi's latent cache: what the files hold, and what delphi's own loader makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import CLOSE, dense_codes, needs, read
from runs_of_a_model import ARCHS, D_SAE, LAYER, N_CTX, TEXT
from safetensors.numpy import load_file

from csae import TopKSAE
from csae.data.sources import open_source
from csae.export import export
from csae.trained_on import TrainedOn


@pytest.fixture(scope="module", params=ARCHS)
def exported(request, runs, tmp_path_factory):
    """The run, and the cache of its activations on all of its text."""
    (folder,) = export(runs[request.param], "delphi", tmp_path_factory.mktemp("delphi") / "out")
    return runs[request.param], folder


def test_files(exported):
    run, folder = exported
    feature_acts, _, tokens = dense_codes(run)
    found = torch.zeros_like(feature_acts)
    files = sorted((folder / "layers.1").glob("*.safetensors"))
    assert sorted(tuple(map(int, file.stem.split("_"))) for file in files) == [(f, f + 7) for f in range(0, D_SAE, 8)]
    for file in files:
        part = load_file(file)
        assert part["locations"].dtype == np.uint16
        window, position, feature = torch.from_numpy(part["locations"].astype(np.int64)).unbind(1)
        assert ((window * N_CTX + position).diff() >= 0).all()
        found[window, position, feature + int(file.stem.split("_")[0])] = torch.from_numpy(part["activations"])
        assert torch.equal(torch.from_numpy(part["tokens"]), tokens)
    torch.testing.assert_close(found, feature_acts, **CLOSE)
    config = read(folder / "layers.1" / "config.json")
    assert config["cache_ctx_len"] == N_CTX
    assert config["n_tokens"] == tokens.numel()
    assert LAYER == 2  # which delphi calls layers.1


@needs("delphi")
def test_delphis_loader_reads_it(exported, tiny_model_path):
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset
    from transformers import AutoTokenizer

    run, folder = exported
    feature_acts, _, tokens = dense_codes(run)
    constructor = ConstructorConfig(example_ctx_len=N_CTX, min_examples=1, n_non_activating=2)
    dataset = LatentDataset(
        folder, SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2), constructor,
        tokenizer=AutoTokenizer.from_pretrained(tiny_model_path), modules=["layers.1"],
    )  # fmt: skip
    assert torch.equal(dataset.tokens, tokens)
    for buffer in dataset.buffers:
        locations, activations, _ = buffer.load()
        torch.testing.assert_close(feature_acts[tuple(locations.unbind(1))], activations, **CLOSE)
    records = {record.latent.latent_index: record for record in dataset}
    alive = (feature_acts > 0).any(dim=0).any(dim=0).nonzero().squeeze(1).tolist()
    assert sorted(records) == alive
    for feature, record in records.items():
        assert record.latent.module_name == "layers.1"
        best = record.examples[0]
        torch.testing.assert_close(best.activations.max(), feature_acts[..., feature].max(), **CLOSE)
        window = int((tokens == best.tokens).all(dim=1).nonzero()[0])
        torch.testing.assert_close(best.activations, feature_acts[window, :, feature], **CLOSE)
        density = float((feature_acts[..., feature] > 0).float().mean())
        assert record.per_token_frequency == pytest.approx(density)
    assert any(record.train for record in records.values())


def test_a_transcoders_activations_are_in_units_of_its_target(tmp_path, tiny_model_path):
    torch.manual_seed(0)
    sae = TopKSAE(16, 40, 4, d_out=16)
    sae.initialise(torch.zeros(16), 0.5, torch.zeros(16), 3.0)
    sae.trained_on = TrainedOn(model=str(tiny_model_path), hook="mlp.in:1", hook_to="mlp.out:1", n_ctx=N_CTX)
    sae.save_pretrained(tmp_path / "sae")
    (tmp_path / "text.txt").write_text(TEXT)
    given = {"model": str(tiny_model_path), "text": str(tmp_path / "text.txt")}
    (folder,) = export(tmp_path / "sae", "delphi", tmp_path / "out", given, 4)
    source, _ = open_source(given | {"hook": "mlp.in:1", "hook_to": "mlp.out:1", "n_ctx": N_CTX, "bos": None}, "cpu")
    batch = source.read(range(4))
    code = sae(batch.acts).code
    found = {tuple(at): value for at, value in everything(folder / "layers.1.mlp").items()}
    for at in batch.mask.nonzero().tolist():
        for value, feature in zip(code.values[tuple(at)].tolist(), code.indices[tuple(at)].tolist(), strict=True):
            assert found.pop((*at, feature)) == pytest.approx(3 * value, rel=1e-4)
    assert not found


def everything(folder):
    """Window, position and feature of each activation, and the activation."""
    found = {}
    for file in folder.glob("*.safetensors"):
        part, first = load_file(file), int(file.stem.split("_")[0])
        for (window, position, feature), value in zip(part["locations"], part["activations"], strict=True):
            found[int(window), int(position), int(feature) + first] = float(value)
    return found


@needs("delphi")
def test_the_config_is_delphis(exported):
    from delphi.config import CacheConfig

    config = read(exported[1] / "layers.1" / "config.json")
    assert set(config) == {*CacheConfig().to_dict(), "model_name"}
    CacheConfig.from_dict({name: value for name, value in config.items() if name != "model_name"})
