"""Every test of the ops runs twice: with the native library, and on plain PyTorch as where it is missing."""

import pytest

from csae.kernels import cpu


@pytest.fixture(autouse=True, scope="module", params=["native", "plain"])
def cpu_path(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(cpu, "available", lambda: False)
            patch.setattr(cpu, "warn_once", lambda: None)
        elif not cpu.available():
            pytest.skip(f"the native library is not here: {cpu.why_not()}")
        yield
