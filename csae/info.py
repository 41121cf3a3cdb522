"""What is here: versions, devices, and which kernels each op will run on, or why not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

import csae
from csae import versions
from csae.ops.backend import cpu, triton

PACKAGES = ("torch", "triton", "numpy", "safetensors", "huggingface-hub", "transformers", "datasets")

# What each op runs on where the native library is there: it knows float32; other dtypes go to PyTorch.
NATIVE_PART = {
    "topk_encode": "PyTorch's product, native selection",
    "sparse_decode": "native",
    "lookback_attention": "native",
}


class Fact(NamedTuple):
    """One line of `csae info`."""

    name: str
    value: str
    note: str = ""
    """why something is missing, and how to get it"""


def facts() -> list[Fact]:
    """All that `csae info` shows."""
    found = [
        Fact("csae", csae.__version__, versions.DISTRIBUTION),
        *(Fact("another csae", "installed", line) for line in [versions.other_package()] if line),
        Fact("python", platform.python_version(), platform.platform()),
        *(_package(name) for name in PACKAGES),
        Fact(
            "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()
        ),
    ]
    if torch.cuda.is_available():
        found += [
            Fact(f"cuda:{i}", torch.cuda.get_device_name(i), f"{torch.cuda.mem_get_info(i)[1] / 2**30:.0f} GiB")
            for i in range(torch.cuda.device_count())
        ]
    else:
        found.append(Fact("cuda", "no device", "" if torch.version.cuda else "this torch is built without CUDA"))
    found += [Fact(op, f"cuda: {_on_cuda()}; cpu: {_on_cpu(native)}") for op, native in NATIVE_PART.items()]
    if not triton.available():
        found.append(Fact("no Triton", triton.why_not() or ""))
    if cpu.available():
        found.append(Fact("native library", str(cpu.describe()["isa"]), str(cpu.describe()["library"])))
        by = {"amx": "AMX", "avx512_bf16": "AVX512-BF16"}.get(str(cpu.describe()["isa"]))
        units = "none" if by is None else f"by {by}: topk_encode's large products, settled in float32"
        found.append(Fact("bfloat16 products", units))
    else:
        found.append(Fact("no native library", cpu.why_not() or ""))
    return found


def _on_cuda() -> str:
    return "Triton" if triton.available() else "PyTorch"


def _on_cpu(native: str) -> str:
    return native if cpu.available() else "PyTorch"


def _package(name: str) -> Fact:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Fact(name, "not installed", f"pip install {name}")
    outside = versions.out_of_range(name)
    return Fact(name, found, outside[0] if outside else "")
