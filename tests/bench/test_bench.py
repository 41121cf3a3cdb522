"""The measurements of the benchmark. Memory is asserted; times are only reported."""

import json
import subprocess
import sys

import pytest

from csae.bench import demo_figure

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def run(*args):
    done = subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_figure_is_drawn_from_what_the_demo_left(tmp_path):
    names = ("topk", "topk-wide", "contextual")
    saes = [{"arch": name, "k": 4, "fvu": 0.2} for name in names]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text(json.dumps({"model": "tiny", "layer": 2, "saes": saes}))
    for name in names:
        (tmp_path / "demo" / "runs" / name).mkdir(parents=True)
        lines = [json.dumps({"tokens": 100 * step, "fvu": 1 / (1 + step)}) for step in range(9)]
        (tmp_path / "demo" / "runs" / name / "metrics.jsonl").write_text("\n".join(lines))
    demo_figure.draw(tmp_path / "demo", tmp_path / "figures" / "demo.svg")
    assert "<svg" in (tmp_path / "figures" / "demo.svg").read_text()


@LINUX_ONLY
@pytest.mark.slow
@pytest.mark.parametrize(("dead", "megabytes"), [(0, 128), (5000, 256)])
def test_a_training_step_stays_within_its_memory(dead, megabytes):
    """n=4096, d_in=576, d_sae=36864, k=32: beyond weights and the optimizer's state."""
    found = json.loads(run("csae.bench.memory", "--dead", str(dead)))
    assert 0 < found["beyond_mb"] <= megabytes
