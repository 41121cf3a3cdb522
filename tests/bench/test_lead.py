from __future__ import annotations

from pathlib import Path

import pytest
import torch
from given_windows import GivenWindows

from csae.bench.evidence import lead
from csae.bench.evidence.grid import Budget
from csae.contextual_sae import ContextualSAE


def test_leads() -> None:
    one = {"selection": "batch", "hook": "resid.out:11", "d_sae": 64, "tokens": 10, "distinct": 5, "seed": 0, "lr": 0.1}
    one |= lead.LOOK_BACK
    runs = [
        one | {"arch": "topk-wide", "k": 16, "l0": 10.0, "fvu": 0.4},
        one | {"arch": "topk-wide", "k": 24, "l0": 40.0, "fvu": 0.1},
        one | {"arch": "contextual", "k": 16, "l0": 8.0, "fvu": 0.2},
        one | {"arch": "contextual", "k": 16, "l0": 8.0, "fvu": 0.05, "tokens": 20},  # nothing to compare with
        one | {"arch": "contextual", "k": 16, "l0": 8.0, "fvu": 0.05, "d_memory": 8},  # another number of parameters
    ]
    (row,) = lead.leads(runs)
    assert row["lead"] == pytest.approx(20 / 8)
    assert not row["beyond"]
    assert row["per_token"] == [(10.0, 0.4), (40.0, 0.1)]


def test_a_budget_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = GivenWindows(torch.randn(24, 16, 12), torch.ones(24, 16, dtype=torch.bool), torch.zeros(24, 16).long())
    monkeypatch.setattr(lead, "HELD_OUT", 4)
    chosen = lead.cells(Budget(48, 8 * 16 * 4, 8 * 16 * 2, 16), "resid.out:1", "topk", 2, 0)
    assert [(cell.arch, cell.k) for cell in chosen] == [
        ("contextual-past", 2),
        ("topk-wide", 2),
        ("topk-wide", 3),
        ("contextual", 2),
        ("topk-wide", 4),
    ]
    found = [lead.measure(tmp_path, cell, source) for cell in chosen]
    parameters = {entry["arch"]: entry["n_params"] for entry in found}
    assert parameters["contextual"] <= parameters["topk-wide"] <= parameters["contextual"] + 2 * 12 + 1
    assert [entry["k"] for entry in found] == [2, 2, 3, 2, 4]
    monkeypatch.setattr(lead, "train", None)
    assert lead.measure(tmp_path, chosen[0], source) == found[0]
    assert {row["arch"] for row in lead.leads(found)} == {"contextual", "contextual-past"}


def test_a_smaller_look_back_has_a_narrower_opponent() -> None:
    small = lead.cells(Budget(48, 512, 256, 16), "resid.out:1", "topk", 2, 0, n_heads=2, d_value=3, d_memory=4)
    whole = lead.cells(Budget(48, 512, 256, 16), "resid.out:1", "topk", 2, 0)
    assert len({cell.name for cell in small + whole}) == 10
    past, wide = (lead.make(cell, 12) for cell in small[:2])
    assert (past.n_heads, past.d_value, past.d_memory) == (2, 3, 4)
    assert past.n_params <= wide.n_params <= past.n_params + 2 * 12 + 1
    assert wide.d_sae < lead.make(whole[1], 12).d_sae


def test_the_sizes_of_a_look_back_are_those_of_the_sae() -> None:
    sae = ContextualSAE(12, 48, 2)
    assert {name: getattr(sae, name) for name in lead.LOOK_BACK} == lead.LOOK_BACK
