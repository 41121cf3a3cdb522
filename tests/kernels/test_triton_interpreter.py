"""The tests of the Triton kernels, in Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
QUICK = (
    "feature_rows",
    "fvu",
    "lookback_attention",
    "scaled_heads",
    "sparse_decode",
    "step",
    "threshold_encode",
    "topk_coarse",
    "topk_encode",
)
# Which tests of each are run, and slow: whole models take more than 20 CPU-seconds, and no op uses topk_threshold.
SLOW = {
    "lookback_attention": "slow",
    "models": "slow or not slow",
    "sparse_decode": "slow",
    "topk_encode": "slow",
    "topk_threshold": "slow or not slow",
}

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the CUDA device")
@pytest.mark.parametrize(
    ("name", "which"),
    [
        *(pytest.param(name, "not slow", id=name) for name in QUICK),
        *(pytest.param(name, which, id=f"{name}, {which}", marks=pytest.mark.slow) for name, which in SLOW.items()),
    ],
)
def test_kernels_in_the_interpreter(name: str, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rs", "-m", which]
    done = subprocess.run(
        [*command, str(HERE / f"test_triton_{name}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
