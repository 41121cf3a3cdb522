"""SAEs that select by thresholds, in other libraries' files: by hand as documented, and by and for the libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop_saes import D_IN, D_SAE, K, activations, contextual, needs, topk, with_thresholds
from safetensors.torch import load_file, save_file
from torch import Tensor

from csae import ContextualSAE, TopKSAE, interop
from csae.data.activations import sink_mask
from csae.errors import UserError
from csae.interop.dense import DenseSAE
from csae.interop.weights import SELECTION_KEY, unscaled

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SELECTIONS = ("batch", "jumprelu")
MATRYOSHKA = {"prefixes": (4, 11)}
LIBRARIES = ("sae_lens", "dictionary_learning", "gemma_scope")


def random_weights() -> dict[str, Tensor]:
    """As SAELens and Gemma Scope name and lay them out."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"threshold": torch.rand(D_SAE, generator=generator) * 3}


def documented(acts: Tensor, weights: dict[str, Tensor], subtract: bool) -> tuple[Tensor, Tensor]:
    """A JumpReLU SAE in float64: feature activations and reconstruction."""
    W_enc, b_enc, W_dec, b_dec = (weights[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    pre = (acts.double() - subtract * b_dec) @ W_enc + b_enc
    feature_acts = torch.where(pre > weights["threshold"].double(), pre, 0).relu()
    return feature_acts, feature_acts @ W_dec + b_dec


def agree(sae: TopKSAE, feature_acts: Tensor, x_hat: Tensor, acts: Tensor) -> None:
    """Ours has the same feature activations, and some tokens more of them than others."""
    dense = DenseSAE(unscaled(sae))
    found = dense.encode(acts)
    torch.testing.assert_close(found, feature_acts.to(found.dtype), **CLOSE)
    torch.testing.assert_close(dense.decode(found), x_hat.to(found.dtype), **CLOSE)
    l0 = (found > 0).sum(dim=-1)
    assert l0.min() < l0.max()


def write_sae_lens(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    usual = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {"sae_lens_version": "6.54.12"}}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(usual | config))


@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec on input", "b_dec on output only"])
def test_jumprelu_of_sae_lens_computes_what_is_documented(subtract: bool, tmp_path: Path) -> None:
    weights = random_weights()
    write_sae_lens(tmp_path, {"architecture": "jumprelu", "apply_b_dec_to_input": subtract}, weights)
    sae = interop.load("sae_lens", tmp_path, k=5)
    assert isinstance(sae, TopKSAE)
    assert (sae.selection, sae.k, sae.k_max, sae.training) == ("jumprelu", 5, D_SAE, False)
    agree(sae, *documented(activations(200), weights, subtract), activations(200))
    if subtract:
        assert torch.equal(sae.W_enc, weights["W_enc"].T)
        assert torch.equal(sae.threshold, weights["threshold"])


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled by norms"])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_checkpoint_of_batch_topk_of_sae_lens(architecture: str, rescale: bool, tmp_path: Path) -> None:
    weights = random_weights()
    norms = weights["W_dec"].norm(dim=1)
    weights["topk_threshold"] = torch.tensor(0.7, dtype=torch.float64)
    wanted = weights | {"threshold": torch.full((D_SAE,), 0.7) / (norms if rescale else 1)}
    del weights["threshold"]
    config = {"architecture": architecture, "k": 4.0, "rescale_acts_by_decoder_norm": rescale}
    config |= {"matryoshka_widths": [4, 11, D_SAE]} if architecture.startswith("matryoshka") else {}
    write_sae_lens(tmp_path, config, weights)
    sae = interop.load("sae_lens", tmp_path, k_max=12)
    assert isinstance(sae, TopKSAE)
    assert (sae.selection, sae.k, sae.k_max) == ("batch", 4, 12)
    assert sae.prefixes == (MATRYOSHKA["prefixes"] if architecture.startswith("matryoshka") else ())
    sae.k_max = D_SAE
    feature_acts, x_hat = documented(activations(200), wanted, True)
    agree(sae, feature_acts * (norms if rescale else 1), x_hat, activations(200))


def test_gemma_scope_computes_what_is_documented(tmp_path: Path) -> None:
    weights = random_weights()
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_7"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    sae = interop.load("gemma_scope", folder)
    assert isinstance(sae, TopKSAE)
    assert (sae.selection, sae.k, sae.k_max) == ("jumprelu", 7, D_SAE)
    agree(sae, *documented(activations(200), weights, False), activations(200))
    assert torch.equal(sae.W_dec, weights["W_dec"])
    on = sae.trained_on
    assert on is not None
    assert (on.model, on.layer, on.bos) == ("google/gemma-2-2b", 21, True)
    interop.save("gemma_scope", sae, tmp_path / "average_l0_7")
    with np.load(tmp_path / "average_l0_7" / "params.npz") as arrays:
        assert {name: arrays[name].dtype.name for name in arrays} == dict.fromkeys(weights, "float32")
        for name, tensor in weights.items():
            torch.testing.assert_close(torch.from_numpy(arrays[name]), tensor, **(CLOSE if name == "b_enc" else EXACT))


EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize(
    ("arrays", "folder", "message"),
    [
        ({"threshold": None}, "average_l0_7", "without threshold; needed W_dec, W_enc"),
        ({"W_skip": np.zeros(3)}, "average_l0_7", "with W_skip; needed W_dec, W_enc"),
        ({"threshold": np.array(["a"])}, "average_l0_7", "threshold holds <U1; needed floating-point numbers"),
        ({"threshold": np.array([{}])}, "average_l0_7", "not a whole npz file of numbers"),
        ({"b_dec": np.zeros(3)}, "average_l0_7", r"b_dec has shape \[3\]; needed \[7\]"),
        ({"W_enc": np.zeros(3)}, "average_l0_7", r"W_enc has shape \[3\]; needed \[d_sae, d_in\]"),
        ({}, "layer_3", "k: not given, and .*params.npz doesn't say; needed the mean number of active features"),
        ({}, "transcoders", "of a folder that holds transcoders by its name"),
        ({}, "embedding", "of a folder that holds embeddings by its name"),
    ],
)
def test_what_is_none_of_gemma_scope_is_refused(arrays: dict[str, Any], folder: str, message: str, tmp_path) -> None:
    content = {name: tensor.numpy() for name, tensor in random_weights().items()} | arrays
    (tmp_path / folder).mkdir()
    kept = {name: array for name, array in content.items() if array is not None}
    np.savez(tmp_path / folder / "params.npz", **kept)
    with pytest.raises(UserError, match=message):
        interop.load("gemma_scope", tmp_path / folder)


def test_half_a_params_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in random_weights().items()})
    content = (tmp_path / "params.npz").read_bytes()
    (tmp_path / "params.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole npz file of numbers"):
        interop.load("gemma_scope", tmp_path, k=3)


@pytest.mark.parametrize("options", [{}, MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_ours_comes_back(library: str, selection: str, scale: float, options: dict[str, Any], tmp_path: Path) -> None:
    sae = with_thresholds(selection, scale, k_max=9, **options)
    interop.save(library, sae, tmp_path)
    given = {"k": K, "k_max": 9} if library == "gemma_scope" else {}
    again = interop.load(library, tmp_path, **given)
    assert isinstance(again, TopKSAE)
    assert again.scale == 1
    if library != "gemma_scope":  # whose file knows of thresholds only
        assert (again.selection, again.k, again.k_max) == (selection, K, 9)
        assert again.prefixes == sae.prefixes
    agree(again, *(of.detach() for of in both(DenseSAE(unscaled(sae)), activations(200))), activations(200))
    folds = library == "gemma_scope" or (library, selection) == ("dictionary_learning", "jumprelu")
    if scale == 1 and not folds:
        for name, tensor in sae.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def both(dense: DenseSAE, acts: Tensor) -> tuple[Tensor, Tensor]:
    return dense.encode(acts), dense(acts)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_knows_no_thresholds_is_refused(selection: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f'selection="{selection}"; needed "topk": sparsify knows no thresholds'):
        interop.save("sparsify", with_thresholds(selection), tmp_path)
    with pytest.raises(UserError, match='selection="topk"; needed "batch" or "jumprelu": Gemma Scope'):
        interop.save("gemma_scope", topk(), tmp_path)
    with pytest.raises(UserError, match=r"metadata: given layer; params.npz has no place for any"):
        interop.save("gemma_scope", with_thresholds(selection), tmp_path, {"layer": 3})


@pytest.mark.parametrize("name", ["k", "k_max"])
def test_what_a_file_says_is_not_to_be_given(name: str, tmp_path: Path) -> None:
    interop.save("sae_lens", topk(), tmp_path / "topk")
    with pytest.raises(UserError, match=f"^{name}: given 5 for a TopK SAE: leave it out"):
        interop.load("sae_lens", tmp_path / "topk", **{name: 5})
    interop.save("sae_lens", with_thresholds("batch"), tmp_path / "batch")
    with pytest.raises(UserError, match=r"^k: given 5; the file says 3: leave it out"):
        interop.load("sae_lens", tmp_path / "batch", k=5)
    assert interop.load("sae_lens", tmp_path / "batch", k=K, k_max=D_SAE).k_max == D_SAE


def test_one_threshold_that_is_not_one_is_refused(tmp_path: Path) -> None:
    interop.save("sae_lens", with_thresholds("batch"), tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["threshold"][3] += 1
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="thresholds that differ, of an SAE that was saved with one"):
        interop.load("sae_lens", tmp_path)


# --- by and for the libraries ---------------------------------------------------------------------------------------


@needs("sae_lens")
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_sae_lens_computes_the_same(selection: str, scale: float, tmp_path: Path) -> None:
    import sae_lens

    sae, acts = with_thresholds(selection, scale, k_max=D_SAE), activations(200)
    interop.save("sae_lens", sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg.architecture() == "jumprelu"
    with torch.no_grad():
        agree(sae, theirs.encode(acts), theirs(acts), acts)
    theirs.save_model(str(tmp_path / "by them"))
    again = interop.load("sae_lens", tmp_path / "by them")
    assert isinstance(again, TopKSAE)
    assert (again.selection, again.k, again.k_max) == (selection, K, D_SAE)
    with torch.no_grad():
        agree(again, theirs.encode(acts), theirs(acts), acts)


@needs("sae_lens")
@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK", "JumpReLU"])
def test_what_sae_lens_trained_computes_the_same(kind: str, tmp_path: Path) -> None:
    import sae_lens

    torch.manual_seed(0)
    options: dict[str, Any] = {"jumprelu_init_threshold": 0.4} if kind == "JumpReLU" else {"k": K}
    if kind == "MatryoshkaBatchTopK":
        options["matryoshka_widths"] = [4, 11, D_SAE]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **options)
    trained = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    with torch.no_grad():
        for parameter in (trained.W_enc, trained.b_enc, trained.b_dec):
            parameter += 0.3 * torch.randn_like(parameter)
        if kind != "JumpReLU":
            trained.topk_threshold.fill_(0.05)  # in units of the norms of W_dec, 0.1
    trained.save_inference_model(str(tmp_path / "inference"))
    trained.save_model(str(tmp_path / "training"))
    theirs, acts = sae_lens.SAE.load_from_disk(str(tmp_path / "inference")), activations(200)
    for folder in ("inference", "training"):
        k = None if folder == "training" and kind != "JumpReLU" else 5
        sae = interop.load("sae_lens", tmp_path / folder, k=k)
        assert isinstance(sae, TopKSAE)
        assert sae.selection == ("jumprelu" if k else "batch")
        with torch.no_grad():
            agree(sae, theirs.encode(acts), theirs(acts), acts)


@needs("sae_lens")
def test_sae_lens_reads_gemma_scope_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    sae, acts = with_thresholds("jumprelu", 1.7, k_max=D_SAE), activations(200)
    interop.save("gemma_scope", sae, tmp_path)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(tmp_path / "params.npz"))
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    config, tensors, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_3", cfg_overrides=sizes
    )
    theirs = SAE.from_dict(loaders.handle_config_defaulting({**config, **sizes}))
    theirs.load_state_dict(tensors)
    assert not theirs.cfg.apply_b_dec_to_input
    with torch.no_grad():
        agree(sae, theirs.encode(acts), theirs(acts), acts)
        again = interop.load("gemma_scope", tmp_path, k=3)
        agree(again, theirs.encode(acts), theirs(acts), acts)  # type: ignore[arg-type]


@needs("dictionary_learning")
@pytest.mark.parametrize(
    ("selection", "options", "kind"),
    [
        ("batch", {}, "BatchTopKSAE"),
        ("batch", MATRYOSHKA, "MatryoshkaBatchTopKSAE"),
        ("jumprelu", {}, "JumpReluAutoEncoder"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_dictionary_learning_computes_the_same(
    selection: str, options: dict[str, Any], kind: str, scale: float, tmp_path: Path
) -> None:
    from dictionary_learning.utils import load_dictionary

    sae, acts = with_thresholds(selection, scale, k_max=D_SAE, **options), activations(200)
    interop.save("dictionary_learning", sae, tmp_path, {"layer": 1, "lm_name": "m"})
    theirs, config = load_dictionary(str(tmp_path), device="cpu")
    assert type(theirs).__name__ == kind
    with torch.no_grad():
        agree(sae, theirs.encode(acts), theirs(acts), acts)
    del config["trainer"][SELECTION_KEY]
    (tmp_path / "theirs").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "ae.pt")
    (tmp_path / "theirs" / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": kind, **({"target_l0": K} if selection == "jumprelu" else {"k": K})}})
    )
    again = interop.load("dictionary_learning", tmp_path / "theirs")
    assert isinstance(again, TopKSAE)
    assert (again.selection, again.k, again.k_max) == (selection, K, D_SAE)
    assert again.prefixes == sae.prefixes
    with torch.no_grad():
        agree(again, theirs.encode(acts), theirs(acts), acts)


# --- contextual ones ------------------------------------------------------------------------------------------------


def contextual_with_thresholds(selection: str, query: str) -> ContextualSAE:
    sae = contextual(query, 1.7, selection=selection, k_mem=None)
    assert sae.threshold is not None
    with torch.no_grad():
        sae.threshold.copy_(0.3 + torch.rand_like(sae.threshold))
    return sae


@pytest.mark.parametrize("query", ["current", "past"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_contextual_one_comes_back_and_is_the_same_in_dense_form(selection: str, query: str, tmp_path: Path) -> None:
    sae, windows = contextual_with_thresholds(selection, query), activations(2, 30)
    interop.save("sae_lens", sae, tmp_path)
    again = interop.load("sae_lens", tmp_path)
    assert (again.selection, again.k, again.k_max) == (selection, K, 4 * K)
    mask = sink_mask(windows)
    dense, out = DenseSAE(again), sae(windows, mask)
    found = dense.encode(windows)
    wanted = torch.zeros(2, 30, D_SAE).scatter_add(-1, out.code.indices, out.code.values * sae.scale)
    torch.testing.assert_close(torch.Tensor.as_subclass(found, Tensor)[mask], wanted[mask].detach(), **CLOSE)
    torch.testing.assert_close(dense.decode(found)[mask], out.x_hat[mask], rtol=1e-4, atol=1e-4)
    # Left out positions are encoded as by a per-token SAE.
    plain = unscaled(sae)
    pre = (windows[~mask] - plain.b_dec) @ plain.W_enc.T + plain.b_enc
    assert plain.threshold is not None
    alone = torch.where(pre > plain.threshold, pre, 0).relu()
    left_out = torch.Tensor.as_subclass(found, Tensor)[~mask]
    torch.testing.assert_close(left_out, alone.detach(), **CLOSE)


@needs("sae_lens")
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_contextual_one_in_sae_lens(selection: str, tmp_path: Path) -> None:
    import sae_lens

    from csae.interop import sae_lens_class

    sae_lens_class.register()
    sae, windows = contextual_with_thresholds(selection, "past"), activations(2, 30)
    interop.save("sae_lens", sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        feature_acts, x_hat = theirs.encode(windows), theirs(windows)
        dense = DenseSAE(unscaled(sae))
        torch.testing.assert_close(feature_acts.as_subclass(Tensor), dense.encode(windows).as_subclass(Tensor), **CLOSE)
        torch.testing.assert_close(x_hat, dense(windows), **CLOSE)
