from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from csae.bench import rounding
from csae.checkpoint import load_sae


def test_a_training_again_with_last_bits_changed(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    save_file({"activations": torch.randn(60, 8, 12)}, tmp_path / "acts.safetensors")
    monkeypatch.setattr(rounding, "SETTINGS", {"d-sae": 24, "k": 2, "lr": 1e-30, "dead-after": 1000})
    out = tmp_path / "out"
    rounding.main([str(tmp_path), "--times", "1", "--tokens", "64", "--out", str(out)])
    found = json.loads((out / "rounding.json").read_text())
    assert {arch: len(fvus) for arch, fvus in found.items()} == {"topk": 2, "contextual": 2}
    for arch in found:
        plain, changed = (load_sae(out / f"{arch}-{number}").W_enc for number in range(2))
        next_up, next_down = (torch.nextafter(plain, torch.tensor(end)) for end in (torch.inf, -torch.inf))
        assert ((changed == next_up) | (changed == next_down)).all()  # nothing is learned at such a rate
        assert 0.2 < (changed == next_up).float().mean() < 0.8
