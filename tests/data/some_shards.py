"""Folders of shards, made for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from csae.data.shard_writer import write_shards


def some_tensors(n_windows: int, T: int = 5, d_in: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "activations": torch.randn(n_windows, T, d_in, generator=generator),
        "mask": torch.rand(n_windows, T, generator=generator) > 0.3,
        "documents": torch.randint(9, (n_windows, T), dtype=torch.int32, generator=generator),
        "tokens": torch.randint(9, (n_windows, T), dtype=torch.int32, generator=generator),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], windows_per_shard: int = 4, about=None) -> None:
    def read(windows: range) -> dict[str, torch.Tensor]:
        return {name: tensor[windows.start : windows.stop] for name, tensor in tensors.items()}

    write_shards(folder, read, len(tensors["activations"]), windows_per_shard, about or {})
