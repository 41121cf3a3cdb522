"""Which dtype a language model runs in."""

from __future__ import annotations

from pathlib import Path

import torch

LM_DTYPES = ("auto", "float32", "bfloat16", "float16")
# What Linux calls the units that multiply bfloat16: of x86 and of Arm.
CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def resolved_dtype(name: str, device: torch.device) -> str:
    """The name of a dtype; "auto" is bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for bfloat16: CUDA since 8.0; a CPU with AMX, AVX512-BF16 or Arm's, as Linux says."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(CPU_FLAGS & cpu_flags())


def cpu_flags() -> set[str]:
    """What Linux says of the CPU's instructions; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(found.partition(":")[2].split())
