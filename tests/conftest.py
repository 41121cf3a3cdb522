"""What tests share: a tiny language model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from csae.data.language_model import LanguageModel


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of width 16, 3 layers, context 64, about 300 tokens."""
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_lm(tiny_model_path: Path) -> LanguageModel:
    """The tiny model, loaded on the CPU."""
    return LanguageModel.load(tiny_model_path, device="cpu")
