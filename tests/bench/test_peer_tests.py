"""The comparison of another library's tests without our patch and with it, on small tests written here."""

import importlib.metadata

import pytest

from csae.bench import peer_tests
from csae.bench.peer_tests import Result
from csae.errors import UserError

MADE_UP = """
import pytest, helper

def test_passes(): assert helper.two == 2
@pytest.mark.skipif(True, reason="no such machine")
def test_skipped(): pass
@pytest.mark.xfail
def test_expected(): assert False
def test_network(): raise OSError("We couldn't connect to 'https://huggingface.co'")
@pytest.mark.parametrize("n", [1, 2])
def test_version(n): assert n == 1
"""


@pytest.fixture
def checkout(tmp_path):
    """A repository whose package must not be imported: the installed one is what is tested."""
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "tests" / "saes").mkdir(parents=True)
    (tmp_path / "tests" / "saes" / "helper.py").write_text(
        "import importlib.util\ntwo = 2\nspec = importlib.util.find_spec('sae_lens')\n"
        "assert spec is None or 'site-packages' in spec.origin"
    )
    (tmp_path / "tests" / "saes" / "test_topk_sae.py").write_text(MADE_UP)
    (tmp_path / "tests" / "saes" / "test_sae.py").write_text("import no_such_module")
    return tmp_path


def test_results_are_read_from_a_run_of_their_own(checkout):
    results = peer_tests.run_tests("sae_lens", checkout, patched=False)
    short = {name.rpartition("::")[2]: result for name, result in results.items()}
    assert short["test_passes"] == Result("passed", "")
    assert short["test_skipped"] == Result("skipped", "no such machine")
    assert short["test_expected"] == Result("skipped", "no reason given")
    assert short["test_network"].outcome == "failed"
    assert short["test_network"].reason.startswith("needs the network (OSError: We couldn't connect")
    assert short["test_version[1]"] == Result("passed", "")
    assert short["test_version[2]"].outcome == "failed"
    assert "assert 2 == 1" in short["test_version[2]"].reason
    assert sum(result.outcome == "failed" for result in results.values()) == 3  # with the module that can't be imported


def test_what_the_patch_breaks_is_named():
    without = {
        "kept": Result("passed", ""),
        "broken": Result("passed", ""),
        "gone": Result("passed", ""),
        "now skipped": Result("passed", ""),
        "network": Result("failed", "needs the network"),
        "skip": Result("skipped", "no CUDA"),
        "skip, then wrong": Result("skipped", "no CUDA"),
    }
    patched = without | {"broken": Result("failed", "1 != 2"), "now skipped": Result("skipped", "why")}
    patched["skip, then wrong"] = Result("failed", "2 != 3")
    del patched["gone"]
    text, failures = peer_tests.table(without, patched)
    assert failures == ["broken", "gone", "now skipped", "skip, then wrong"]
    assert "broken: failed: 1 != 2" in text
    assert "network: needs the network" in text
    assert "skip: no CUDA" in text
    assert "1 of 4 tests" in text
    assert [line.split()[-4:] for line in text.splitlines()[1:3]] == [["4", "2", "1", "0"], ["1", "1", "1", "4"]]


def test_the_exit_code(monkeypatch, tmp_path, capsys):
    runs = {False: {"a": Result("passed", "")}, True: {"a": Result("passed", "")}}
    monkeypatch.setattr(peer_tests, "run_tests", lambda library, checkout, patched: runs[patched])
    assert peer_tests.main(["sae_lens", str(tmp_path)]) == 0
    runs[True] = {"a": Result("failed", "wrong")}
    assert peer_tests.main(["sae_lens", str(tmp_path)]) == 1
    runs[True] = runs[False] = {"a": Result("failed", "needs CUDA")}
    assert peer_tests.main(["sae_lens", str(tmp_path)]) == 1  # nothing was compared
    assert "needs CUDA" in capsys.readouterr().out


def test_a_folder_without_tests_and_a_missing_library_are_refused(tmp_path, checkout):
    with pytest.raises(UserError, match=r"tests/saes/test_topk_sae\.py"):
        peer_tests.run_tests("sae_lens", tmp_path / "none", patched=False)
    try:
        importlib.metadata.version("sae-lens")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(UserError, match="sae-lens is not installed"):
            peer_tests.run_tests("sae_lens", checkout, patched=True)
