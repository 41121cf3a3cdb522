"""dictionary_learning's files: written by hand as documented, and by and for the library itself."""

import json

import pytest
import torch
from interop_saes import D_IN, D_SAE, K, activations, assert_same_sae, contextual, dense, needs, topk

from csae import interop
from csae.errors import UserError

LIBRARY = "dictionary_learning"


def write(folder, trainer=(), **tensors):
    """The files of an AutoEncoderTopK, with these fields and tensors in place of the usual ones."""
    generator = torch.Generator().manual_seed(0)
    config = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "k": K, "lm_name": "m", "layer": 1}
    shapes = {"decoder.weight": (D_IN, D_SAE), "encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,)}
    weights = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    weights |= {name: torch.randn(shape, generator=generator) for name, shape in (shapes | {"b_dec": (D_IN,)}).items()}
    weights |= tensors
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": config | dict(trainer), "buffer": {"d_submodule": 7}}))
    return weights


@pytest.mark.parametrize("k_where", ["both", "config"])
def test_a_file_by_hand_is_loaded_to_the_bit_and_computes_what_is_documented(k_where, tmp_path):
    weights = write(tmp_path, **({} if k_where == "both" else {"k": None}))
    sae = interop.load(LIBRARY, tmp_path)
    assert torch.equal(sae.W_enc, weights["encoder.weight"])
    assert torch.equal(sae.W_dec, weights["decoder.weight"].T)
    assert torch.equal(sae.b_enc, weights["encoder.bias"])
    assert torch.equal(sae.b_dec, weights["b_dec"])
    assert (sae.d_in, sae.d_sae, sae.k) == (D_IN, D_SAE, K)
    acts = activations(2, 5)
    pre = torch.relu((acts - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    top = pre.topk(K)
    latents = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    wanted = latents @ weights["decoder.weight"].T + weights["b_dec"]
    torch.testing.assert_close(sae(acts).x_hat, wanted, rtol=1e-5, atol=1e-5)


def test_their_files_come_back_to_the_bit_but_for_the_threshold(tmp_path):
    weights = write(tmp_path / "theirs")
    interop.save(LIBRARY, interop.load(LIBRARY, tmp_path / "theirs"), tmp_path / "back", {"layer": 1, "lm_name": "m"})
    back = torch.load(tmp_path / "back" / "ae.pt", weights_only=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items() if name != "threshold")
    assert back["threshold"] == -1
    trainer = json.loads((tmp_path / "back" / "config.json").read_text())["trainer"]
    assert {"layer": 1, "lm_name": "m", "k": K, "activation_dim": D_IN, "dict_size": D_SAE}.items() <= trainer.items()


@pytest.mark.parametrize(
    ("trainer", "tensors", "message"),
    [
        ({"dict_class": "GatedAutoEncoder"}, {}, "dict_class is 'GatedAutoEncoder'; needed one of 'AutoEncoderTopK'"),
        (
            {"dict_class": "BatchTopKSAE"},
            {"threshold": None},
            "without threshold; needed one, as a BatchTopKSAE",
        ),
        ({"dict_class": "BatchTopKSAE"}, {"threshold": torch.zeros(3)}, r"threshold has shape \[3\]; needed \[d_sae\]"),
        ({"dict_class": "BatchTopKSAE"}, {"group_sizes": torch.tensor([9, 10])}, "with group_sizes, of a BatchTopKSAE"),
        ({"dict_class": "MatryoshkaBatchTopKSAE"}, {}, "with decoder.weight, encoder.bias, encoder.weight"),
        ({"k": K + 1}, {}, "k is 3, and 4 in config.json"),
        ({"k": 20}, {"k": torch.tensor(20)}, "k: given 20; needed 1 <= k <= d_sae = 19"),
        ({"k": None}, {"k": None}, "without a k"),
        ({}, {"encoder.bias": None}, "without encoder.bias; needed"),
        ({}, {"r_mag": torch.zeros(D_SAE)}, "with r_mag; needed"),
        ({}, {"decoder.weight": torch.zeros(D_SAE, D_IN)}, r"W_dec has shape \[7, 19\]; needed \[19, 7\]"),
        ({}, {"encoder.bias": 3}, "encoder.bias is no ordinary tensor"),
        ({}, {"encoder.bias": torch.zeros(D_SAE).to_sparse()}, "encoder.bias is no ordinary tensor"),
        ({}, {"encoder.bias": torch.zeros(D_SAE, device="meta")}, "encoder.bias is no ordinary tensor"),
        ({}, {"encoder.weight": torch.zeros(1).expand(10**6, 10**7)}, "encoder.weight is no ordinary tensor"),
        ({}, {"k": torch.tensor([3, 3])}, r"k is a torch.int64 of shape \[2\]; needed one whole number"),
        ({}, {"k": torch.tensor(3.5)}, r"k is a torch.float32 of shape \[\]; needed one whole number"),
    ],
)
def test_what_a_topk_sae_is_not_is_refused_by_its_field(trainer, tensors, message, tmp_path):
    write(tmp_path, trainer, **tensors)
    with pytest.raises(UserError, match=message):
        interop.load(LIBRARY, tmp_path)


class Planted:
    """Runs a command where it is unpickled by the ordinary way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_nothing_that_a_pickle_names_is_run(tmp_path):
    write(tmp_path)
    torch.save({"k": Planted(tmp_path / "planted")}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"ae\.pt: not a whole file of tensors"):
        interop.load(LIBRARY, tmp_path)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02}q\x00.", b"\x80\x02t.", b"\x80\x02M\x00"])
def test_a_file_that_is_no_state_dict_is_refused_in_one_line(content, tmp_path):
    write(tmp_path)
    (tmp_path / "ae.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"ae\.pt: ") as error:
        interop.load(LIBRARY, tmp_path)
    assert "\n" not in str(error.value)


def test_names_that_are_no_text_are_refused(tmp_path):
    write(tmp_path)
    torch.save({5: torch.zeros(3)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="something else than a state dict"):
        interop.load(LIBRARY, tmp_path)


@pytest.mark.parametrize("size", range(0, 3000, 97))
def test_a_truncated_file_is_refused(size, tmp_path):
    write(tmp_path)
    for zipped in (True, False):
        torch.save(torch.load(tmp_path / "ae.pt"), tmp_path / "ae.pt", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "ae.pt").read_bytes()
        (tmp_path / "ae.pt").write_bytes(whole[: min(size, len(whole) - 1)])
        with pytest.raises(UserError, match=r"ae\.pt: "):
            interop.load(LIBRARY, tmp_path)
        (tmp_path / "ae.pt").write_bytes(whole)


def test_a_contextual_sae_is_refused(tmp_path):
    with pytest.raises(UserError, match="given a ContextualSAE; needed a TopKSAE"):
        interop.save(LIBRARY, contextual(), tmp_path)
    assert not list(tmp_path.iterdir())


@needs("dictionary_learning")
@pytest.mark.parametrize("scale", [1.0, 4.0, 1.7])
def test_the_library_loads_ours_and_computes_the_same(scale, tmp_path):
    from dictionary_learning.utils import load_dictionary

    sae, acts = topk(scale), activations(33)
    interop.save(LIBRARY, sae, tmp_path)
    theirs, config = load_dictionary(str(tmp_path), "cpu")
    assert config["trainer"]["k"] == theirs.k == K
    torch.testing.assert_close(theirs.encode(acts), dense(sae, acts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(acts), sae(acts).x_hat, rtol=1e-5, atol=1e-5)
    if scale == 1:
        assert_same_sae(interop.load(LIBRARY, tmp_path), sae)


@needs("dictionary_learning")
def test_what_its_trainer_wrote_computes_the_same_and_goes_back_to_the_bit(tmp_path):
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.utils import load_dictionary

    options = {"steps": 100, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 1, "lm_name": "m", "seed": 3}
    trainer = TopKTrainer(**options, warmup_steps=0, device="cpu")
    for step in range(3):
        trainer.update(step, activations(40))
    (tmp_path / "theirs").mkdir()
    torch.save(trainer.ae.state_dict(), tmp_path / "theirs" / "ae.pt")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    sae, acts = interop.load(LIBRARY, tmp_path / "theirs"), activations(33)
    torch.testing.assert_close(sae(acts).x_hat, trainer.ae(acts), rtol=1e-5, atol=1e-5)
    interop.save(LIBRARY, sae, tmp_path / "back")
    back = load_dictionary(str(tmp_path / "back"), "cpu")[0].state_dict()
    for name, tensor in trainer.ae.state_dict().items():
        assert name == "threshold" or torch.equal(back[name], tensor), name
