"""Which kernels an op runs on: Triton for CUDA tensors, else the portable ones (native inside, on a CPU)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from csae import versions
from csae.kernels import cpu, triton


def kernels(op: str, device: torch.device) -> ModuleType:
    """The module that implements `op` on `device`."""
    if device.type == "cuda" and triton.available():
        versions.check("triton")
        return import_module(f"csae.kernels.triton.{op}")
    if device.type == "cpu" and not cpu.available():
        cpu.warn_once()
    return import_module(f"csae.kernels.portable.{op}")
