"""Options that would be ignored beside others, or say nothing, are refused; more of `train` in test_cli_train.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cli import csae

from csae import TopKSAE


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "run"
    TopKSAE(8, 16, 2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("option", [("--n-ctx", "16"), ("--append",), ("--dtype", "float16")])
def test_beside_a_check_of_a_cache(option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = csae("cache", "--check", tmp_path, *option, capsys=capsys)
    assert (code, out) == (2, "")
    assert f"{option[0]}: given with --check, which only reads a folder: it has no effect there" in err


@pytest.mark.parametrize("option", [("--windows", "4"), ("--text", "README.md"), ("--n-ctx", "64")])
@pytest.mark.parametrize("library", ["sae_lens", "sparsify", "dictionary_learning", "gemma_scope"])
def test_text_for_an_export_of_weights(
    library: str, option: tuple[str, ...], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = csae("export", saved, "--to", library, "-o", tmp_path / "out", *option, capsys=capsys)
    assert code == 2
    assert f"{option[0]}: given with --to {library}, which takes the weights alone: it has no effect there" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-n", "3"), "-n: given without a search: it has no effect there"),
        (("--find", "the", "--max-tokens", "9"), "--max-tokens: given with --find, which searches what is built"),
        (("--feature", "3", "--n-ctx", "9"), "--n-ctx: given with --feature, which searches what is built"),
    ],
)
def test_a_search_and_a_build(
    options: tuple[str, ...], message: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = csae("features", saved, *options, "--device", "cpu", capsys=capsys)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("option", [("--private",), ("--message", "new")])
def test_a_push_that_uploads_nothing(
    option: tuple[str, ...], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = csae("push", saved, "org/name", "--dry-run", tmp_path / "out", *option, capsys=capsys)
    assert code == 2
    assert f"{option[0]}: given with --dry-run, which uploads nothing: it has no effect there" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "cache", "eval", "view", "features", "export", "demo", "evidence"])
def test_a_window_of_one_position(command: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [saved] if command in ("eval", "view", "features", "export") else []
    code, _, err = csae(command, *where, "--n-ctx", "1", capsys=capsys)
    assert code == 2
    assert "Invalid value for '--n-ctx': 1 is not in the range x>=2" in err
    assert "loading" not in err
