"""The bytes of a step on several processes, in small, and what they mean for many GPUs."""

from __future__ import annotations

import pytest

from csae.bench import scale, scale_projection
from csae.bench.scale_steps import IMPLEMENTATIONS, Sizes

R = 2
DDP = "DDP, the same TopK SAE"
SMALL = Sizes(n=64, T=8, d_in=16, d_sae=0, k=4)
LARGE = Sizes(n=32, T=4, d_in=32, d_sae=64, k=4)
FEW, MANY = 128, 8192


@pytest.fixture(scope="module")
def report():
    return scale.run((R,), (FEW, MANY), 1, SMALL, LARGE, say=lambda line: None)


def result(report, impl, d_sae):
    (found,) = (
        r for r in report["results"] if (r["impl"], r["sizes"]) == (impl, SMALL._replace(d_sae=d_sae)._asdict())
    )
    return found


def test_every_implementation_is_measured_or_says_why_not(report):
    for impl in IMPLEMENTATIONS:
        for d_sae in (FEW, MANY):
            found = result(report, impl, d_sae)
            assert ("median_ms" in found) != ("skipped" in found)
    assert scale.table(report).count("MB a rank") == sum("skipped" not in r for r in report["results"])


def test_data_parallelism_sends_all_gradients(report):
    for d_sae in (FEW, MANY):
        found = result(report, DDP, d_sae)
        parameters = d_sae * (2 * SMALL.d_in + 1) + SMALL.d_in
        assert found["bytes"] == 2 * 4 * parameters * (R - 1) / R
        assert found["held"] == {"weights": 4 * parameters, "moments": 8 * parameters + 16, "gradients": 8 * parameters}


def test_what_is_counted_leaves_the_sockets(report):
    for found in report["results"]:
        if "skipped" not in found and found["socket_bytes"] is not None:
            assert found["bytes"] <= found["socket_bytes"] <= 1.02 * found["bytes"] + 5000


def counted(n, d_sae, sent, held, processes=4, d_in=8):
    sizes = {"n": n, "T": 1, "d_in": d_in, "d_sae": d_sae, "k": 2, "precision": "float32"}
    each = [{"kind": kind, "purpose": purpose, "calls": 1, "bytes": n} for (kind, purpose), n in sent.items()]
    return {"impl": "csae TopK", "processes": processes, "sizes": sizes, "sent": each, "held": held}


def test_laws_are_found_again_from_counts():
    def at(n, d_sae):
        share = 3 / 4
        sent = {
            ("all-gather", "x"): share * 2 * 8 * n,
            ("all-reduce", "tables"): share * (100 * d_sae + 7),
            ("all-gather", "sums"): 3 * 4,
        }
        held = {"weights": d_sae / 4 * 68, "moments": d_sae / 4 * 136, "gradients": 5}
        return counted(n, d_sae, sent, held)

    report = {"results": [at(10, 64), at(20, 64), at(10, 128), counted(10, 64, {}, {}, d_in=2)]}
    laws = {law.purpose: law for law in scale_projection.laws(report, "csae TopK", 4)}
    assert laws["x"][2:] == (16, 0, 0)
    assert laws["tables"][2:] == (0, 100, 7)
    assert laws["sums"].bytes(5, 6, 8) == 7 * 4
    assert scale_projection.kept(report, "csae TopK", 4) == (68, 136, 0)
    rows = list(scale_projection.project(report, "csae TopK", 4))
    first = next(row for row in rows if (row["gpus"], row["d_sae"]) == (16, 2**20))
    n = scale_projection.N
    assert first["weights"] == 68 * 2**16
    assert first["sent"] == pytest.approx(15 / 16 * (16 * n + 100 * 2**20 + 7) + 15 * 4)
    assert first["sent_s"] == first["sent"] / scale_projection.INFINIBAND
    with pytest.raises(LookupError, match="csae TopK on 2 processes"):
        scale_projection.laws(report, "csae TopK", 2)


def test_laws_of_data_parallelism_are_those_of_its_gradients(report):
    (law,) = scale_projection.laws(report, DDP, R)
    assert (law.kind, law.by_token) == ("all-reduce", 0)
    assert law.by_feature == 2 * 4 * (2 * LARGE.d_in + 1)
    assert law.fixed == 2 * 4 * LARGE.d_in
