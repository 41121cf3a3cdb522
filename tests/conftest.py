"""What tests share: a tiny language model on disk, and readable ids for parameters of any kind."""

from __future__ import annotations

import os
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest
import torch

os.environ["CSAE_TOKEN_CACHE"] = ""  # none: a test that finds what another one left tests less than it seems to

if TYPE_CHECKING:
    from csae.data.language_model import LanguageModel


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of width 16, 3 layers, context 64, about 300 tokens."""
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_lm(tiny_model_path: Path) -> LanguageModel:
    """The tiny model, loaded on the CPU."""
    from csae.data.language_model import LanguageModel

    return LanguageModel.load(tiny_model_path, device="cpu")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> dict[str, Path]:
    """A run of each architecture on the tiny model, trained and evaluated: {"topk", "contextual"}."""
    from runs_of_a_model import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"), tiny_model_path)


def pytest_make_parametrize_id(val: Any, argname: str) -> str:
    """Ids for any value: `k=3` for a dict, `float32[2, 5]` for a tensor, the name of the argument for a lambda."""
    if isinstance(val, FunctionType) and val.__name__ == "<lambda>":
        return argname
    return readable(val)[:80]


def readable(value: Any) -> str:
    match value:
        case str() | bytes():
            return ascii(value).removeprefix("b")[1:-1]
        case float():
            return f"{value:g}"
        case torch.dtype():
            return str(value).removeprefix("torch.")
        case torch.Tensor(shape=()):
            return readable(value.item())
        case torch.Tensor():
            return f"{readable(value.dtype)}{list(value.shape)}"
        case dict():
            return " ".join(f"{name}={readable(of)}" for name, of in value.items()) or "{}"
        case tuple() | list():
            return f"[{', '.join(map(readable, value))}]"
        case type() | FunctionType():
            return value.__name__
        case None | bool() | int() | Path():
            return str(value)
        case _:
            return type(value).__name__
