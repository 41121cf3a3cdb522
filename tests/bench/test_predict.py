"""Predicted times: the parts of the cost model, and that nothing became slower than what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels don't compile")

PREDICTED = Path(__file__).parents[2] / "kernels" / "PREDICTED.md"  # of the checkout: no install has it
SLOWER = 1.05  # than what is written: a prediction that is more than that fails
# Ops that are predicted anew in the fast test: a selection's sorting and bisection, a gather, sums, attention.
SOME = ("encode_and_keep", "gather_sum", "adam_rows", "look-back")


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    from csae.bench.predict import machine
    from csae.bench.predict.written import predictions

    return predictions()["devices"][machine.DEVICE]


def test_the_table_is_what_is_written() -> None:
    from csae.bench.predict.table import markdown
    from csae.bench.predict.written import predictions

    assert PREDICTED.read_text() == markdown(predictions()), "run `python -m csae.bench.predict --write`"


@pytest.mark.parametrize("op", SOME)
def test_no_kernel_became_slower(op: str, written: dict[str, Any]) -> None:
    """By its machine code as it is now, with the counts that are kept."""
    from csae.bench.data import SHAPES
    from csae.bench.predict import launches, model
    from csae.bench.predict.written import counted, outdated

    if f"triton {triton.__version__}," not in written["source"]:
        pytest.skip(f"predictions.json was not made with triton {triton.__version__}")
    found = launches.of_op(op, SHAPES["A"])
    assert not outdated([found], counted("A")), (
        "a kernel's source was changed: run `python -m csae.bench.predict --write`"
    )
    rows = model.times(found, counted("A"))
    assert sum(time.ms for _, _, time in rows) <= SLOWER * written["ms"][op]["A"], "if that is meant: predict --write"


def test_no_step_launches_more(written: dict[str, Any]) -> None:
    from csae.bench.data import SHAPES
    from csae.bench.predict import launches
    from csae.bench.predict.written import STEPS

    for step in STEPS:
        for shape, number in written["launches"][step].items():
            found = launches.kernels(launches.of_case(step, SHAPES[shape]))
            assert found <= SLOWER * number, "if that is meant: run `python -m csae.bench.predict --write`"


@pytest.mark.parametrize("shape", ["A", "B", "C"])
@pytest.mark.parametrize(("step", "most"), [("TopK training step", 60), ("contextual training step, one sweep", 145)])
def test_a_step_launches_few_kernels(step: str, most: int, shape: str) -> None:
    """At 6 us each, the host would otherwise be slower than the device at A."""
    from csae.bench.data import SHAPES
    from csae.bench.predict import launches

    assert launches.kernels(launches.of_case(step, SHAPES[shape])) <= most


@pytest.mark.parametrize("shape", ["A", "B", "C"])
def test_the_counts_are_of_the_kernels_as_they_are(shape: str) -> None:
    from csae.bench.predict.written import counted, outdated, recorded

    assert not outdated(list(recorded(shape).values()), counted(shape)), "run `python -m csae.bench.predict --write`"


@pytest.mark.slow
@pytest.mark.parametrize("op", ["topk_encode", "gather_sum"])
def test_counted_again_it_is_what_is_kept(op: str) -> None:
    from csae.bench.data import SHAPES
    from csae.bench.predict import launches, trips
    from csae.bench.predict.written import counted, outdated

    calls = outdated([launches.of_op(op, SHAPES["A"])], {})
    for key, again in zip(calls, trips.count(list(calls.values())), strict=True):
        assert again == counted("A")[key], "run `python -m csae.bench.predict --write --all`"


@pytest.mark.slow
def test_all_of_a_shape_predicted_again(written: dict[str, Any]) -> None:
    """By the machine code of all kernels as they are now."""
    from csae.bench.predict.written import predict

    new = predict("A")
    assert new["ms"].keys() == {name for name, of in written["ms"].items() if "A" in of}
    slower = {name: ms for name, ms in new["ms"].items() if ms > SLOWER * written["ms"][name]["A"]}
    assert not slower, "if that is meant: python -m csae.bench.predict --write"


CODE = """
_kernel:
	//## File "/a/kernels/file.py", line 10
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
	//## File "/a/kernels/file.py", line 12
        /*0020*/                   LDG.E R4, desc[UR8][R2.64] ;
        /*0030*/                   IMAD.WIDE R6, R4, 0x4, R8 ;
        /*0040*/                   LDG.E.128 R12, desc[UR8][R6.64] ;
        /*0050*/                   LDG.E R5, desc[UR8][R2.64+0x10] ;
        /*0060*/                   FADD R12, R12, R13 ;
        /*0070*/                   SHFL.BFLY PT, R9, R12, 0x10, 0x1f ;
        /*0080*/                   MUFU.EX2 R9, R9 ;
        /*0090*/              @P1 BRA `(.L_x_1) ;
.L_x_2:
	//## File "/a/kernels/file.py", line 14
        /*00a0*/                   STG.E desc[UR8][R2.64], R9 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3) ;
"""


def test_blocks_and_loops_of_machine_code() -> None:
    from csae.bench.predict import sass

    blocks = sass.blocks_of(CODE)
    assert [len(block.instructions) for block in blocks] == [2, 8, 2, 1]
    assert [block.next for block in blocks] == [[2, 1], [1, 2], [], [3]]
    assert sass.loops_of(blocks) == [(1, {1})]  # not the last one, which is never reached
    assert {(of.file, of.line) for of in blocks[1].instructions} == {("file.py", 12)}
    kinds = [of.kind for of in blocks[1].instructions]
    memory = "load/store"
    assert kinds == [memory, "multiply", memory, memory, "float", "shuffle", "special", "other"]


def test_what_a_program_costs() -> None:
    from csae.bench.predict import machine, sass

    code = sass.Code(sass.blocks_of(CODE), [], 32, 0)
    busy = sass.busy(code, 2, [1, 10, 1, 0], operations=0.0)
    assert busy.issue == (2 + 80 + 2) * 2 / machine.SCHEDULERS
    # Loads of 4, 16 and 4 bytes a thread, ten times, and one store.
    assert busy.units["load/store"] == 2 * (10 * (1 + 4 + 1) + 1)
    assert busy.units["special"] == 2 * 10 / 0.5
    # Two loads wait for one another, the third doesn't.
    assert busy.alone == 84 * machine.DEPENDENT + 10 * 2 * machine.LOAD
    assert sass.resident(code, 2) == 32
    assert sass.resident(code._replace(registers=255), 8) == 1
    assert sass.resident(code._replace(shared=100 * 1024), 1) == 2


PRODUCT = """
_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
.L_x_2:
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize("under_way", [1, 0])
def test_a_loop_s_turn_passes_while_its_product_is_made(under_way: int) -> None:
    """If a product is left under way; otherwise only the block that issues it."""
    from csae.bench.predict import machine, sass

    blocks = sass.blocks_of(PRODUCT.replace("0x1 ;", f"0x{under_way} ;"))
    code = sass.Code(blocks, sass.loops_of(blocks), 32, 0)
    assert [len(block.instructions) for block in blocks] == [1, 2, 1, 1, 1]
    operations = 1000 * machine.OPERATIONS / machine.MULTIPROCESSORS / machine.CLOCK
    busy = sass.busy(code, 1, [1, 10, 10, 10, 1], operations)
    others = 2 if under_way else 22  # of this many instructions
    assert busy.alone == pytest.approx(1000 + others * machine.DEPENDENT)


def test_how_many_bounds_in_float16_reach_the_least_of_k() -> None:
    from csae.bench.predict import strict

    few, many = strict.reached(768, 8192, 32), strict.reached(8192, 8192, 32)
    assert 32 <= few < 36 < many < 128


@pytest.mark.parametrize("op", ["topk_encode, float32", "threshold_encode"])
def test_a_fallback_that_no_row_needs_takes_its_launches(op: str) -> None:
    from csae.bench.data import SHAPES
    from csae.bench.predict import launches, model, strict

    launched = [of for _, of in launches.of_op(op, SHAPES["A"]).launches if isinstance(of, launches.Triton)]
    gated = [of for of in launched if "only_ptr" in of.sizes and of.variant.constants.get("GATED", True)]
    assert len(gated) == 5  # a product and what it leaves to keep, in two ranges, and the choice
    times = [model.of_triton(of, strict._nothing_wanted(of)) for of in gated]
    assert all(of.ms <= 1.2 * of.parts["launch"] for of in times), times


def test_loops_of_code_are_those_of_the_source() -> None:
    """The sum is called from two places, first outside of the loop over sums and then inside of it."""
    from loops_kernel import VARIANT, halved

    from csae.bench.predict import sass, source

    ways = source.calls(halved, VARIANT.constants)
    assert [len(way) for way in ways["_total"]] == [1, 1]
    code = sass.compiled(VARIANT)
    trips = {"halved:1": [3.0], "halved:2": [30.0], "_total:1": [10.0, 31.0]}
    places = sass.placed(code, halved, VARIANT.constants, trips)
    loops = sass.by_loop(code, places)
    assert {name: number for name, (number, _) in loops.items() if "unrolled" not in name} == {
        "": 1.0, "halved:1": 3.0, "halved:2": 30.0, "_total:1, 1": 10.0, "_total:1, 2": 31.0,
    }  # fmt: skip
    for name in ("_total:1, 1", "_total:1, 2"):  # an addition for each load
        assert loops[name][1]["load/store"] == loops[name][1]["float"] > 0
    assert loops["halved:2"][1]["load/store"] == 2 * loops["halved:2"][1]["float"]
    with pytest.raises(ValueError, match="2 loops in the code, 3 in the run"):
        sass.placed(code, halved, VARIANT.constants, trips | {"_total:1": [1.0, 2.0, 3.0]})


def test_counts_in_the_interpreter_are_those_of_the_kernel() -> None:
    """A gather of 20 rows a token; a product of 32 by 16 tiles, four blocks deep."""
    from csae.bench.predict import trips

    n, k, d, d_sae = 4096, 20, 64, 512
    tables = {"W_dec": {"shape": [d_sae, d], "dtype": "bfloat16"}}
    code = {"values": {"shape": [n, k], "dtype": "bfloat16"}, "indices": {"shape": [n, k], "dtype": "int64"}}
    wide = {"x": {"shape": [n, 256], "dtype": "bfloat16"}, "W_enc": {"shape": [4096, 256], "dtype": "bfloat16"}}
    wide["b_enc"] = {"shape": [4096], "dtype": "bfloat16"}
    ((decode,), encode) = trips.count(
        [
            {"operator": "sparse_decode", "given": code | tables},
            {"operator": "topk_encode", "given": wide | {"k": 8}},
        ]
    )
    assert decode.loaded["table_ptr"] == pytest.approx(n * k * d * 2)
    assert decode.stored == {"out_ptr": n * d * 2}
    product = encode[0]
    tiles = (n // 128) * (4096 // 256)
    assert product.trips["_pre_acts_tma:1"] == [pytest.approx(256 // 64 * tiles / min(tiles, 132), abs=0.01)]
    for branch in ("_pre_acts_tma:2", "_pre_acts_tma:4"):  # at a tile's begin and at its end
        assert product.trips[branch] == [pytest.approx(tiles / min(tiles, 132), abs=0.01)]
    # Each tile reads its rows of x, and its columns of W_enc, whole.
    assert product.loaded["x_desc"] == pytest.approx(n * 256 * 2 * (4096 // 256))
    assert product.loaded["W_desc"] == pytest.approx(4096 * 256 * 2 * (n // 128))
    assert all(number >= 0 for of in encode for numbers in of.trips.values() for number in numbers)


def test_launches_are_those_of_a_real_step() -> None:
    from csae.bench.data import Shape
    from csae.bench.predict import launches
    from csae.bench.predict.launches import Torch, Triton

    shape = Shape("few", 256, 64, 1024, 8, T=64, heads=2, d_head=16, d_value=16)
    found = launches.of_case("TopK training step", shape)
    names = [of.variant.kernel.fn.__name__ for _, of in found.launches if isinstance(of, Triton)]
    assert names.count("_gather_sum") == names.count("_gather_dot") == 1
    assert names.count("_adam_rows") == 3
    operators = [call["operator"] for call in found.calls]
    assert operators[:5] == ["over_scale", "topk_encode", "active_features", "sparse_decode", "fvu"]
    by_name = [of for _, of in found.launches if isinstance(of, Torch)]
    (sort,) = [of for of in by_name if of.name == "sort"]
    assert sort.kernels > 1
    assert not {of.name for of in by_name} & {"view", "detach", "expand", "empty", "new_empty", "slice"}
    assert json.dumps(found.calls)  # as trips takes them
