"""A run is evaluated on held-out windows or others that it did not train on, at its own model and layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from csae import ContextualSAE, TopKSAE
from csae.checkpoint import load_sae
from csae.config import TrainConfig
from csae.data.activations import ModelActivations, ShardActivations
from csae.data.text import TokenWindows
from csae.errors import UserError
from csae.evaluate import data_in_words, evaluate
from csae.evaluate_run import evaluate_run, keep_held_out_fvu
from csae.train import train

N, T, D = 20, 6, 8
CONFIG = TrainConfig(steps=8, batch_windows=2)


def shards(folder: Path, acts: torch.Tensor, about: dict | None = None, tokens: torch.Tensor | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({"activations": acts} | ({} if tokens is None else {"tokens": tokens}), folder / "a.safetensors")
    if about is not None:
        (folder / "activations.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def acts() -> torch.Tensor:
    return torch.randn(N, T, D, generator=torch.Generator().manual_seed(0))


def trained(run: Path, source, origin=None, windows=range(16)) -> TopKSAE | ContextualSAE:
    torch.manual_seed(0)
    sae = TopKSAE(source.d_in, 32, 2)
    sae.initialise(torch.zeros(source.d_in), 1.0)
    train(sae, source, windows, run, CONFIG, origin)
    return load_sae(run)


def test_the_windows_that_a_run_held_out(acts: torch.Tensor, tmp_path: Path) -> None:
    folder = shards(tmp_path / "acts", acts)
    source = ShardActivations(folder)
    sae = trained(tmp_path / "run", source, {"activations": str(folder), "held_out": 0.2})
    found = evaluate_run(tmp_path / "run", sae)
    assert (found["which"], found["windows"], found["trained_windows"], found["left_out_windows"]) == (
        "held out",
        4,
        0,
        0,
    )
    assert found["fvu"] == evaluate(sae, source, range(16, 20))["fvu"]
    assert found["data"] == "acts"
    assert data_in_words(found) == "on 4 held-out windows of acts"
    keep_held_out_fvu(tmp_path / "run", sae, found)
    assert load_sae(tmp_path / "run").trained_on.held_out_fvu == found["fvu"]
    assert f"{found['fvu']:.4f}" in (tmp_path / "run" / "README.md").read_text()


def test_a_held_out_window_that_was_trained_on_elsewhere_in_the_text_is_counted(
    acts: torch.Tensor, tmp_path: Path
) -> None:
    acts[17] = acts[3]
    folder = shards(tmp_path / "acts", acts)
    sae = trained(tmp_path / "run", ShardActivations(folder), {"activations": str(folder), "held_out": 4})
    found = evaluate_run(tmp_path / "run", sae)
    assert (found["windows"], found["trained_windows"]) == (4, 1)
    assert "1 of them are windows that it trained on" in data_in_words(found)


@pytest.mark.parametrize("with_tokens", [True, False], ids=["tokens", "activations"])
def test_trained_windows_in_other_data_are_left_out_or_asked_for(
    acts: torch.Tensor, with_tokens: bool, tmp_path: Path
) -> None:
    tokens = torch.arange(N * T).view(N, T) if with_tokens else None
    sae = trained(tmp_path / "run", ShardActivations(shards(tmp_path / "acts", acts, tokens=tokens)))
    mixed = [3, 18, 5, 19, 3]
    other = {"activations": str(shards(tmp_path / "b", acts[mixed], None, None if tokens is None else tokens[mixed]))}
    found = evaluate_run(tmp_path / "run", sae, other)
    assert (found["which"], found["windows"], found["left_out_windows"]) == ("not trained on", 2, 3)
    assert found["fvu"] == evaluate(sae, ShardActivations(tmp_path / "acts"), [18, 19])["fvu"]
    assert data_in_words(found) == "on 2 windows that it did not train on of b; 3 that it trained on were left out"
    found = evaluate_run(tmp_path / "run", sae, other, trained_windows=True)
    assert (found["which"], found["windows"], found["trained_windows"]) == ("asked for", 5, 3)

    only = {"activations": str(shards(tmp_path / "c", acts[:4], None, None if tokens is None else tokens[:4]))}
    with pytest.raises(UserError, match="it trained on all 4 windows of c: give other data, or --trained-windows"):
        evaluate_run(tmp_path / "run", sae, only)


def test_text_is_recognised_whether_saved_or_read_from_the_model(tiny_lm, tmp_path: Path) -> None:
    tokens = torch.randint(0, tiny_lm.n_vocab, (N, T), generator=torch.Generator().manual_seed(0))
    source = ModelActivations(tiny_lm, 2, TokenWindows(tokens, torch.zeros_like(tokens)))
    sae = trained(tmp_path / "run", source)
    folder = shards(tmp_path / "saved", source.read(range(N)).acts.half(), None, tokens)
    found = evaluate_run(tmp_path / "run", sae, {"activations": str(folder)})
    assert (found["windows"], found["left_out_windows"]) == (4, 16)


def test_data_that_has_changed_is_not_taken_for_held_out(acts: torch.Tensor, tmp_path: Path) -> None:
    folder = shards(tmp_path / "acts", acts)
    sae = trained(tmp_path / "run", ShardActivations(folder), {"activations": str(folder), "held_out": 0.2})
    save_file({"activations": acts[:10]}, folder / "a.safetensors")
    with pytest.raises(UserError, match="it trained on all 2 windows of acts"):
        evaluate_run(tmp_path / "run", sae)


def test_windows_of_another_length_can_not_be_told(acts: torch.Tensor, tmp_path: Path) -> None:
    sae = trained(tmp_path / "run", ShardActivations(shards(tmp_path / "acts", acts)))
    other = {"activations": str(shards(tmp_path / "short", acts[:, :4].contiguous()))}
    found = evaluate_run(tmp_path / "run", sae, other)
    assert (found["which"], found["trained_windows"]) == ("unknown", None)
    assert "which it trained on can't be told" in data_in_words(found)


@pytest.mark.parametrize("origin", [None, {}, {"note": "by hand"}], ids=["none", "empty", "something else"])
def test_a_run_made_in_python_asks_for_what_is_missing(acts: torch.Tensor, origin, tmp_path: Path) -> None:
    folder = shards(tmp_path / "acts", acts)
    sae = trained(tmp_path / "run", ShardActivations(folder), origin)
    with pytest.raises(UserError, match=r"give --activations DIR, or --model, --layer and --text \(or --dataset\)"):
        evaluate_run(tmp_path / "run", sae)
    assert evaluate_run(tmp_path / "run", sae, {"activations": str(folder)})["windows"] == 4


def test_a_run_without_held_out_windows_is_no_key_error(acts: torch.Tensor, tmp_path: Path) -> None:
    folder = shards(tmp_path / "acts", acts)
    sae = trained(tmp_path / "run", ShardActivations(folder), {"activations": str(folder)})
    found = evaluate_run(tmp_path / "run", sae)
    assert (found["which"], found["windows"], found["left_out_windows"]) == ("not trained on", 4, 16)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"origin": 3}',
        '{"data": []}',
        '{"origin": {"held_out": NaN}}',
        '{"origin": {"held_out": "some"}}',
        '{"origin": {"n_ctx": []}}',
    ],
)
def test_a_damaged_run_json_is_one_line(damage: str, acts: torch.Tensor, tmp_path: Path) -> None:
    folder = shards(tmp_path / "acts", acts)
    sae = trained(tmp_path / "run", ShardActivations(folder), {"activations": str(folder), "held_out": 4})
    (tmp_path / "run" / "run.json").write_text(damage)
    with pytest.raises(UserError, match=r"run\.json: ") as error:
        evaluate_run(tmp_path / "run", sae)
    assert "\n" not in str(error.value)


def test_an_sae_of_another_place_is_refused(acts: torch.Tensor, tiny_lm, tmp_path: Path) -> None:
    tokens = torch.randint(0, tiny_lm.n_vocab, (N, T), generator=torch.Generator().manual_seed(0))
    windows = TokenWindows(tokens, torch.zeros_like(tokens))
    source = ModelActivations(tiny_lm, 2, windows)
    sae = trained(tmp_path / "run", source)
    assert evaluate(sae, source, range(16, 20), tiny_lm)["layer"] == 2
    other = ModelActivations(tiny_lm, 1, windows)
    with pytest.raises(UserError, match=r"trained on layer 2 of .*, and this is layer 1 of .*--elsewhere"):
        evaluate(sae, other, range(16, 20))
    assert evaluate(sae, other, range(16, 20), elsewhere=True)["layer"] == 1
    with pytest.raises(UserError, match="and this is layer 3 of"):
        evaluate(sae, source, range(16, 20), tiny_lm, layer=3)  # where the reconstruction is put in


def test_an_sae_of_mlp_outputs_is_refused_at_the_residual_stream(tiny_lm, tmp_path: Path) -> None:
    tokens = torch.randint(0, tiny_lm.n_vocab, (N, T), generator=torch.Generator().manual_seed(0))
    stream = ModelActivations(tiny_lm, 2, TokenWindows(tokens, torch.zeros_like(tokens)))
    mlp = torch.randn(N, T, tiny_lm.d_in)
    unsaid = trained(tmp_path / "unsaid", ShardActivations(shards(tmp_path / "mlp-outputs", mlp)))
    with pytest.raises(UserError, match="'mlp-outputs', which don't say what they are of"):
        evaluate(unsaid, stream, range(4))
    about = {"model": tiny_lm.name, "layer": 2, "hook": "mlp_out"}
    said = trained(tmp_path / "said", ShardActivations(shards(tmp_path / "b", mlp, about)))
    with pytest.raises(UserError, match=r"trained on mlp_out of layer 2 of .*, and this is layer 2 of"):
        evaluate(said, stream, range(4))


def test_a_share_held_out_that_was_changed_later_is_not_believed(acts: torch.Tensor, tmp_path: Path) -> None:
    folder = shards(tmp_path / "acts", acts)
    sae = trained(tmp_path / "run", ShardActivations(folder), {"activations": str(folder), "held_out": 4})
    file = tmp_path / "run" / "run.json"
    job = json.loads(file.read_text())
    job["origin"]["held_out"] = 0.5
    file.write_text(json.dumps(job))
    found = evaluate_run(tmp_path / "run", sae)
    assert (found["which"], found["windows"], found["trained_windows"]) == ("not trained on", 4, 0)
