"""SAELens's files: written by hand as documented, and by and for the library itself; a contextual SAE in SAELens."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from interop_saes import (
    D_IN,
    D_SAE,
    K,
    activations,
    assert_same_files,
    assert_same_sae,
    contextual,
    dense,
    dense_windows,
    needs,
    topk,
)
from safetensors.torch import load_file, save_file

import csae
from csae import interop
from csae.errors import UserError
from csae.interop import sae_lens as sae_lens_files
from csae.interop.weights import unscaled

LIBRARY = "sae_lens"
FILES = ("cfg.json", "sae_weights.safetensors")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
needs_sae_lens = needs("sae_lens")


def write(folder, config=(), **tensors):
    """The files of a SAELens TopKSAE, with these fields and tensors in place of the usual ones."""
    generator = torch.Generator().manual_seed(0)
    usual = {"architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "k": K, "dtype": "float32", "device": "cpu"}
    usual |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    usual |= {"rescale_acts_by_decoder_norm": False, "metadata": {"sae_lens_version": "6.54.12"}}
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | tensors
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / FILES[1])
    (folder / FILES[0]).write_text(json.dumps(usual | dict(config)))
    return weights


def documented(acts, weights, subtract=True, rescale=False):
    """What SAELens's TopKSAE says that it computes, in float64: feature activations and reconstruction."""
    W_enc, b_enc, W_dec, b_dec = (weights[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    norms = W_dec.norm(dim=1) if rescale else torch.ones(len(W_dec)).double()
    pre = ((acts.double() - subtract * b_dec) @ W_enc + b_enc) * norms
    top = pre.topk(K)
    feature_acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    return feature_acts, (feature_acts / norms) @ W_dec + b_dec


@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec on input", "b_dec on output only"])
@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled by norms"])
def test_a_file_by_hand_computes_what_is_documented(subtract, rescale, tmp_path):
    weights = write(tmp_path, {"apply_b_dec_to_input": subtract, "rescale_acts_by_decoder_norm": rescale})
    sae, acts = interop.load(LIBRARY, tmp_path), activations(50)
    feature_acts, x_hat = documented(acts, weights, subtract, rescale)
    torch.testing.assert_close(dense(sae, acts).double(), feature_acts, **CLOSE)
    torch.testing.assert_close(sae(acts).x_hat.double(), x_hat, **CLOSE)
    if subtract and not rescale:
        assert torch.equal(sae.W_enc, weights["W_enc"].T)
        assert torch.equal(sae.W_dec, weights["W_dec"])


def test_half_precision_stays_unless_something_is_folded(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in write(tmp_path).items()}
    write(tmp_path, {"dtype": "bfloat16"}, **half)
    assert interop.load(LIBRARY, tmp_path).W_enc.dtype == torch.bfloat16
    write(tmp_path, {"dtype": "torch.bfloat16", "rescale_acts_by_decoder_norm": True}, **half)
    sae, acts = interop.load(LIBRARY, tmp_path), activations(50)
    assert sae.W_enc.dtype == torch.float32
    torch.testing.assert_close(sae(acts).x_hat.double(), documented(acts, half, rescale=True)[1], **CLOSE)


def test_their_files_come_back_to_the_bit(tmp_path):
    weights = write(tmp_path / "theirs")
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "m"}
    interop.save(LIBRARY, interop.load(LIBRARY, tmp_path / "theirs"), tmp_path / "back", metadata)
    back = load_file(tmp_path / "back" / FILES[1])
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    config = json.loads((tmp_path / "back" / FILES[0]).read_text())
    assert metadata.items() <= config["metadata"].items()
    assert (config["architecture"], config["d_in"], config["d_sae"], config["k"]) == ("topk", D_IN, D_SAE, K)


def test_a_config_of_before_version_6_is_read_as_version_6_reads_it(tmp_path):
    old = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K - 1}}
    old |= {"normalize_activations": False, "k": None, "metadata": None, "hook_name": "blocks.1.hook_resid_post"}
    write(tmp_path, old, scaling_factor=torch.ones(D_SAE))
    assert interop.load(LIBRARY, tmp_path).k == K - 1


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"architecture": "gated"}, {}, "architecture is 'gated'; needed one of 'topk', 'csae_contextual', 'jumprelu'"),
        ({"architecture": "jumprelu"}, {}, "without threshold; needed"),
        (
            {"architecture": "batchtopk", "k": 2.5},
            {"topk_threshold": torch.tensor(0.5)},
            "k is 2.5; needed a whole number",
        ),
        (
            {"architecture": "jumprelu"},
            {"threshold": torch.zeros(D_SAE)},
            "k: not given, and .*; needed the mean",
        ),
        ({"architecture": "jumprelu", "target_l0": 3}, {"threshold": torch.zeros(3)}, r"threshold has shape \[3\]"),
        ({"normalize_activations": "layer_norm"}, {}, "normalize_activations is 'layer_norm'; needed 'none'"),
        ({"normalize_activations": True, "metadata": {}}, {}, "'expected_average_only_in'; needed 'none': call fold_"),
        ({"reshape_activations": "hook_z"}, {}, "reshape_activations is 'hook_z'; needed 'none'"),
        ({"metadata": {}, "activation_fn": "relu", "architecture": "standard"}, {}, "architecture is 'standard'"),
        ({"dtype": "float8"}, {}, "dtype is 'float8'; needed one of float32, bfloat16"),
        ({"dtype": None}, {}, "dtype is None; needed one of float32, bfloat16"),
        ({"metadata": [6]}, {}, r"metadata is \[6\]; needed an object, or nothing"),
        ({"metadata": {}, "activation_fn": "topk", "activation_fn_kwargs": [3]}, {}, r"activation_fn_kwargs is \[3\]"),
        ({"k": 20}, {}, "k: given 20; needed 1 <= k <= d_sae = 19"),
        ({}, {"threshold": torch.zeros(D_SAE)}, "with threshold; needed"),
        ({}, {"scaling_factor": torch.full((D_SAE,), 2.0)}, "with scaling_factor; needed"),
        ({}, {"W_enc": torch.zeros(D_SAE, D_IN)}, r"b_enc has shape \[19\]; needed \[7\]"),
        ({}, {"W_enc": torch.zeros(D_IN)}, r"W_enc has shape \[7\]; needed \[d_sae, d_in\]"),
        ({"architecture": "csae_contextual", "query": "next"}, {}, "query: given 'next'; needed one of"),
        ({"architecture": "csae_contextual", "query": "past"}, {}, "without W_K, W_O, W_Q"),
    ],
)
def test_what_is_none_of_ours_is_refused_by_its_field(config, tensors, message, tmp_path):
    write(tmp_path, config, **tensors)
    with pytest.raises(UserError, match=message):
        interop.load(LIBRARY, tmp_path)


def test_another_library_or_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="library: given 'saelens'; needed one of 'sae_lens', 'sparsify'"):
        interop.load("saelens", tmp_path)
    with pytest.raises(UserError, match=r"no cfg\.json there; needed the folder"):
        interop.load(LIBRARY, tmp_path)
    write(tmp_path)
    with pytest.raises(UserError, match=r"a file; needed the folder of the SAE, which holds cfg\.json"):
        interop.load(LIBRARY, tmp_path / FILES[0])
    (tmp_path / FILES[1]).write_bytes(b"truncated")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        interop.load(LIBRARY, tmp_path)


def test_a_hub_id_names_a_repository_and_a_folder_in_it(tmp_path, monkeypatch):
    asked = []

    def download(repo, filename, subfolder):
        asked.append((repo, subfolder))
        return str(tmp_path / filename)

    write(tmp_path)
    monkeypatch.setattr("csae.interop.source.hf_hub_download", download)
    assert interop.load(LIBRARY, "org/repo/blocks.1.hook_resid_post/k3").k == K
    assert interop.load(LIBRARY, "org/repo").k == K
    assert asked == [("org/repo", "blocks.1.hook_resid_post/k3")] * 2 + [("org/repo", None)] * 2


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), HFValidationError("no such name")])
def test_what_is_nowhere_is_said_in_one_line(error, monkeypatch):
    def download(*args, **options):
        raise error

    monkeypatch.setattr("csae.interop.source.hf_hub_download", download)
    with pytest.raises(UserError, match=r"no-such: no such folder, and cfg\.json is not to be had from the hub"):
        interop.load(LIBRARY, "no-such")


@pytest.mark.parametrize("scale", [1.0, 4.0, 0.3])
@pytest.mark.parametrize("kind", ["topk", "current", "past"])
def test_without_its_scale_an_sae_computes_the_same_in_units_of_the_activations(kind, scale):
    sae, acts = topk(scale) if kind == "topk" else contextual(kind, scale), activations(3, 11)
    plain = unscaled(sae)
    assert plain.scale == 1
    assert sae.scale == torch.tensor(scale)
    assert torch.equal(plain.W_dec, sae.W_dec)
    wanted, found = sae(acts), plain(acts)
    close = CLOSE if scale == 0.3 else {"rtol": 0, "atol": 0}  # exact for powers of two
    torch.testing.assert_close(found.x_hat, wanted.x_hat, **close)
    torch.testing.assert_close(found.c, wanted.c, **close)
    torch.testing.assert_close(found.code.values, wanted.code.values * scale, **close)


@pytest.mark.parametrize("query", ["current", "past"])
def test_a_contextual_sae_comes_back_to_the_bit_with_all_its_options(query, tmp_path):
    sae = contextual(query, sweeps=1, k_aux=5, aux_coef=0.5)
    interop.save(LIBRARY, sae, tmp_path / "a")
    found = interop.load(LIBRARY, tmp_path / "a")
    assert_same_sae(found, sae)
    interop.save(LIBRARY, found, tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b", *FILES)
    assert load_file(tmp_path / "a" / FILES[1])["W_enc"].shape == (D_IN, D_SAE)


@needs_sae_lens
@pytest.mark.parametrize("scale", [1.0, 4.0, 1.7])
def test_the_library_loads_ours_and_computes_the_same(scale, tmp_path):
    import sae_lens

    sae, acts = topk(scale), activations(33)
    interop.save(LIBRARY, sae, tmp_path, {"model_name": "m", "hook_name": "blocks.1.hook_resid_post"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert isinstance(theirs, sae_lens.TopKSAE)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    torch.testing.assert_close(theirs.encode(acts), dense(sae, acts), **CLOSE)
    torch.testing.assert_close(theirs(acts), sae(acts).x_hat, **CLOSE)
    if scale == 1:
        assert_same_sae(interop.load(LIBRARY, tmp_path), sae)
        theirs.save_model(tmp_path / "again")
        assert_same_sae(interop.load(LIBRARY, tmp_path / "again"), sae)


@needs_sae_lens
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_what_its_training_wrote_computes_the_same(rescale, save, tmp_path):
    import sae_lens

    config = sae_lens.TopKTrainingSAEConfig(D_IN, D_SAE, k=K, rescale_acts_by_decoder_norm=rescale)
    theirs = sae_lens.TopKTrainingSAE(config)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    getattr(theirs, save)(tmp_path / "theirs")
    sae, acts = interop.load(LIBRARY, tmp_path / "theirs"), activations(33)
    torch.testing.assert_close(dense(sae, acts), theirs.encode(acts), **CLOSE)
    torch.testing.assert_close(sae(acts).x_hat, theirs(acts), **CLOSE)
    interop.save(LIBRARY, sae, tmp_path / "back")
    back = sae_lens.SAE.load_from_disk(tmp_path / "back")
    torch.testing.assert_close(back(acts), theirs(acts), **CLOSE)
    if not rescale:
        for name, tensor in back.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name


def load_in_sae_lens(folder):
    import sae_lens

    from csae.interop.sae_lens_class import register

    register()
    register()
    return sae_lens.SAE.load_from_disk(folder)


@needs_sae_lens
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("query", ["current", "past"])
def test_a_contextual_sae_runs_exactly_in_sae_lens(query, scale, tmp_path):
    sae, windows = contextual(query, scale), activations(3, 11)
    windows[1, 4] *= 100  # an attention sink
    interop.save(LIBRARY, sae, tmp_path, {"model_name": "m", "hook_name": "blocks.1.hook_resid_post"})
    theirs = load_in_sae_lens(tmp_path)
    wanted, x_hat = dense_windows(sae, windows)
    feature_acts = theirs.encode(windows)
    torch.testing.assert_close(feature_acts, wanted, **CLOSE)
    torch.testing.assert_close(theirs.decode(feature_acts), x_hat, **CLOSE)
    torch.testing.assert_close(theirs(windows), x_hat, **CLOSE)
    torch.testing.assert_close(theirs.train()(windows), x_hat, **CLOSE)
    assert (theirs.W_enc.shape, theirs.W_dec.shape) == ((D_IN, D_SAE), (D_SAE, D_IN))
    assert torch.equal(theirs.W_dec, sae.W_dec)
    assert theirs.get_name() == "sae_m_blocks.1.hook_resid_post_19"
    theirs.save_model(tmp_path / "again")
    assert_same_files(tmp_path, tmp_path / "again", FILES[1])
    assert torch.equal(load_in_sae_lens(tmp_path / "again")(windows), theirs(windows))
    if scale == 1:
        assert_same_sae(interop.load(LIBRARY, tmp_path / "again"), sae)


@needs_sae_lens
def test_an_edit_in_sae_lens_is_of_what_is_new_and_unknown_codes_are_refused(tmp_path):
    sae, windows = contextual(), activations(3, 11)
    interop.save(LIBRARY, sae, tmp_path)
    theirs = load_in_sae_lens(tmp_path)
    with pytest.raises(ValueError, match="what was carried there is not known; needed what encode"):
        theirs.decode(torch.zeros(3, 11, D_SAE))
    feature_acts = theirs.encode(windows)
    feature = int(feature_acts.sum(dim=(0, 1)).argmax())
    edited = feature_acts.clone()
    edited[..., feature] = 0
    change = theirs.decode(feature_acts) - theirs.decode(edited)
    torch.testing.assert_close(change, feature_acts[..., feature, None] * sae.W_dec[feature], **CLOSE)
    torch.testing.assert_close(theirs.decode(feature_acts[:2]), theirs.decode(feature_acts)[:2])
    for shape in ((11,), (3, 1)):
        with pytest.raises(ValueError, match=r"needed whole windows \[B, T, d_in\] with T >= 2"):
            theirs.encode(activations(*shape))
    with pytest.raises(TypeError, match=r"in torch\.bfloat16; needed torch\.float32"):
        theirs.to(torch.bfloat16).encode(windows)
    with pytest.raises(NotImplementedError, match="can't be folded, as the top k would change: use it as it is"):
        theirs.fold_W_dec_norm()
    with pytest.raises(NotImplementedError, match="no factor to fold: give a contextual SAE activations as they are"):
        theirs.fold_activation_norm_scaling_factor(2.0)
    with pytest.raises(NotImplementedError, match="no whitening to fold: give a contextual SAE activations as they"):
        theirs.fold_activation_whitening(windows)


@needs_sae_lens
def test_a_contextual_sae_in_a_hooked_model_has_its_cache_its_hooks_and_its_error_term(tmp_path):
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": D_IN, "n_ctx": 16, "d_head": 4, "n_heads": 2, "d_vocab": 30, "seed": 0}
    model = HookedSAETransformer(HookedTransformerConfig(**sizes, act_fn="relu"))
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(5))
    interop.save(LIBRARY, contextual(scale=0.5), tmp_path, {"hook_name": "blocks.0.hook_resid_post"})
    theirs = load_in_sae_lens(tmp_path)
    plain = model(tokens)
    spliced, cache = model.run_with_cache_with_saes(tokens, saes=[theirs])
    assert cache["blocks.0.hook_resid_post.hook_sae_acts_post"].shape == (2, 12, D_SAE)
    _, original = model.run_with_cache(tokens)
    wanted = theirs(original["blocks.0.hook_resid_post"])
    torch.testing.assert_close(cache["blocks.0.hook_resid_post.hook_sae_recons"], wanted)
    assert not torch.allclose(spliced, plain, atol=1e-4)
    with_error = model.run_with_saes(tokens, saes=[theirs], use_error_term=True)
    torch.testing.assert_close(with_error, plain, rtol=1e-4, atol=1e-5)


@needs_sae_lens
def test_formats_need_no_library(tmp_path):
    write(tmp_path)
    code = f"import sys; from csae import interop; interop.load('sae_lens', {str(tmp_path)!r})"
    code += "; assert not {'sae_lens', 'sparsify', 'dictionary_learning', 'sae_bench'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
def test_a_save_that_fails_leaves_the_sae_that_was_there(library, tmp_path, monkeypatch):
    first = topk(k=3)
    interop.save(library, first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="metadata: Object of type Tensor is not JSON serializable; needed what JSON"):
        interop.save(library, topk(4.0, k=5), tmp_path, {"layer": torch.tensor(3)})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((sae_lens_files, "save_file"), (torch, "save")):
        monkeypatch.setattr(module, name, full)
    with pytest.raises(UserError, match="not written: the disk is full"):
        interop.save(library, topk(4.0, k=5), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_saved_folder_of_ours_is_not_touched(tmp_path):
    sae = topk()
    sae.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    interop.save(LIBRARY, sae, tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert_same_sae(csae.TopKSAE.from_pretrained(tmp_path), sae)
