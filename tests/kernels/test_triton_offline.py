"""Every Triton kernel, in every form that it can be launched in, compiled for GPUs that needn't be here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from csae.kernels.triton.offline import Compiled

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels don't compile")

RESOURCES = Path(__file__).parents[2] / "kernels" / "RESOURCES.md"  # of the checkout: no install has it
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.parametrize(
    ("kernel", "words", "target"),
    [
        ("_pre_acts", ["bfloat16", "UNIT=8"], "sm_90"),
        ("_gather_sum", ["bfloat16 int64", "UNIT=8"], "sm_90"),
        ("_feature_sum", ["float16", "UNIT=8"], "gfx942"),
        ("_forward", ["bfloat16", "SIZE=64"], "sm_100"),
    ],
)
def test_some_variants(kernel: str, words: list[str], target: str) -> None:
    from csae.kernels.triton import offline

    chosen = [v for v in offline.variants() if all(word in str(v) for word in [f"{kernel}[", *words])]
    assert chosen
    for variant in chosen:
        assert offline.problems(variant, target, offline.compile_for(variant, target)) == []


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, str], Compiled | str | None]:
    """Every variant on every target, by their names; those that compiled.json has are not compiled again."""
    from csae.kernels.triton import offline

    chosen = [(variant, target) for variant in offline.variants() for target in TARGETS]
    found = offline.compile_all(chosen, known=offline.kept())
    return {(str(variant), target): compiled for variant, target, compiled in found}


@pytest.mark.slow
def test_what_is_kept_is_what_compiles() -> None:
    from csae.kernels.triton import offline

    kept = offline.kept()
    if not kept:
        pytest.skip("compiled.json was made with another triton")
    chosen = [(variant, target) for variant in offline.variants() for target in TARGETS]
    known = [one for one in chosen if offline.key(*one) in kept]
    for variant, target, compiled in offline.compile_all(known[:: max(1, len(known) // 30)]):
        assert compiled == kept.get(str(offline.key(variant, target))), f"{variant} {target}"


def test_a_key_has_what_the_code_depends_on() -> None:
    from csae.kernels.triton import offline

    variants = offline.variants()
    keys = [offline.key(variant, "sm_90") for variant in variants]
    assert len(set(keys)) == len(variants)
    first = variants[0]
    others = [first._replace(num_warps=16), first._replace(num_stages=7), variants[-1]]
    assert offline.key(first, "sm_90") not in [offline.key(other, "sm_90") for other in others]
    assert offline.key(first, "sm_80") != offline.key(first, "sm_90")
    assert offline.key(first, "sm_90") == offline.key(first._replace(constants=dict(first.constants)), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(everything: dict[tuple[str, str], Compiled | str | None], target: str) -> None:
    from csae.kernels.triton import offline

    wrong = {str(v): offline.problems(v, target, everything[str(v), target]) for v in offline.variants()}
    assert not {name: problems for name, problems in wrong.items() if problems}


def test_each_form_has_a_name_of_its_own() -> None:
    from csae.kernels.triton import offline

    for of_module in offline._defaults().values():
        assert len({str(variant) for variant in of_module}) == len(of_module)


@pytest.mark.slow
def test_resources_are_what_is_written(everything: dict[tuple[str, str], Compiled | str | None]) -> None:
    import triton

    from csae.kernels.triton import offline

    written = RESOURCES.read_text()
    if f"triton {triton.__version__};" not in written:
        pytest.skip(f"RESOURCES.md was not made with triton {triton.__version__}")
    assert written == offline.report(everything), "run `python -m csae.kernels.triton.offline --write`"


def test_resources_list_every_variant() -> None:
    from csae.kernels.triton import offline

    nothing = offline.Compiled(0, 0, 0, {}, 0, 0, 0, 0)
    names = [(str(variant), target) for variant in offline.variants() for target in TARGETS]

    def without_numbers(text: str) -> list[str]:
        tables = text[text.index("\n## ") :]
        return [re.sub(r"(?<=.) \|.*", "", line) for line in tables.splitlines()]

    written, wanted = RESOURCES.read_text(), offline.report(dict.fromkeys(names, nothing))
    assert without_numbers(written) == without_numbers(wanted), "run `python -m csae.kernels.triton.offline --write`"


def test_every_kernel_is_listed() -> None:
    from importlib import import_module

    from csae.kernels.triton import offline

    assert {"topk_product", "topk_select", "sparse_decode", "lookback_attention"} <= set(offline.modules())
    for name, listed in offline.modules().items():
        module = import_module(f"csae.kernels.triton.{name}")
        kernels = {name: thing for name, thing in vars(module).items() if hasattr(thing, "do_not_specialize")}
        own = {name for name, kernel in kernels.items() if kernel.fn.__module__ == module.__name__}
        entries = {name for name in own if kernels[name].do_not_specialize}
        assert entries
        assert entries <= {variant.kernel.__name__ for variant in listed}


def test_problems_are_found() -> None:
    from csae.kernels.triton import offline

    named = {str(variant): variant for variant in offline.variants()}
    gather = next(v for name, v in named.items() if name.startswith("_gather_sum[float16") and "UNIT=8" in name)
    product = next(v for name, v in named.items() if name.startswith("_pre_acts[float16"))
    strict = next(v for name, v in named.items() if name.startswith("_pre_acts[") and "PRECISION=ieee" in name)
    bad = offline.Compiled(
        255, spills=8, shared=300_000, matrix={}, wide_loads=0, other_loads=9, shared_loads=0, local=2
    )
    assert len(offline.problems(gather, "sm_90", bad)) == 3
    assert len(offline.problems(gather, "sm_90", bad._replace(shared=200_000))) == 2
    assert len(offline.problems(gather, "sm_80", bad._replace(shared=200_000))) == 3
    good = bad._replace(spills=0, local=0, shared=0)
    assert offline.problems(product, "sm_90", good) == ["multiplies without wgmma"]
    assert offline.problems(product, "sm_90", good._replace(matrix={"wgmma": 4})) == []
    assert offline.problems(product, "sm_80", good) == []
    assert offline.problems(strict, "sm_90", good) == []
    # A warp of 64 threads reads two rows at once.
    assert offline.problems(gather, "sm_90", good._replace(wide_loads=4)) != []
    assert offline.problems(gather, "gfx942", good._replace(wide_loads=4)) == []


def test_counts_instructions() -> None:
    from csae.kernels.triton import offline

    code = ["LDG.E.128.CONSTANT R4, desc", "@P0 LDGSTS.E.BYPASS.LTC128B.128 [R2]", "@!PT LDG.E.U16 R1", "LDS.128 R8"]
    code += ["HGMMA.64x128x16.F32.BF16 R24", "STL [R1], R2", "@UP0 LDL R2", "LDSM.16.M88.4 R4", "LDGDEPBAR", "LDC R1"]
    sass = "\n".join(f"        /*{16 * place:04x}*/                   {text} ;" for place, text in enumerate(code))
    found = offline._of_sass(sass, "REG:40 STACK:16 SHARED:0 LOCAL:0", 1024)
    assert found == offline.Compiled(40, 16, 1024, {"wgmma": 1}, 2, 1, 2, 2)
    assembly = (
        "\tglobal_load_dwordx4 v[0:3]\n\tbuffer_load_ushort v1\n\tds_read_b128 v[1:4]\n\tv_mfma_f32_32x32x8_bf16\n"
    )
    metadata = "    .private_segment_fixed_size: 12\n    .vgpr_count:     90\n"
    assert offline._of_amdgcn(assembly + metadata, 64) == offline.Compiled(90, 12, 64, {"mfma": 1}, 1, 1, 1, 0)
