"""What was compiled without a GPU is what a launch finds in triton's cache."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels don't compile")


def test_a_launch_looks_for_what_was_compiled_offline() -> None:
    """For every form: the key in triton's cache depends on attributes of arguments, not on the code alone."""
    from fake_driver import fake_gpu, launch, recorded
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from csae.kernels.triton import offline

    backend = make_backend(GPUTarget("cuda", 90, 32))
    with recorded() as found, fake_gpu():
        wrong = []
        for variant in offline.variants():
            launch(variant)
            source, options = offline.source_of(variant)
            launched, given = found[-1]
            same = source.hash() == launched.hash()
            if not same or backend.parse_options(options).hash() != backend.parse_options(given).hash():
                wrong.append(str(variant))
        assert len(found) == len(offline.variants())
    assert wrong == []


def test_the_sanitizer_reaches_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a faked H100: each kernel, TMA with many tiles a program, products in several ranges, and both gates."""
    from fake_driver import fake_gpu, recorded

    from csae.bench import sanitize
    from csae.kernels.triton import offline, topk_product
    from csae.kernels.triton.variant import Variant

    monkeypatch.setattr(topk_product, "_has_tma", lambda device: True)
    monkeypatch.setattr(topk_product, "_programs", lambda device: 132)
    reached: set[str] = set()
    tiles_of_a_program, starts = [], []
    real = Variant.launch

    def launch(self: Variant, grid: tuple[int, ...], *arguments: object) -> None:
        name = self.kernel.__name__
        gate = " gated" if self.constants.get("GATED") else ""
        reached.update([name, f"{name}{gate}", f"{name} in units of {self.constants.get('UNIT')}"])
        named = dict(zip(self.signature(), arguments, strict=False))
        if self.descriptors:
            tiles = -(-named["rows"] // self.constants["BLOCK_M"]) * -(-named["columns"] // self.constants["BLOCK_N"])
            tiles_of_a_program.append(tiles / named["programs"])
        if name == "_merge":
            starts.append(named["offset"])
        real(self, grid, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Variant, "launch", launch)
    with recorded(), fake_gpu():
        for _, run in sanitize.cases(torch.device("cpu"), (torch.float32, torch.bfloat16)):
            run()
    kernels = {variant.kernel.__name__ for variant in offline.variants()}
    assert kernels <= reached
    assert {"_pre_acts gated", "_merge gated", "_pre_acts in units of 8", "_append in units of 4"} <= reached
    assert max(tiles_of_a_program) > 10
    assert max(starts) > 0
