"""A patch is applied and taken back, on a library made up for the test."""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest

import csae
from csae.errors import UserError
from csae.patches import LIBRARIES, Replacement


class Base:
    def inherited(self):
        return "theirs"


class Coder(Base):
    def encode(self):
        return "theirs"


def ours(self):
    return "ours"


@pytest.fixture
def library(monkeypatch):
    """A library of version 1.3.2, whose patch replaces a method, an inherited method and a module's function."""
    functions = SimpleNamespace(decode=lambda: "theirs")
    patch = ModuleType("csae.patches.sparsify")
    patch.PACKAGE, patch.TESTED = "a-package", "1.3"
    patch.replacements = lambda: [
        Replacement(Coder, "encode", ours),
        Replacement(Coder, "inherited", ours),
        Replacement(functions, "decode", lambda: "ours"),
    ]
    versions = {"a-package": "1.3.2"}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    monkeypatch.setattr(importlib.metadata, "version", version)
    coder = Coder()
    return SimpleNamespace(
        versions=versions, results=lambda: {coder.encode(), coder.inherited(), Base().inherited(), functions.decode()}
    )


def test_objects_that_exist_run_on_ours_until_undo(library):
    coder, own = Coder(), Coder.encode
    patch = csae.patch("sparsify")
    assert coder.encode() == coder.inherited() == Coder().encode() == "ours"
    assert Base().inherited() == "theirs"
    patch.undo()
    assert library.results() == {"theirs"}
    assert Coder.encode is own
    assert "inherited" not in vars(Coder)


def test_with_undoes_it_after_an_error_too(library):
    with pytest.raises(RuntimeError, match="in between"), csae.patch("sparsify"):
        raise RuntimeError("in between")
    assert library.results() == {"theirs"}


def test_a_second_patch_changes_nothing_and_undoes_nothing(library):
    with csae.patch("sparsify"):
        with csae.patch("sparsify"):
            assert Coder().encode() == "ours"
        assert Coder().encode() == "ours"
    assert library.results() == {"theirs"}


def test_undo_twice_leaves_a_later_patch_alone(library):
    first = csae.patch("sparsify")
    first.undo()
    with csae.patch("sparsify"):
        first.undo()
        assert Coder().encode() == "ours"
        with csae.patch("sparsify"):
            pass
        assert Coder().encode() == "ours"
    assert library.results() == {"theirs"}


def test_another_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"library: given 'SAELens'; needed one of 'sae_lens', 'sparsify'"):
        csae.patch("SAELens")


def test_a_missing_package_is_named_with_what_installs_it(library):
    library.versions.clear()
    with pytest.raises(UserError, match=r"a-package is not installed: pip install 'a-package==1\.3\.\*'"):
        csae.patch("sparsify")
    assert library.results() == {"theirs"}


@pytest.mark.parametrize("version", ["1.2.9", "1.30.0", "2.0.0", "1.4"])
def test_another_version_is_refused_before_anything_is_replaced(library, version):
    library.versions["a-package"] = version
    with pytest.raises(UserError, match=rf"version {version} is installed, and the patch was tested with 1\.3\.\*"):
        csae.patch("sparsify")
    assert library.results() == {"theirs"}


def test_a_version_without_a_last_number_is_the_first_of_its_kind(library):
    library.versions["a-package"] = "1.3"
    with csae.patch("sparsify"):
        assert Coder().encode() == "ours"


@pytest.mark.parametrize("library_name", LIBRARIES)
def test_each_patch_can_be_imported_without_its_library(library_name):
    module = importlib.import_module(f"csae.patches.{library_name}")
    assert module.PACKAGE
    assert module.TESTED
    assert callable(module.replacements)
