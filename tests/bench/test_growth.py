"""The growth plot's figures and their drawing, at sizes that take no time."""

from csae.bench import growth


def test_each_size_is_measured_and_drawn(tmp_path):
    said = []
    found = growth.run((64, 128), (2, 4), n=16, d_in=8, rounds=2, device="cpu", say=said.append)
    assert len(said) == 4
    sizes = {(r["d_sae"], r["k"], r["what"]) for r in found["results"]}
    assert sizes == {(F, k, what) for F in (64, 128) for k in (2, 4) for what in growth.TIMED}
    assert all(r["product_ms"] > 0 for r in found["results"])
    assert growth.table(found).count("beyond it") == 12
    growth.draw(found, tmp_path / "growth.svg")
    assert "<svg" in (tmp_path / "growth.svg").read_text()
