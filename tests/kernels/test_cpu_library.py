"""How the native library is found and loaded, and what that does to the process."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from csae.kernels import cpu
from csae.kernels.cpu import library
from csae.kernels.cpu.topk_rows import topk_add, topk_start

needs_library = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_it_is_there_where_there_is_a_compiler() -> None:
    assert cpu.available(), f"{cpu.why_not()} (in a checkout: pip install -e .)"
    assert cpu.why_not() is None


@needs_library
def test_describe() -> None:
    torch.set_num_threads(3)
    described = cpu.describe()
    assert described["library"] == str(library.PATH)
    assert described["isa"] in library.ISAS
    assert described["threads"] == 3


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process() -> None:
    script = """
import re, torch
from csae.kernels import cpu
from csae.kernels.cpu.topk_rows import topk_add, topk_start
torch.set_num_threads(2)
x = torch.randn(512, 512) @ torch.randn(512, 4096)
topk_add(topk_start(512, 4096, 8), x, torch.zeros(4096), 0)
print(cpu.describe()["openmp"])
files = {line.split()[-1] for line in open("/proc/self/maps")}
print(sorted(file for file in files if re.search(r"/lib(g|i|)omp[^/]*$", file)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    used, files = run.stdout.splitlines()
    assert files == f"['{used}']"


def test_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "libcsae_cpu.so")
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    library.warn_once.cache_clear()
    assert not cpu.available()
    assert re.search(r"was not built.*install a C\+\+17 compiler.*pip install", str(cpu.why_not()))
    assert cpu.describe()["library"] is None
    with pytest.raises(RuntimeError, match="was not built"):
        topk_add(topk_start(3, 10, 1), torch.zeros(3, 10), torch.zeros(10), 0)
    with pytest.warns(RuntimeWarning, match="slower PyTorch path.*was not built"):
        cpu.warn_once()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.warn_once()
    library.warn_once.cache_clear()


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "libcsae_cpu.so").write_text("not a library")
    monkeypatch.setattr(library, "PATH", tmp_path / "libcsae_cpu.so")
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert "can't be loaded" in str(cpu.why_not())


@needs_library
def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert re.search(r"has ABI version \d+, this package needs \d+", str(cpu.why_not()))


@needs_library
def test_nothing_is_said_where_it_is_there() -> None:
    library.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.warn_once()


@needs_library
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_memory_that_was_freed_is_kept_for_the_next_step() -> None:
    """The third time that eight blocks of 5 MB are written, their pages are there."""
    script = """
import resource, torch
from csae.kernels import cpu
cpu.available()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    blocks = [torch.full((5 << 18,), 1.0) for _ in range(8)]
    del blocks
print(faults() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 5120  # of 10240 pages
