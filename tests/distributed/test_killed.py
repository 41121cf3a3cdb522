"""The benchmark that kills ranks, on a few windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csae.bench import killed
from csae.data.shard_writer import write_shards

pytestmark = pytest.mark.slow


def test_a_rank_is_killed_and_fewer_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killed, "SETTINGS", {"d-sae": 24, "k": 3})
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(104, 8, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    write_shards(
        tmp_path / "activations",
        lambda of: {"activations": acts[of.start : of.stop]},
        len(acts),
        52,
        {"keep_first": True},
    )
    found = killed.run(
        tmp_path / "activations",
        ranks=(2, 1),
        kills=1,
        tokens=8_000,
        out=tmp_path / "killed",
        options=["--checkpoint-every", "20", "--log-every", "1"],
    )
    (kill,) = found["killed"]["kills"]
    assert kill["ranks"] == 2
    assert 0 < kill["tokens"] < found["tokens"]
    assert len(found["one"]["fvu"]) == 2
    for name, fvu in found["one"]["fvu"].items():
        assert found["several"]["fvu"][name] == pytest.approx(fvu, rel=1e-3)
        assert found["killed"]["fvu"][name] == pytest.approx(fvu, rel=1e-3)
