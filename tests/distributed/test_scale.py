"""The bytes of a step on several processes, in small, and what they mean for many GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run

from csae import TopKSAE
from csae.bench import scale, scale_page, scale_projection
from csae.bench.scale_count import Collectives, purpose
from csae.bench.scale_steps import IMPLEMENTATIONS, SPARSIFY, Sizes
from csae.distributed import sharded

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "bench" / "results" / "scale" / "cpu.json"
FEW, MANY = 128, 8192
PROCESSES = (2, 3)
OURS, DDP = scale_page.OURS, scale_page.DDP
SMALL = Sizes(n=96, T=8, d_in=16, d_sae=0, k=4)
LARGE = Sizes(n=48, T=4, d_in=32, d_sae=64, k=4, precision="bfloat16")


@pytest.fixture(scope="module")
def report():
    def start(R, jobs, say):
        return run(R, measured, jobs)[0]

    return scale.run(PROCESSES, (FEW, MANY), 1, SMALL, LARGE, say=lambda line: None, start=start)


def measured(ranks, jobs):
    return [scale.measure(job, ranks) for job in jobs]


def result(report, impl, R, d_sae, sizes=SMALL):
    wanted = impl, R, sizes._replace(d_sae=d_sae)._asdict()
    (found,) = (r for r in report["results"] if (r["impl"], r["processes"], r["sizes"]) == wanted)
    return found


def by_purpose(found):
    sent: dict[str, float] = {}
    for one in found["sent"]:
        sent[one["purpose"]] = sent.get(one["purpose"], 0) + one["bytes"]
    return sent


def test_every_implementation_is_measured_or_says_why_not(report):
    for impl in IMPLEMENTATIONS:
        for R in PROCESSES:
            found = result(report, impl, R, FEW)
            assert ("median_ms" in found) != (impl == SPARSIFY and "skipped" in found)
    assert scale.table(report).count("MB a rank") == sum("skipped" not in r for r in report["results"])


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("R", PROCESSES)
def test_what_we_send_does_not_grow_with_d_sae(report, impl, R):
    few, many = result(report, impl, R, FEW), result(report, impl, R, MANY)
    assert few["bytes"] > 0
    assert by_purpose(few).keys() == by_purpose(many).keys()
    assert many["bytes"] == pytest.approx(few["bytes"], rel=0.05)
    assert many["socket_bytes"] is None or many["socket_bytes"] == pytest.approx(few["socket_bytes"], rel=0.05)


@pytest.mark.parametrize("R", PROCESSES)
def test_what_we_send_is_what_the_design_says(report, R):
    for sizes in (SMALL._replace(d_sae=MANY), LARGE):
        found = by_purpose(result(report, OURS[0], R, sizes.d_sae, sizes))
        formula = scale_projection.formula(sizes._asdict(), R)
        for what, expected in formula.items():
            # A value in bfloat16 has 2 bytes, where the design has 4.
            assert found[what] <= expected, what
            assert sizes.precision == "bfloat16" or found[what] == expected, what
        rest = set(found) - set(formula)
        assert found["features that fired"] == pytest.approx(sizes.n * sizes.k * 4 * (R - 1) / R, abs=8 * R)
        assert rest - {"features that fired", "sums of the loss", "gradients of replicated parameters"} <= {
            "which features are dead"
        }


@pytest.mark.parametrize("R", PROCESSES)
def test_data_parallelism_sends_all_gradients(report, R):
    for d_sae in (FEW, MANY):
        found = result(report, DDP, R, d_sae)
        parameters = d_sae * (2 * SMALL.d_in + 1) + SMALL.d_in
        assert found["bytes"] == pytest.approx(2 * 4 * parameters * (R - 1) / R)
        assert found["held"] == {"weights": 4 * parameters, "moments": 8 * parameters + 16, "gradients": 8 * parameters}


def test_a_rank_holds_its_share_of_the_tables(report):
    for R in PROCESSES:
        whole, own = (result(report, impl, R, MANY)["held"] for impl in (DDP, OURS[0]))
        assert own["weights"] == pytest.approx(whole["weights"] / R, rel=0.01)
        assert own["moments"] == pytest.approx(whole["moments"] / R, rel=0.01)
        assert own["gradients"] == 0


def test_all_train_on_the_same_batch(report):
    for R in PROCESSES:
        ours, ddp = (result(report, impl, R, FEW)["fvu"] for impl in (OURS[0], DDP))
        assert ours == pytest.approx(result(report, OURS[0], PROCESSES[0], FEW)["fvu"], rel=1e-5)
        assert ddp == pytest.approx(ours, rel=0.05)  # DDP averages the FVU of each rank's own tokens


def test_what_is_counted_leaves_the_sockets(report):
    for found in report["results"]:
        if "skipped" not in found and found["socket_bytes"] is not None:
            calls = sum(one["calls"] for one in found["sent"])
            assert found["bytes"] <= found["socket_bytes"] <= 1.02 * found["bytes"] + 500 * (calls + 2)


def with_dead(ranks, d_in, k, k_aux):
    """Bytes that a rank sends for AuxK, for each token, times ranks / (ranks - 1)."""
    n, sent = 32, []
    sae = sharded(lambda: TopKSAE(d_in, 96, k, k_aux), ranks)
    x = torch.randn(2, n // ranks.size // 2, d_in)
    for dead in (0, 30):
        sae.tokens_since_fired[:dead] = sae.dead_after
        found = sae.dead_features()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sae.gradients(x, dead=found)
            with Collectives(purpose) as collectives:
                sae.gradients(x, dead=found)
        sent.append(sum(one.bytes for one in collectives.sent))
    return (sent[1] - sent[0]) / n * ranks.size / (ranks.size - 1)


def test_auxk_sends_a_second_code_and_its_sums():
    d_in, k, k_aux = 40, 4, 20
    more = run(2, with_dead, d_in, k, k_aux)
    # Candidates, codes, sums and their gradients; and the loss's two numbers of each rank.
    for found in more:
        assert found == pytest.approx(k_aux * (8 + 6) + 2 * d_in * 2, abs=2)


def counted(n, d_sae, R, sent, held, peak, d_in=8):
    sizes = {"n": n, "T": 1, "d_in": d_in, "d_sae": d_sae, "k": 2, "precision": "float32"}
    each = [{"kind": kind, "purpose": purpose, "calls": 1, "bytes": n} for (kind, purpose), n in sent.items()]
    return {"impl": "csae TopK", "processes": R, "sizes": sizes, "sent": each, "held": held, "peak": peak}


def test_laws_are_found_again_from_counts():
    def at(n, d_sae, R):
        share = (R - 1) / R
        sent = {
            ("all-gather", "x"): share * 2 * 8 * n,
            ("all-reduce", "tables"): share * (100 * d_sae + 7),
            ("all-gather", "sums"): (R - 1) * 4,
        }
        held = {"weights": d_sae / R * 68, "moments": d_sae / R * 136, "gradients": 5}
        return counted(n, d_sae, R, sent, held, 1000 + 5 * n + 16 * n / R)

    sizes = [(n, d_sae, R) for R in (2, 4) for n, d_sae in ((10, 64), (20, 64), (10, 128))]
    report = {"results": [at(*of) for of in sizes] + [counted(10, 64, 4, {}, {}, None, d_in=2)]}
    for R in (2, 4):
        laws = {law.purpose: law for law in scale_projection.laws(report, "csae TopK", R)}
        assert laws["x"][2:] == (16, 0, 0)
        assert laws["tables"][2:] == (0, 100, 7)
        assert laws["sums"].bytes(5, 6, 8) == 7 * 4
    assert scale_projection.kept(report, "csae TopK") == (68, 136, 0, 5 + 16 / 2, 0)
    rows = list(scale_projection.project(report, "csae TopK"))
    first = next(row for row in rows if (row["gpus"], row["d_sae"]) == (16, 2**20))
    n = scale_projection.N
    assert first["weights"] == 68 * 2**16
    assert first["activations"] == n * 13
    assert first["sent"] == pytest.approx(15 / 16 * (16 * n + 100 * 2**20 + 7) + 15 * 4)
    assert first["sent_s"] == first["sent"] / scale_projection.INFINIBAND
    assert first["product_s"] == 2 * n * 8 * 2**20 / 16 / scale_projection.PRODUCT
    assert scale_projection.break_even(report, "csae TopK", 1e9) == 16 / 1e9 / (2 * 8 / scale_projection.PRODUCT)
    with pytest.raises(LookupError, match="csae TopK on 3 processes"):
        scale_projection.laws(report, "csae TopK", 3)


def test_laws_agree_on_the_number_of_processes(report):
    for impl in (*OURS, DDP):
        few, many = (scale_projection.laws(report, impl, R) for R in PROCESSES)
        for one, other in zip(sorted(few), sorted(many), strict=True):
            assert one[:2] == other[:2]
            assert one.by_token == pytest.approx(other.by_token, abs=1e-6)
            assert one.by_feature == pytest.approx(other.by_feature, abs=1e-6)
            assert one.by_feature == 0 or impl == DDP


def test_the_page_has_a_place_for_each_table(report):
    text = PAGE.read_text()
    filled = scale_page.filled(text, report)
    assert filled.count("\n| ") > text.count("\n| ") or RESULTS.exists()
    assert f"{MANY:,}" in filled
    assert scale_page.filled(filled, report) == filled
    with pytest.raises(ValueError, match="needed one place"):
        scale_page.filled(text.replace("<!-- sent -->", ""), report)


@pytest.mark.skipif(not RESULTS.exists(), reason="nothing was measured")
def test_the_page_is_what_the_results_say():
    assert scale_page.filled(PAGE.read_text(), json.loads(RESULTS.read_text())) == PAGE.read_text()


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    out = tmp_path / "scale.json"
    command = [sys.executable, "-m", "csae.bench.scale", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert {r["processes"] for r in results} == {2}
    assert done.stdout.count("MB a rank") == sum("skipped" not in r for r in results)
