"""Each target of `csae export` with each kind of SAE: it loads back with the same numbers, or one line refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported import CLOSE, activations

from csae import ContextualSAE, TopKSAE, interop
from csae.errors import UserError
from csae.export import LIBRARIES, TARGETS, export
from csae.sae import SAE
from csae.trained_on import TrainedOn

BACK, REFUSED = "loads back", "one line"
SIZES = (16, 40, 4)
KINDS = {
    "topk": lambda: TopKSAE(*SIZES),
    "batch": lambda: TopKSAE(*SIZES, selection="batch"),
    "jumprelu": lambda: TopKSAE(*SIZES, selection="jumprelu"),
    "matryoshka": lambda: TopKSAE(*SIZES, prefixes=(8, 20)),
    "matryoshka, batch": lambda: TopKSAE(*SIZES, selection="batch", prefixes=(8, 20)),
    "contextual": lambda: ContextualSAE(*SIZES, n_heads=2, d_head=4, d_value=4, d_memory=8),
    "contextual, batch": lambda: ContextualSAE(*SIZES, selection="batch", n_heads=2, d_head=4, d_value=4, d_memory=8),
    "transcoder": lambda: TopKSAE(*SIZES, d_out=16),
    "transcoder with skip": lambda: TopKSAE(*SIZES, d_out=16, skip=True),
    "transcoder, batch": lambda: TopKSAE(*SIZES, d_out=16, selection="batch"),
    "contextual transcoder": lambda: ContextualSAE(*SIZES, d_out=16, n_heads=2, d_head=4, d_value=4, d_memory=8),
}
# In the order of KINDS: what sae_lens, sparsify, dictionary_learning and gemma_scope make of it.
EXPECTED = {
    "topk": (BACK, BACK, BACK, REFUSED),
    "batch": (BACK, REFUSED, BACK, BACK),
    "jumprelu": (BACK, REFUSED, BACK, BACK),
    "matryoshka": (BACK, BACK, BACK, REFUSED),
    "matryoshka, batch": (BACK, REFUSED, BACK, BACK),
    "contextual": (BACK, REFUSED, REFUSED, REFUSED),
    "contextual, batch": (BACK, REFUSED, REFUSED, REFUSED),
    "transcoder": (REFUSED, BACK, REFUSED, REFUSED),
    "transcoder with skip": (REFUSED, BACK, REFUSED, REFUSED),
    "transcoder, batch": (REFUSED, REFUSED, REFUSED, REFUSED),
    "contextual transcoder": (REFUSED, REFUSED, REFUSED, REFUSED),
}


def made(kind: str, folder: Path, model: str) -> SAE:
    torch.manual_seed(3)
    sae = KINDS[kind]()
    of_target = (torch.linspace(0, 1, 16), 3.0) if sae.is_transcoder else ()
    sae.initialise(torch.linspace(-1, 1, 16), 0.5, *of_target)
    with torch.no_grad():
        sae.b_enc.add_(0.01 * torch.randn(40))
        if sae.W_skip is not None:
            sae.W_skip.add_(0.1 * torch.randn(16, 16))
        if sae.selection == "batch":
            sae.threshold.fill_(0.4)
        elif sae.selection == "jumprelu":
            sae.threshold.copy_(0.3 + 0.2 * torch.rand(40))
    hooks = {"hook": "mlp.in:1", "hook_to": "mlp.out:1"} if sae.is_transcoder else {"hook": "mlp.out:1"}
    sae.trained_on = TrainedOn(model=model, **hooks)
    sae.eval().save_pretrained(folder)
    return sae


def test_each_target_and_kind_is_in_the_table() -> None:
    assert set(EXPECTED) == set(KINDS)
    assert TARGETS[:4] == LIBRARIES == ("sae_lens", "sparsify", "dictionary_learning", "gemma_scope")


@pytest.mark.parametrize("kind", KINDS)
def test_weights(kind: str, tmp_path: Path, tiny_model_path: Path) -> None:
    sae, acts = made(kind, tmp_path / "sae", str(tiny_model_path)), activations()
    found = []
    for to in LIBRARIES:
        out = tmp_path / to
        try:
            (folder,) = export(tmp_path / "sae", to, out, {"model": str(tiny_model_path)})
        except UserError as error:
            found.append(REFUSED if "\n" not in str(error) and not out.exists() else f"badly refused: {error}")
            continue
        # A file of Gemma Scope does not say how many features a token has.
        loaded = interop.load(to, folder, *((sae.k, sae.k_max) if to == "gemma_scope" else ()))
        with torch.no_grad():
            expected, came = sae(acts), loaded(acts)
        torch.testing.assert_close(came.x_hat, expected.x_hat, **CLOSE)
        # The libraries know no scale, so it went into the weights; a transcoder's codes are in units of its target.
        assert loaded.scale == 1
        scale = sae.target_scale if sae.is_transcoder else sae.scale
        torch.testing.assert_close(*(of.sum(-1) for of in (came.code.values, expected.code.values * scale)), **CLOSE)
        found.append(BACK)
    assert tuple(found) == EXPECTED[kind]


@pytest.mark.parametrize("to", ["neuronpedia", "delphi"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind: str, to: str, tmp_path: Path, tiny_model_path: Path) -> None:
    """What is in the files is tested in test_export_neuronpedia and test_export_delphi; each kind has some."""
    made(kind, tmp_path / "sae", str(tiny_model_path))
    text = tmp_path / "text.txt"
    text.write_text("The sluice at the lower mill was opened on the third morning. " * 20)
    given = {"model": str(tiny_model_path), "text": str(text), "n_ctx": 16}
    export(tmp_path / "sae", to, tmp_path / "out", given, n_windows=3)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert files
    assert sum(file.stat().st_size for file in files) > 1000
