"""`csae bench`, as installed, on a case that takes no time."""

import json

import pytest

from csae import cli


@pytest.fixture
def csae(monkeypatch, capsys, tmp_path):
    """Runs the program in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["csae", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def quick(monkeypatch):
    """No peers, nothing compiled, no other process, no ceilings to measure."""
    harness = pytest.importorskip("csae.bench.harness")
    case = harness.CASES["sparse_decode forward"]
    tiny = type(harness.SHAPES["small"])("tiny", 32, 16, 64, 4, T=16, heads=2, d_head=16, d_value=16)
    monkeypatch.setattr(harness, "CASES", {case.name: case})
    monkeypatch.setattr(harness, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(harness, "ceilings", lambda *_: harness.Ceilings(1e10, 1e9))
    monkeypatch.setattr(harness, "_peaks", lambda case, data, names: {})


def test_bench_prints_a_table_and_writes_results_and_a_plot(csae, quick, tmp_path):
    code, out, err = csae("bench", "--shape", "tiny", "--rounds", 2, "--device", "cpu")
    assert code == 0, err
    assert "sparse_decode forward, tiny" in out
    assert "written: bench.json, bench.svg" in out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["rounds"] == 2
    assert {result["impl"] for result in report["results"]} == {"csae", "PyTorch dense", "PyTorch sparse"}
    assert "<svg" in (tmp_path / "bench.svg").read_text()
    code, out, _ = csae("bench", "compare", "bench.json", "bench.json")
    assert code == 0
    assert out.count("1.00  same") == 3


def test_growth_is_written_beside_its_plot(csae, monkeypatch, tmp_path):
    growth = pytest.importorskip("csae.bench.growth")
    small = {"d_sae": (64,), "k": (2, 4), "n": 16, "d_in": 8, "say": str}
    whole = growth.run
    monkeypatch.setattr(growth, "run", lambda **given: whole(**small, **given))
    code, out, err = csae("bench", "--growth", "--rounds", 1, "--device", "cpu", "-o", "figures/growth.json")
    assert code == 0, err
    assert "beyond it" in out
    assert (tmp_path / "figures" / "growth.json").is_file()
    assert (tmp_path / "figures" / "growth.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "D"], "shape: given 'D'"),
        (["--case", "nothing"], "case: given 'nothing'"),
        (["compare", "a.json", "b.json"], "a.json: can't be read"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(csae, arguments, said):
    code, out, err = csae("bench", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith(f"csae: {said}")
    assert err.count("\n") == 1
