"""What several ranks trained and saved in several files, in every command: as the same SAE in one file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import Ranks
from test_training_command import SENTENCE, arguments

from csae import interop
from csae.checkpoint import load_sae
from csae.cli import cli

LIBRARIES = ["sae_lens", "sparsify", "dictionary_learning", "neuronpedia", "delphi"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> dict[str, tuple[Path, Path]]:
    """By architecture a run that two ranks trained, and a copy with its SAE in one file."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("\n\n".join(SENTENCE.format(i=i, square=i * i, day=i % 7) for i in range(400)))
    more = ("--text", text, "--arch", "topk", "--arch", "contextual", "--selection", "topk")
    with Ranks(2, folder / "said", arguments(tiny_model_path, folder / "runs", *more)) as ranks:
        assert [of.code for of in ranks.wait(300)] == [0, 0]
    found = {}
    for run in (folder / "runs").iterdir():
        assert len([*run.glob("model-*-of-00002.safetensors")]) == 2
        copy = shutil.copytree(run, folder / "whole" / run.name)
        load_sae(run).save_pretrained(copy)
        assert (copy / "model.safetensors").is_file()
        found["topk" if "topk" in run.name else "contextual"] = run, copy
    assert len(found) == 2
    return found


def contents(folder: Path, without: Path) -> dict[str, bytes]:
    """The files of a folder; `without`: a path that they may name."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(of.relative_to(folder)): of.read_bytes().replace(str(without).encode(), b"RUN") for of in files}


def command(*given: object) -> None:
    cli([str(of) for of in given], standalone_mode=False)


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_evaluated(arch: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, copy = folders[arch]
    for each in (run, copy):
        command("eval", each, "--windows", 8, "--ce-windows", 2, "--device", "cpu")
    figures, expected = (json.loads((each / "eval.json").read_text()) for each in (run, copy))
    assert {name for name in figures if figures[name] != expected[name]} <= {"tokens_per_s", "tokens_per_s_sweeps"}
    with Ranks(2, tmp_path / "said", ["eval", run, "--windows", 8, "--ce-windows", 2, "--device", "cpu"]) as ranks:
        found = ranks.wait()
    assert [of.code for of in found] == [0, 0], found
    again = json.loads((run / "eval.json").read_text())
    assert again["fvu"] == pytest.approx(figures["fvu"], rel=1e-4)


PER_TOKEN_ONLY = ("sparsify", "dictionary_learning")
EXPORTS = [("topk", library) for library in LIBRARIES]
EXPORTS += [("contextual", library) for library in LIBRARIES if library not in PER_TOKEN_ONLY]


@pytest.mark.parametrize(("arch", "library"), EXPORTS)
def test_exported(arch: str, library: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    outs = tmp_path / "one", tmp_path / "other"
    text = () if library in interop.LIBRARIES else ("--windows", 4, "--device", "cpu")
    for each, out in zip(folders[arch], outs, strict=True):
        command("export", each, "--to", library, "-o", out, *text)
    one, other = (contents(out, each) for each, out in zip(folders[arch], outs, strict=True))
    assert one.keys() == other.keys() != set()
    for name, content in one.items():
        assert content == other[name], name


@pytest.mark.parametrize("library", LIBRARIES[:3])
def test_in_other_libraries(library: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, _ = folders["topk"]
    interop.save(library, load_sae(run), tmp_path / "out")
    assert interop.load(library, tmp_path / "out").W_enc.equal(load_sae(run).W_enc)


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_looked_at(arch: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    pages, indexes = [], []
    for number, each in enumerate(folders[arch]):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "text.txt").write_text(SENTENCE.format(i=1, square=1, day=1))
        command("features", each, "--max-tokens", 400, "-o", out / "features.db", "--device", "cpu")
        given = ("--text", out / "text.txt", "--index", out / "features.db", "--device", "cpu")
        command("view", each, "-o", out / "view.html", *given)
        pages.append(re.sub(re.escape(str(each)), "RUN", (out / "view.html").read_text()))
        indexes.append((out / "features.db").stat().st_size)
    assert pages[0] == pages[1]
    assert indexes[0] == indexes[1]


@pytest.mark.parametrize("arch", ["topk", "contextual"])
def test_pushed(arch: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, copy = folders[arch]
    for each, out in ((run, tmp_path / "one"), (copy, tmp_path / "other")):
        command("push", each, "org/name", "--dry-run", out)
    one, other = (contents(tmp_path / name, each) for name, each in (("one", run), ("other", copy)))
    assert one.keys() == other.keys()
    assert one["README.md"] == other["README.md"]
    tensors = load_sae(copy).state_dict()
    for name, tensor in load_sae(tmp_path / "one").state_dict().items():
        assert tensor.equal(tensors[name])
