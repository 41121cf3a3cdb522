"""sparsify's files: written by hand as documented, and by and for the library itself."""

import json

import pytest
import torch
from interop_saes import D_IN, D_SAE, K, activations, assert_same_sae, dense, needs, topk
from safetensors.torch import load_file, save_file

from csae import ContextualSAE, TopKSAE, interop
from csae.errors import UserError
from csae.interop.weights import unscaled

LIBRARY = "sparsify"


def write(folder, config=(), **tensors):
    """The files of a sparsify SAE, with these fields and tensors in place of the usual ones."""
    generator = torch.Generator().manual_seed(0)
    usual = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K}
    usual |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN}
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | tensors
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(usual | dict(config)))
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_by_hand_is_loaded_to_the_bit_and_computes_what_is_documented(dtype, tmp_path):
    weights = write(tmp_path)
    weights = write(tmp_path, **{name: tensor.to(dtype) for name, tensor in weights.items()})
    sae = interop.load(LIBRARY, tmp_path)
    for name, key in (("W_enc", "encoder.weight"), ("b_enc", "encoder.bias"), ("W_dec", "W_dec"), ("b_dec", "b_dec")):
        assert sae.get_parameter(name).dtype == dtype
        assert torch.equal(sae.get_parameter(name), weights[key])
    assert (sae.d_in, sae.d_sae, sae.k) == (D_IN, D_SAE, K)
    assert not sae.training
    sae, weights = sae.double(), {name: tensor.double() for name, tensor in weights.items()}
    acts = activations(2, 5).double()
    pre = torch.relu((acts - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    top = pre.topk(K)
    latents = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    torch.testing.assert_close(sae(acts).x_hat, latents @ weights["W_dec"] + weights["b_dec"])


def test_a_loaded_sae_trains_and_saves_as_ours_do(tmp_path):
    write(tmp_path)
    sae = interop.load(LIBRARY, tmp_path)
    sae.loss(activations(8)).loss.backward()
    assert sae.W_enc.grad.abs().max() > 0
    sae.save_pretrained(tmp_path / "ours")
    assert_same_sae(type(sae).from_pretrained(tmp_path / "ours"), sae)


def test_their_files_come_back_to_the_bit(tmp_path):
    weights = write(tmp_path / "theirs")
    interop.save(LIBRARY, interop.load(LIBRARY, tmp_path / "theirs"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "sae.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    config = json.loads((tmp_path / "back" / "cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["k"]) == (D_IN, D_SAE, K)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; needed 'topk'"),
        ({"transcode": 1}, "transcode is 1; needed true or false"),
        ({"skip_connection": True}, "skip_connection without transcode; needed both"),
        ({"transcode": True, "skip_connection": True}, "without W_skip; needed"),
        ({"signed": True}, "signed is True; needed False"),
        ({"k": D_SAE + 1}, "k: given 20; needed 1 <= k <= d_sae = 19"),
        ({"k": "3"}, "k: given a str; needed an int"),
    ],
)
def test_what_a_topk_sae_is_not_is_refused_by_its_field(config, message, tmp_path):
    write(tmp_path, config)
    with pytest.raises(UserError, match=message):
        interop.load(LIBRARY, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_skip": torch.zeros(D_IN, D_IN)}, "with W_skip; needed"),
        ({"W_dec": None}, "without W_dec; needed"),
        ({"b_dec": torch.zeros(D_IN + 1)}, r"b_dec has shape \[8\]; needed \[7\]"),
        ({"encoder.weight": torch.zeros(D_SAE)}, r"W_enc has shape \[19\]; needed \[d_sae, d_in\]"),
        ({"b_dec": torch.zeros(D_IN, dtype=torch.float16)}, "weights in float16 and float32; needed one of float32"),
    ],
)
def test_files_with_other_tensors_are_refused(tensors, message, tmp_path):
    write(tmp_path, **tensors)
    with pytest.raises(UserError, match=message):
        interop.load(LIBRARY, tmp_path)


def test_sparsify_has_no_place_for_metadata(tmp_path):
    with pytest.raises(UserError, match=r"metadata: given model; sparsify's cfg\.json has no place"):
        interop.save(LIBRARY, topk(), tmp_path, {"model": "m"})
    assert not list(tmp_path.iterdir())


@needs("sparsify")
@pytest.mark.parametrize("scale", [1.0, 4.0, 1.7])
def test_the_library_loads_ours_and_computes_the_same(scale, tmp_path, monkeypatch):
    coder = sparse_coder(monkeypatch)
    sae, acts = topk(scale), activations(33)
    interop.save(LIBRARY, sae, tmp_path)
    theirs = coder.load_from_disk(tmp_path)
    top, indices, _ = theirs.encode(acts)
    torch.testing.assert_close(torch.zeros(33, D_SAE).scatter(-1, indices, top), dense(sae, acts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(acts).sae_out, sae(acts).x_hat, rtol=1e-5, atol=1e-5)
    if scale == 1:
        assert_same_sae(interop.load(LIBRARY, tmp_path), sae)


@needs("sparsify")
@pytest.mark.parametrize("sizes", [{"num_latents": D_SAE}, {"expansion_factor": 3}])
def test_what_the_library_wrote_computes_the_same_and_goes_back_to_the_bit(sizes, tmp_path, monkeypatch):
    from sparsify import SparseCoderConfig

    coder = sparse_coder(monkeypatch)
    torch.manual_seed(2)
    theirs = coder(D_IN, SparseCoderConfig(k=K, **sizes))
    with torch.no_grad():
        theirs.b_dec.normal_()
        theirs.encoder.bias.normal_()
    theirs.save_to_disk(tmp_path / "theirs")
    sae, acts = interop.load(LIBRARY, tmp_path / "theirs"), activations(33)
    torch.testing.assert_close(sae(acts).x_hat, theirs(acts).sae_out, rtol=1e-5, atol=1e-5)
    interop.save(LIBRARY, sae, tmp_path / "back")
    back = coder.load_from_disk(tmp_path / "back")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def sparse_coder(monkeypatch):
    """Its class, with the decoder that runs on a CPU: where triton is installed it takes the other one."""
    from sparsify import SparseCoder, sparse_coder, utils

    monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)
    return SparseCoder


def transcoder(skip: bool, d_out: int = D_IN) -> TopKSAE:
    torch.manual_seed(0)
    sae = TopKSAE(D_IN, D_SAE, K, d_out=d_out, skip=skip)
    sae.initialise(torch.randn(D_IN), 1.7, torch.randn(d_out), 0.4)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, *([sae.W_skip] if skip else [])):
            parameter += 0.3 * torch.randn_like(parameter)
    return sae.eval()


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_transcoder_by_hand_computes_what_is_documented_and_comes_back_to_the_bit(skip, tmp_path):
    more = {"W_skip": torch.randn(D_IN, D_IN)} if skip else {}
    weights = write(tmp_path / "theirs", {"transcode": True, "skip_connection": skip}, **more)
    sae, acts = interop.load(LIBRARY, tmp_path / "theirs"), activations(2, 5)
    assert (sae.is_transcoder, sae.skip, sae.d_out) == (True, skip, D_IN)
    top = torch.relu(acts @ weights["encoder.weight"].T + weights["encoder.bias"]).topk(K)
    latents = torch.zeros(2, 5, D_SAE).scatter(-1, top.indices, top.values)
    wanted = latents @ weights["W_dec"] + weights["b_dec"] + (acts @ weights["W_skip"].T if skip else 0)
    torch.testing.assert_close(sae(acts).x_hat, wanted, rtol=1e-5, atol=1e-5)
    sae.gradients(acts, target=activations(2, 5))
    interop.save(LIBRARY, sae, tmp_path / "back")
    back = load_file(tmp_path / "back" / "sae.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    config = json.loads((tmp_path / "back" / "cfg.json").read_text())
    assert (config["transcode"], config["skip_connection"]) == (True, skip)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_transcoder_of_ours_in_their_file_computes_the_same(skip, tmp_path):
    """Ours subtracts a mean and has two scales: they are folded into the weights."""
    sae, acts = transcoder(skip), activations(33)
    interop.save(LIBRARY, sae, tmp_path)
    torch.testing.assert_close(interop.load(LIBRARY, tmp_path)(acts).x_hat, sae(acts).x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (lambda: transcoder(False, d_out=5), "sae: given d_in = 7, d_out = 5; needed one width, as sparsify has it"),
        (lambda: ContextualSAE(D_IN, D_SAE, K, d_out=D_IN), "sae: given a ContextualSAE; needed a TopKSAE"),
    ],
)
def test_a_transcoder_that_sparsify_has_not_is_refused(sae, message, tmp_path):
    with pytest.raises(UserError, match=message):
        interop.save(LIBRARY, sae(), tmp_path)


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
@pytest.mark.parametrize("kind", [TopKSAE, ContextualSAE])
def test_libraries_without_transcoders_are_not_given_one(library, kind, tmp_path):
    with pytest.raises(UserError, match=r"sae: given a (transcoder|ContextualSAE); needed"):
        interop.save(library, kind(D_IN, D_SAE, K, d_out=D_IN), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("query", ["current", "past"])
def test_a_contextual_transcoder_without_scales_computes_the_same(query):
    torch.manual_seed(0)
    sae = ContextualSAE(D_IN, D_SAE, K, n_heads=2, d_head=3, d_value=4, d_memory=5, query=query, d_out=4, skip=True)
    sae.initialise(torch.randn(D_IN), 1.7, torch.randn(4), 0.4)
    for parameter in (sae.W_I, sae.W_O, sae.W_skip):
        parameter += 0.3 * torch.randn_like(parameter)
    plain, acts = unscaled(sae.eval()), activations(2, 9)
    assert plain.scale == plain.target_scale == 1
    found, wanted = plain(acts), sae(acts)
    torch.testing.assert_close(found.x_hat, wanted.x_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.c, wanted.c, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.code.values, wanted.code.values * sae.target_scale, rtol=1e-4, atol=1e-5)


@needs("sparsify")
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_the_library_and_ours_agree_on_transcoders_both_ways(skip, tmp_path, monkeypatch):
    from sparsify import SparseCoderConfig

    coder = sparse_coder(monkeypatch)
    sae, acts = transcoder(skip), activations(33)
    interop.save(LIBRARY, sae, tmp_path / "ours")
    theirs = coder.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(theirs(acts).sae_out, sae(acts).x_hat, rtol=1e-5, atol=1e-5)
    theirs = coder(D_IN, SparseCoderConfig(k=K, num_latents=D_SAE, transcode=True, skip_connection=skip))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    theirs.save_to_disk(tmp_path / "theirs")
    sae, target = interop.load(LIBRARY, tmp_path / "theirs"), activations(40)[7:]
    torch.testing.assert_close(sae(acts).x_hat, theirs(acts).sae_out, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sae.loss(acts, target=target).fvu, theirs(acts, target).fvu, rtol=1e-5, atol=1e-5)
