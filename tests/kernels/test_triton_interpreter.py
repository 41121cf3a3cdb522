"""The tests of the Triton kernels, in Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NAMES = ("feature_rows", "lookback_attention", "models", "sparse_decode", "topk_encode", "topk_threshold")
SLOW = ("lookback_attention", "sparse_decode", "topk_encode", "topk_threshold")  # these have slow tests too

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the CUDA device")
@pytest.mark.parametrize(
    ("which", "name"),
    [*(("not slow", name) for name in NAMES), *(pytest.param("slow", name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_kernels_in_the_interpreter(which: str, name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rs", "-m", which]
    done = subprocess.run(
        [*command, str(HERE / f"test_triton_{name}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
