"""Table, JSON, plot, and two runs compared."""

import copy

import pytest

from csae.bench import report
from csae.errors import UserError


def result(impl, median, **more):
    shape = {"name": "tiny", "n": 8, "d_in": 4, "d_sae": 16, "k": 2, "T": 4, "heads": 1, "d_head": 4, "d_value": 4}
    given = {"case": "topk_encode forward", "shape": shape, "dtype": "float32", "impl": impl}
    times = {"median_ms": median, "spread_ms": 0.1, "peak_bytes": 3 << 20, "floor_ms": 2.0, "share_of_floor": 0.5}
    return given | (more or times | {"ratio_to_ours": median / 4})


@pytest.fixture
def found():
    return {
        "device": "a device",
        "threads": 2,
        "versions": {"torch": "2.13.0", "triton": "3.6.0"},
        "ceilings": {"dtype": "float32", "operations_per_s": 1e12, "bytes_per_s": 1e10},
        "rounds": 3,
        "results": [result("csae", 4.0), result("mm", 3.0), result("peer", 0, skipped="peer is not installed")],
    }


def test_table_shows_times_and_reasons(found):
    printed = report.table(found)
    assert "a device, 2 threads, torch 2.13.0: 1 TFLOP/s in float32, 10 GB/s" in printed
    assert "topk_encode forward, tiny (n=8, d_in=4, d_sae=16, k=2), float32" in printed
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("mm")]
    assert line.split() == ["mm", "3", "ms", "0.1", "ms", "0.75", "50%", "3", "MiB"]
    assert "not timed: peer is not installed" in printed


def test_json_comes_back_as_it_was(found, tmp_path):
    report.write(found, tmp_path / "new" / "bench.json")
    assert report.read(tmp_path / "new" / "bench.json") == found


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: can't be read"):
        report.read(tmp_path / "absent.json")
    for text, said in (("{", "not JSON"), ("[1]", "lacks device"), ('{"device": "a"}', "lacks versions")):
        (tmp_path / "file.json").write_text(text)
        with pytest.raises(UserError, match=said):
            report.read(tmp_path / "file.json")


def test_compare_says_what_moved(found):
    after = copy.deepcopy(found)
    after["results"][0]["median_ms"] = 2.0
    after["results"][1]["median_ms"] = 3.01
    after["results"][2] = result("peer", 9.0)
    after["versions"]["torch"] = "2.14.0"
    printed = report.compare(found, after)
    lines = [line.split() for line in printed.splitlines()]
    assert ["0.50", "faster"] in [line[:2] for line in lines]
    assert ["1.00", "same"] in [line[:2] for line in lines]
    assert "versions differ: torch: 2.13.0 -> 2.14.0" in printed
    assert "only after: topk_encode forward, tiny, float32: peer" in printed
    backwards = report.compare(after, found)
    assert "2.00  SLOWER" in backwards
    assert "only before: topk_encode forward, tiny, float32: peer" in backwards


def test_compare_does_not_call_noise_a_change(found):
    after = copy.deepcopy(found)
    after["results"][0] |= {"median_ms": 5.0, "spread_ms": 1.5}
    assert "1.25  same" in report.compare(found, after)


def test_compare_says_that_threads_differ(found):
    assert "threads differ: 2 -> 4" in report.compare(found, copy.deepcopy(found) | {"threads": 4})


def test_compare_refuses_another_device_and_other_shapes(found):
    with pytest.raises(UserError, match="on a device and on another"):
        report.compare(found, copy.deepcopy(found) | {"device": "another"})
    other = copy.deepcopy(found)
    for one in other["results"]:
        one["shape"]["n"] = 9
    with pytest.raises(UserError, match=r"tiny \(n=8.*tiny \(n=9"):
        report.compare(found, other)


def test_plot(found, tmp_path):
    report.draw(found, tmp_path / "plots" / "bench.svg")
    drawn = (tmp_path / "plots" / "bench.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(UserError, match="nothing was timed"):
        report.draw(found | {"results": found["results"][2:]}, tmp_path / "none.svg")
