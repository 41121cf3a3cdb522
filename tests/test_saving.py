"""A saved SAE is loaded only if its parts agree: config, weights, their checksum and their sizes."""

import copy
import itertools
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from csae import ContextualSAE, TopKSAE
from csae.checkpoint import load_sae
from csae.errors import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def new(arch="contextual"):
    torch.manual_seed(0)
    if arch == "topk":
        return TopKSAE(6, 15, 3)
    return ContextualSAE(6, 15, 3, n_heads=2, d_head=4, d_value=5, d_memory=7, query="past")


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_checksum(file):
    """The file as version 0.1 wrote it."""
    save_file(load_file(file), file)


def refused(folder):
    with pytest.raises(UserError) as error:
        load_sae(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def test_an_argument_that_is_changed_later_is_saved(tmp_path):
    sae = ContextualSAE(6, 12, 4, n_heads=2)
    sae.k, sae.sweeps, sae.dead_after = 3, 7, 5
    sae.save_pretrained(tmp_path)
    loaded = load_sae(tmp_path)
    assert (loaded.k, loaded.k_mem, loaded.sweeps, loaded.dead_after) == (3, 3, 7, 5)
    assert loaded.config == sae.config
    again = copy.deepcopy(loaded)
    again.k_mem = 2
    assert (loaded.k_mem, loaded.config["k_mem"], again.config["k_mem"]) == (3, None, 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 0, "k: given 0; needed 1"),
        ("k", 2.0, "k: given a float"),
        ("k_mem", 5, "k_mem: given 5; needed 1 to k = 3"),
        ("query", "next", "query: given 'next'"),
        ("aux_coef", -1, "aux_coef: given -1"),
        ("d_sae", 5, "d_sae: given 5; needed 15"),
        ("n_heads", 1, "n_heads: given 1; needed 2"),
    ],
)
def test_what_an_argument_cant_be_changed_to_is_refused(name, value, message):
    sae = new()
    before = sae.config
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        setattr(sae, name, value)
    assert sae.config == before


def test_a_parameter_of_another_shape_is_not_saved(tmp_path):
    sae = new()
    sae.W_dec = torch.nn.Parameter(sae.W_dec[:5].detach())
    with pytest.raises(ValueError, match=r"W_dec is \[5, 6\]; needed \[15, 6\]"):
        sae.save_pretrained(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("name", list(new().state_dict()))
def test_a_flipped_bit_in_any_tensor_is_refused(name, tmp_path):
    sae = new()
    sae.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start, _ = header[name]["data_offsets"]
    content[8 + int.from_bytes(content[:8], "little") + start] ^= 1
    file.write_bytes(content)
    assert "their checksum differs" in refused(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda t: {**t, "b_dec": t["b_dec"].half()}, lambda t: {**t, "W_enc": t["W_dec"], "W_dec": t["W_enc"] + 1}],
    ids=["another dtype", "other values"],
)
def test_tensors_that_were_exchanged_are_refused(change, tmp_path):
    new().save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as stored:
        about = stored.metadata()
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS, metadata=about)
    assert "their checksum differs" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_have_a_checksum(dtype, tmp_path):
    sae = new().to(dtype)
    sae.save_pretrained(tmp_path)
    for name, tensor in load_sae(tmp_path).state_dict().items():
        assert torch.equal(tensor, sae.state_dict()[name].to(tensor.dtype)), name


def test_weights_of_an_earlier_version_still_load(tmp_path):
    sae = new()
    sae.save_pretrained(tmp_path)
    without_checksum(tmp_path / WEIGHTS)
    assert torch.equal(load_sae(tmp_path).W_mem, sae.W_mem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(k=2), "k is 2, not 3"),
        (lambda c: c.pop("query"), "query is missing, not 'past'"),
        (lambda c: c.update(sweeps=10**9), "sweeps is 1000000000, not 3"),
        (lambda c: c.update(dead_after=1), "dead_after is 1, not 10000000"),
        (lambda c: c.update(query="x" * 10_000), "not 'past'"),
        (lambda c: c.update(arch="topk"), "arch is 'topk', not 'contextual'"),
    ],
    ids=["k", "query", "sweeps", "dead_after", "a long value", "arch"],
)
def test_a_config_that_was_changed_is_refused(change, message, tmp_path):
    new().save_pretrained(tmp_path)
    edit(tmp_path / CONFIG, change)
    assert message in refused(tmp_path)


def test_what_else_a_config_says_is_no_argument(tmp_path):
    sae = new()
    sae.save_pretrained(tmp_path)
    edit(tmp_path / CONFIG, lambda c: c.update(model="m", layer=3, fvu=0.1, data={"text": "t"}))
    loaded = load_sae(tmp_path)
    assert loaded.config == sae.config


def test_an_argument_that_a_caller_overrides_is_his(tmp_path):
    new().save_pretrained(tmp_path)
    assert ContextualSAE.from_pretrained(tmp_path, k=2, sweeps=1).k == 2


ARGUMENTS = ["d_sae", "n_heads", "d_memory", "k_mem", "sweeps", "k", "dead_after", "query"]
ODD = ["8", 2.0, True, None, [2], {}, 10**400]
MEANT = [("k_mem", None), ("sweeps", 10**400), ("dead_after", 10**400)]  # all, and many


@pytest.mark.parametrize(("name", "value"), [of for of in itertools.product(ARGUMENTS, ODD) if of not in MEANT])
def test_an_argument_of_another_type_is_one_line(name, value, tmp_path):
    new().save_pretrained(tmp_path)
    without_checksum(tmp_path / WEIGHTS)
    edit(tmp_path / CONFIG, lambda c: c.update({name: value}))
    refused(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", "{", "", '{"arch": ' + "[" * 100_000], ids=lambda text: text[:9]
)
def test_a_damaged_config_is_one_line_from_the_class_too(content, tmp_path):
    new().save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(UserError) as error:
        ContextualSAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["d_sae", "d_memory", "n_heads", "d_value"])
def test_sizes_are_compared_before_memory_is_taken(name, tmp_path):
    new().save_pretrained(tmp_path)
    without_checksum(tmp_path / WEIGHTS)
    edit(tmp_path / CONFIG, lambda c: c.update({name: 600_000_000}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(tmp_path)
    assert "needed [" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_failed_save_leaves_the_sae_that_was_there(tmp_path, monkeypatch):
    sae = new()
    sae.save_pretrained(tmp_path)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csae.tensors.save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        new("topk").save_pretrained(tmp_path)
    assert torch.equal(load_sae(tmp_path).W_mem, sae.W_mem)


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not written"):
        new().save_pretrained(tmp_path / "file")


def test_a_readme_that_someone_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("my notes\n")
    new().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my notes\n"
    (tmp_path / "README.md").unlink()
    new("topk").save_pretrained(tmp_path)
    new("contextual").save_pretrained(tmp_path)
    assert "contextual" in (tmp_path / "README.md").read_text()


def test_killed_between_weights_and_config_it_is_the_new_one(tmp_path):
    new().save_pretrained(tmp_path)
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); import csae.files; from test_saving import new\n"
        "replace = os.replace\n"
        "def stop(one, other):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if str(other).endswith('config.json') else replace(one, other)\n"
        "os.replace = stop\n"
        "sae = new(); sae.W_mem.data += 1; sae = type(sae)(**{**sae._hub_mixin_config, 'k': 2}); "
        "sae.save_pretrained(sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path, Path(__file__).parent], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert json.loads((tmp_path / "config.json").read_text())["k"] == 3
    for sae in (load_sae(tmp_path), ContextualSAE.from_pretrained(tmp_path)):
        assert sae.k == 2
        assert not torch.equal(sae.W_mem, new().W_mem)
    (tmp_path / ".config.json.next").unlink()
    assert "k is 3, not 2" in refused(tmp_path)


def test_sizes_are_compared_without_memory_where_a_model_of_transformers_was_loaded(monkeypatch):
    # transformers replaces linspace while it loads, and torch.device may not know torch's own from then on.
    of_torch = torch.linspace
    monkeypatch.setattr(
        torch, "linspace", lambda *args, device="cpu", **kwargs: of_torch(*args, device=device, **kwargs)
    )
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in new().parameters())
