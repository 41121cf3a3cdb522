"""Checkpoints: any number of ranks reads what any number wrote, to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from sharding import here, new, rows_of, whole
from torch import Tensor

from csae.adam import Adam
from csae.checkpoint import load_sae, restore_checkpoint, save_checkpoint
from csae.sae import SAE

ARCHITECTURES = ("contextual", "topk")


def job(sae: SAE) -> dict[str, Any]:
    return {"sae": sae.config, "train": {"steps": 9}}


def filled(seed: int, arch: str, ranks: Any) -> tuple[SAE, Adam, dict[str, Tensor]]:
    """An SAE with made-up weights and moments, and what is saved beside, the same whole ones on any number of ranks."""
    sae = here(arch, ranks)
    optimizer = Adam(sae, moments=torch.bfloat16 if arch == "contextual" else torch.float32)
    tensors = dict(sae.state_dict())
    for parameter, state in optimizer.state.items():
        tensors |= {f"{optimizer.names[parameter]}.{key}": of for key, of in state.items()}
    for name, tensor in tensors.items():
        tensor.copy_(rows_of(sae, name, whole(seed, name, sae, tensor)))
    dead = torch.tensor([0, 3, 4, 8])
    if sae.shard is not None:
        dead = dead[(dead >= sae.shard.rows.start) & (dead < sae.shard.rows.stop)] - sae.shard.rows.start
    return sae, optimizer, {"dead": dead, "figures": torch.ones(2, 4), "source/empty": torch.zeros(0, 3)}


def state(sae: SAE, optimizer: Adam, beside: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(sae.state_dict()) | {f"beside {name}": of for name, of in beside.items()}
    for parameter, of in optimizer.state.items():
        tensors |= {f"{optimizer.names[parameter]}.{key}": tensor for key, tensor in of.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _write(ranks: Any, folder: Path, seed: int = 1, step: int = 4) -> None:
    for arch in ARCHITECTURES:
        sae, optimizer, beside = filled(seed, arch, ranks)
        save_checkpoint(folder / arch, step, sae, optimizer, job(sae), beside).result()


def _read(ranks: Any, folders: list[Path]) -> bool:
    for folder in folders:
        for arch in ARCHITECTURES:
            sae, optimizer, _ = filled(2, arch, ranks)
            step, beside = restore_checkpoint(folder / arch / "checkpoint-4", sae, optimizer, job(sae))
            expected = state(*filled(1, arch, ranks))
            found = state(sae, optimizer, beside)
            assert step == 4
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert tensor.dtype == found[name].dtype, name
                assert torch.equal(tensor, found[name]), (folder, arch, name)
    return True


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of ranks, what they wrote."""
    folders = {size: tmp_path_factory.mktemp(f"by-{size}") for size in range(1, 5)}
    for size, folder in folders.items():
        run(size, _write, folder)
    return folders


@pytest.mark.parametrize("size", range(1, 5))
def test_any_number_of_ranks_reads_what_any_number_wrote(size: int, written: dict[int, Path]) -> None:
    assert all(run(size, _read, list(written.values())))


def test_replicas_write_once_and_read(written: dict[int, Path], tmp_path: Path) -> None:
    assert all(run(4, _write_and_read, tmp_path, written[3], data=2))
    by_two, by_four = (
        sum(file.stat().st_size for file in (folder / "topk" / "checkpoint-4").glob("*.distcp"))
        for folder in (written[2], tmp_path)
    )
    assert by_four < 1.3 * by_two  # but for the headers of two more files


def _write_and_read(ranks: Any, folder: Path, other: Path) -> bool:
    _write(ranks, folder)
    return _read(ranks, [folder, other])


@pytest.mark.parametrize("size", [1, 3])
def test_it_is_a_saved_sae_and_replaced_by_the_next(size: int, written: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(written[size], tmp_path / "run")
    for arch in ARCHITECTURES:
        folder = tmp_path / "run" / arch
        (folder / "run.json").write_text(json.dumps(job(new(arch))))
        expected = filled(1, arch, None)[0].state_dict()
        for source in (folder, folder / "checkpoint-4"):
            loaded = load_sae(source)
            assert loaded.config == new(arch).config
            assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    for by, step in ((2, 6), (1, 8)):
        run(by, _write, tmp_path / "run", 3, step)
        for arch in ARCHITECTURES:
            folder = tmp_path / "run" / arch
            assert {entry.name for entry in folder.iterdir()} == {f"checkpoint-{step}", "run.json"}
            expected = filled(3, arch, None)[0].state_dict()
            assert torch.equal(load_sae(folder).W_dec, expected["W_dec"])


def _in_background(ranks: Any, folder: Path) -> bool:
    """As on a GPU: what is trained meanwhile is not in the checkpoint."""
    sae, optimizer, beside = filled(1, "topk", ranks)
    import csae.checkpoint

    csae.checkpoint.in_background = lambda sae: True
    writing = save_checkpoint(folder / "topk", 4, sae, optimizer, job(sae), beside)
    for tensor in state(sae, optimizer, beside).values():
        tensor.zero_()
    with torch.no_grad():
        for tensor in (*sae.state_dict().values(), *optimizer.state[sae.W_dec].values()):
            tensor.zero_()
    torch.distributed.barrier(ranks.world)  # training goes on in its own groups
    writing.result()
    return True


def test_written_in_the_background(tmp_path: Path) -> None:
    assert all(run(2, _in_background, tmp_path))
    expected = filled(1, "topk", None)
    sae, optimizer, _ = filled(2, "topk", None)
    _, beside = restore_checkpoint(tmp_path / "topk" / "checkpoint-4", sae, optimizer, job(sae))
    found = state(sae, optimizer, beside)
    assert all(torch.equal(tensor, found[name]) for name, tensor in state(*expected).items())
