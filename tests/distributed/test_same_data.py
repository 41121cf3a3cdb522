"""What tells that ranks have the same data, or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run
from torch import nn

from csae.data.shard_writer import write_shards
from csae.distributed.hosts import Hosts
from csae.distributed.same_data import check_same_data, of_folder, of_model
from csae.errors import UserError


def test_files_are_told_apart(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(30, 7, 60, generator=generator)
    write_shards(tmp_path / "one", lambda w: {"activations": acts[w.start : w.stop]}, 30, 8, {})
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    shutil.copytree(tmp_path / "one", tmp_path / "less")
    next((tmp_path / "less").glob("*.safetensors")).unlink()
    changed = shutil.copytree(tmp_path / "one", tmp_path / "changed")
    file = sorted(changed.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    one = of_folder(tmp_path / "one")
    assert of_folder(tmp_path / "same") == one
    assert len({one, of_folder(tmp_path / "less"), of_folder(tmp_path / "changed")}) == 3


def test_models_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 0))
    before = of_model(model)
    assert of_model(model) == before
    assert of_model(model.bfloat16()) != before
    model = model.float()
    before = of_model(model)
    with torch.no_grad():
        model[0].bias[-1] += 1e-6
    assert of_model(model) != before


def _said(ranks: Any, folder: Path) -> list[str]:
    said = []
    torch.manual_seed(ranks.rank)
    sources = [
        SimpleNamespace(folder=folder / str(ranks.rank)),
        SimpleNamespace(lm=SimpleNamespace(name="some/model", model=nn.Linear(3, 2))),
        SimpleNamespace(lm=SimpleNamespace(name="some/model", model=nn.Linear(3, 2, bias=False).requires_grad_(False))),
        object(),
    ]
    nn.init.ones_(sources[2].lm.model.weight)
    for source in sources:
        try:
            check_same_data(source, Hosts(ranks))
            said.append("done")
        except UserError as error:
            said.append(str(error))
    return said


def test_all_ranks_say_it(tmp_path: Path) -> None:
    for rank in range(2):
        write_shards(tmp_path / str(rank), lambda w, of=rank: {"activations": torch.ones(len(w), 3, 4) + of}, 5, 2, {})
    for found in run(2, _said, tmp_path):
        assert "rank 1 has other numbers there than rank 0" in found[0]
        assert found[1].startswith("some/model: rank 1 has other numbers there")
        assert found[2:] == ["done", "done"]


def test_one_process_compares_nothing() -> None:
    with pytest.raises(AttributeError):
        check_same_data(SimpleNamespace(lm=SimpleNamespace(model=nn.Linear(2, 2))), SimpleNamespace(alone=False))  # type: ignore[arg-type]
    check_same_data(SimpleNamespace(lm=None), Hosts(None))
