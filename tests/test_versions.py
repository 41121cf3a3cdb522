"""Versions out of the tested range, and another project's package csae, end in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import csae
from csae import versions
from csae.data.language_model import LanguageModel
from csae.data.text import load_token_dataset
from csae.errors import UserError
from csae.ops import backend

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMER = "Fast sparse autoencoders, and the contextual SAE: one that looks back and encodes only what is new"
FOREIGN = "Attestation of something else"


def install(folder: Path, name: str, version: str, *requires: str, summary: str = "") -> None:
    """What says that a distribution is installed in `folder`."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Summary: {summary}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires), ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is looked into first for what is installed; csae is, with the ranges of pyproject.toml."""
    extras = [line for of in PROJECT["optional-dependencies"].values() for line in of]
    install(tmp_path / "site", versions.DISTRIBUTION, "0.1.0", *PROJECT["dependencies"], *extras)
    monkeypatch.syspath_prepend(tmp_path / "site")
    cached = (versions.check, versions.check_name, versions._tested, backend._module)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "site"
    for function in cached:
        function.cache_clear()


def run(site: Path, program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that sees what is installed in `site`, and this csae."""
    path = os.pathsep.join([str(site), str(Path(csae.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program, *args]
    return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True)


def test_the_name_is_that_of_the_project() -> None:
    assert PROJECT["name"] == versions.DISTRIBUTION
    assert versions.pip_install("cli") == "pip install 'contextual-sae[cli]'"


def test_nothing_tells_to_install_the_package_of_another_project() -> None:
    files = [path for folder in ("csae", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "README.md", ROOT / "setup.py", ROOT / "Makefile"]
    wrong = re.compile(r"pip install[^`\n]*?[ '\"]csae\b")
    assert [path.name for path in files if wrong.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "library", ["torch", "triton", "numpy", "safetensors", "huggingface-hub", "transformers", "datasets"]
)
def test_what_is_declared_has_two_ends(library: str) -> None:
    lines = [*PROJECT["dependencies"], *(line for of in PROJECT["optional-dependencies"].values() for line in of)]
    (declared,) = (found for found in map(Requirement, lines) if found.name == library)
    assert {bound.operator for bound in declared.specifier} == {">=", "<"}


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        pytest.param("4.57.0", None, id="the oldest"),
        pytest.param("4.57.0+cpu", None, id="a local build of the oldest"),
        pytest.param("4.57.0rc1", None, id="a candidate of the oldest"),
        pytest.param("5.24.9", None, id="the newest"),
        pytest.param("5.24.0.dev0+git1234", None, id="what leads to the newest"),
        pytest.param("4.56.9", "older than csae needs", id="older"),
        pytest.param("5.25.0", "newer than csae was tested with", id="newer"),
        pytest.param("5.25.0.dev0", "newer than csae was tested with", id="what leads to a newer one"),
        pytest.param("of a fork", None, id="no version"),
    ],
)
def test_what_is_out_of_range(site: Path, monkeypatch: pytest.MonkeyPatch, installed: str, problem: str | None) -> None:
    monkeypatch.setattr(versions, "_installed", lambda library: installed)
    found = versions.out_of_range("transformers")
    if problem is None:
        assert found is None
    else:
        line, too_old = found
        assert line == f"transformers {installed} is {problem}: pip install 'transformers>=4.57,<5.25'"
        assert too_old == ("older" in problem)


def test_older_is_refused(site: Path) -> None:
    install(site, "transformers", "4.40.0")
    for kind in (UserError, ImportError):
        with pytest.raises(kind, match=r"^transformers 4\.40\.0 is older than csae needs: pip install '[^\n]*'$"):
            versions.check("transformers")


def test_newer_is_warned_of_once(site: Path) -> None:
    install(site, "huggingface-hub", "9.0")
    with pytest.warns(versions.UntestedVersion, match=r"^huggingface-hub 9\.0 is newer than csae was tested with"):
        versions.check("huggingface-hub")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check("huggingface-hub")
        versions.check("a-library-that-is-not-there")


def test_a_name_in_another_spelling(site: Path) -> None:
    install(site, "huggingface_hub", "0.20.0")
    assert "older" in versions.out_of_range("huggingface-hub")[0]
    assert "older" in versions.out_of_range("huggingface_hub")[0]


def test_a_library_without_metadata_says_its_version_itself(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise versions.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "version", nothing)
    monkeypatch.setattr(torch, "__version__", "2.3.0a0+git")
    assert "torch 2.3.0a0+git is older" in versions.out_of_range("torch")[0]


def test_a_checkout_that_was_never_installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> list[str]:
        raise versions.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "requires", nothing)
    install(site, "transformers", "1.0")
    versions.check("transformers")


def test_a_language_model_needs_a_transformers_that_was_tested(site: Path, tiny_model_path: Path) -> None:
    install(site, "transformers", "4.56.2")
    with pytest.raises(UserError, match=r"transformers 4\.56\.2 is older"):
        LanguageModel.load(tiny_model_path, device="cpu")


def test_a_splice_needs_a_transformers_that_was_tested(site: Path, tiny_lm: LanguageModel) -> None:
    install(site, "transformers", "4.56.2")
    with (
        pytest.raises(UserError, match=r"transformers 4\.56\.2 is older"),
        csae.splice(tiny_lm.model, 1, csae.TopKSAE(tiny_lm.d_in, 32, 2)),
    ):
        pass


def test_a_dataset_needs_a_datasets_that_was_tested(site: Path, tmp_path: Path) -> None:
    install(site, "datasets", "1.0")
    with pytest.raises(UserError, match=r"datasets 1\.0 is older"):
        load_token_dataset(tmp_path, 8)


def test_a_gpu_needs_a_triton_that_was_tested(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "triton", "3.5.1")
    monkeypatch.setattr(backend.triton, "available", lambda: True)
    with pytest.raises(UserError, match=r"triton 3\.5\.1 is older"):
        backend.kernels("topk_encode", torch.device("cuda"), torch.float32)


def test_the_ops_need_what_they_were_tested_with(site: Path) -> None:
    install(site, "huggingface-hub", "0.0.1")
    done = run(site, "import csae; csae.TopKSAE")
    assert re.search(r"VersionError: huggingface-hub 0\.0\.1 is older than csae needs: .*\n$", done.stderr), done.stderr


COMMAND = "import sys; sys.argv[0] = 'csae'; from csae.cli import main; main()"


def test_the_command_says_it_in_one_line(site: Path) -> None:
    install(site, "torch", "2.10.0+cu128")
    done = run(site, COMMAND, "train", "--activations", ".", "-o", "run")
    assert done.returncode == 2
    assert done.stderr == ("csae: torch 2.10.0+cu128 is older than csae needs: pip install 'torch>=2.11,<2.16'\n"), (
        done.stderr
    )


def test_newer_is_warned_of_in_one_line(site: Path) -> None:
    install(site, "torch", "99.0")
    done = run(site, "import csae.ops")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "UntestedVersion: torch 99.0 is newer than csae was tested with: pip install 'torch" in done.stderr


def test_info_shows_what_is_out_of_range(site: Path) -> None:
    from csae.info import facts

    install(site, "transformers", "4.0.0")
    (fact,) = (fact for fact in facts() if fact.name == "transformers")
    assert fact.value == "4.0.0"
    assert "older than csae needs" in fact.note


ADVICE = "run `pip uninstall csae`, then `pip install --force-reinstall --no-deps contextual-sae`"


def test_another_project_beside_it(site: Path) -> None:
    install(site, "csae", "0.2.0", summary=FOREIGN)
    line = versions.other_package()
    assert line.startswith("csae 0.2.0 (another project's package) shares the folder csae with contextual-sae: ")
    assert line.endswith(ADVICE)
    with pytest.warns(versions.UntestedVersion, match="another project's package"):
        versions.check_name()


def test_its_own_former_name(site: Path) -> None:
    from csae.info import facts

    install(site, "csae", "0.1.0", summary=FORMER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_name()
    (fact,) = (fact for fact in facts() if fact.name == "another csae")
    assert "this project's former name" in fact.note
    assert fact.note.endswith(ADVICE)


@pytest.mark.parametrize("program", [COMMAND, "import csae.ops"], ids=["command", "library"])
@pytest.mark.parametrize("still", [True, False], ids=["installed", "not any more"])
def test_another_project_in_its_place(site: Path, program: str, still: bool) -> None:
    (site / "csae").mkdir()
    for path in Path(csae.__file__).parent.iterdir():
        if path.name != "__init__.py":
            (site / "csae" / path.name).symlink_to(path)
    (site / "csae" / "__init__.py").write_text("def attest(): ...\n")
    if still:
        install(site, "csae", "0.2.0", summary=FOREIGN)
    done = run(site, program, "info")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    if still:
        assert "csae 0.2.0 (another project's package)" in last
        assert last.endswith(ADVICE)
    else:
        assert "csae/__init__.py is not this project's" in last
        assert last.endswith("run `pip install --force-reinstall --no-deps contextual-sae`")
    if program == COMMAND:
        assert done.stderr.count("\n") == 1
