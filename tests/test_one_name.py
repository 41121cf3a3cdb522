"""A module has one name, in a checkout as it lies and installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def in_a_bare_checkout(code: str) -> subprocess.CompletedProcess:
    """Python in the checkout, without what was installed but with torch and numpy, which come from the same place."""
    # -S leaves out the .pth file of an editable install; the packages themselves are put back by hand.
    site = [path for path in sys.path if path.endswith("site-packages")]
    start = f"import sys; sys.path[:0] = ['.']; sys.path += {site!r}; "
    return subprocess.run([sys.executable, "-S", "-c", start + code], cwd=ROOT, capture_output=True, text=True)


def test_a_checkout_is_imported_as_it_lies() -> None:
    done = in_a_bare_checkout("import csae.ops, csae.bench.data, csae.kernels.cpu; print(csae.ops.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "csae" / "ops" / "__init__.py"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("bench.data", "ImportError: bench is imported as csae.bench"),
        ("kernels.cpu", "ModuleNotFoundError: No module named 'kernels.cpu'"),
    ],
)
def test_the_bare_name_is_refused(module: str, said: str) -> None:
    done = in_a_bare_checkout(f"import {module}")
    assert done.returncode == 1
    assert said in done.stderr
