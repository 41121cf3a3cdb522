"""Every Triton kernel, in every form that it can be launched in, compiled for GPUs that needn't be here."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels don't compile")


def assert_no_problems(arch: int, *words: str) -> None:
    from csae.kernels.triton import offline

    chosen = [variant for variant in offline.variants() if all(word in str(variant) for word in words)]
    assert chosen
    wrong = {str(variant): offline.problems(offline.compile_for(variant, arch)) for variant in chosen}
    assert not {name: problems for name, problems in wrong.items() if problems}


@pytest.mark.parametrize("kernel", ["_pre_acts", "_gather_sum", "_feature_sum"])
def test_widths_in_units_of_16_bytes_on_hopper(kernel: str) -> None:
    assert_no_problems(90, f"{kernel}[", "bfloat16", "UNIT=8")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("module", ["topk_encode", "sparse_decode", "lookback_attention"])
def test_every_variant(module: str, arch: int) -> None:
    from importlib import import_module

    kernels = {variant.kernel.__name__ for variant in import_module(f"csae.kernels.triton.{module}").variants()}
    for kernel in sorted(kernels):
        assert_no_problems(arch, f"{kernel}[")


def test_every_kernel_is_listed() -> None:
    from csae.kernels.triton import lookback_attention, offline, sparse_decode, topk_encode

    launched = {variant.kernel.__name__ for variant in offline.variants()}
    for module in (lookback_attention, sparse_decode, topk_encode):
        kernels = {name for name, thing in vars(module).items() if hasattr(thing, "do_not_specialize")}
        entries = {name for name in kernels if vars(module)[name].do_not_specialize}
        assert entries
        assert entries <= launched


def test_problems_are_found() -> None:
    from csae.kernels.triton import offline

    gather = next(v for v in offline.variants() if str(v).startswith("_gather_sum[float16") and "UNIT=8" in str(v))
    product = next(v for v in offline.variants() if str(v).startswith("_pre_acts[float16"))
    bad = offline.Compiled(gather, 90, registers=255, spills=8, shared=300_000, ptx="", sass="LDG.E.U16")
    assert len(offline.problems(bad)) == 3
    assert "wgmma" in "".join(offline.problems(bad._replace(variant=product)))
    good = bad._replace(spills=0, shared=0, sass="LDG.E.128 LDG.E.128.CONSTANT " * 4)
    assert offline.problems(good) == []
