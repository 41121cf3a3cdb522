"""Importing the Triton kernels where there is no triton, and where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from csae.kernels import triton as kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    pytest.importorskip("triton")
    assert not kernels.available()
    assert kernels.why_not() == "no CUDA device"


def test_without_triton_it_imports_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not kernels.available()
    assert kernels.why_not() == "triton is not installed"


def test_importing_the_package_does_not_import_triton() -> None:
    check = "import sys; from csae.kernels import triton; triton.why_not(); sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_with_a_device_it_is_available() -> None:
    pytest.importorskip("triton")
    assert kernels.available()
    assert kernels.why_not() is None
