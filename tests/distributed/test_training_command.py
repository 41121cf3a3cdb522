"""`csae train` over several ranks with what it can be asked for: a language model, text, a stream, several SAEs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Ranks
from same_runs import check_same_run

from csae.cli import cli

SENTENCE = "{i}: the sluice at the lower mill, the {square}th, was opened on morning {day}."


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [SENTENCE.format(i=i, square=i * i, day=i % 7) for i in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return tmp_path / "text.txt"


def arguments(model: Path, out: Path, *more: object) -> list[str]:
    size = ["--d-sae", 20, "--k", 2, "--n-ctx", 16, "--batch-windows", 4, "--tokens", 10 * 4 * 16]
    how = ["--device", "cpu", "--log-every", 2, "--checkpoint-every", 4, "--dead-after", 64, "--layer", 2]
    return [str(of) for of in ["train", "-o", out, "--model", model, *size, *how, *more]]


def both(size: int, tmp_path: Path, model: Path, *more: object) -> tuple[Path, Path]:
    """The same command over several ranks and in one process; the folders of both."""
    cli(arguments(model, tmp_path / "alone", *more), standalone_mode=False)
    over_ranks(size, tmp_path, model, *more)
    return tmp_path / "run", tmp_path / "alone"


def over_ranks(size: int, tmp_path: Path, model: Path, *more: object) -> None:
    with Ranks(size, tmp_path / "said", arguments(model, tmp_path / "run", *more)) as ranks:
        first, *others = ranks.wait(300)
    assert first.code == 0, first.said
    assert first.printed.startswith("trained: ")
    for other in others:
        assert (other.code, other.printed) == (0, "")
        assert not other.said


def test_on_text(tmp_path: Path, tiny_model_path: Path, text: Path) -> None:
    check_same_run(*both(2, tmp_path, tiny_model_path, "--text", text))
    assert (tmp_path / "run" / "config.yaml").read_text() == (tmp_path / "alone" / "config.yaml").read_text()


@pytest.mark.slow
def test_on_a_stream(tmp_path: Path, tiny_model_path: Path, text: Path) -> None:
    how = ("--arch", "topk", "--shuffle-buffer", 8, "--workers", 0)
    check_same_run(*both(3, tmp_path, tiny_model_path, "--dataset", text.with_suffix(".jsonl"), *how))


@pytest.mark.slow
def test_several_saes(tmp_path: Path, tiny_model_path: Path, text: Path) -> None:
    several = ("--text", text, "--arch", "topk", "--arch", "contextual", "--k", 3, "--layer", 1)
    found, expected = both(2, tmp_path, tiny_model_path, *several)
    names = [folder.name for folder in sorted(expected.iterdir())]
    assert len(names) == 8
    for name in names:
        check_same_run(found / name, expected / name, atol=1e-3)


@pytest.mark.slow
def test_begun_with_another_sae_or_options_in_a_file(tmp_path: Path, tiny_model_path: Path, text: Path) -> None:
    of_text = ("--text", text, "--arch", "topk")
    cli(arguments(tiny_model_path, tmp_path / "first", *of_text), standalone_mode=False)
    check_same_run(*both(2, tmp_path, tiny_model_path, "--text", text, "--init", tmp_path / "first"))
    asked, again = tmp_path / "first" / "config.yaml", tmp_path / "again"
    with Ranks(2, tmp_path / "said", ["train", "-o", again, "--config", asked, "--device", "cpu"]) as ranks:
        found = ranks.wait(300)
    assert [of.code for of in found] == [0, 0], found[0].said
    # Not beside one process: there a last bit of W_enc changes two features by 1e-3, whose gradients nearly vanish.
    (tmp_path / "same").mkdir()
    over_ranks(2, tmp_path / "same", tiny_model_path, *of_text)
    check_same_run(again, tmp_path / "same" / "run", bits=True)
