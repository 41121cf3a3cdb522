"""What was compiled without a GPU is what a launch finds in triton's cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

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
    monkeypatch.setattr(topk_product, "_is_hopper", lambda device: True)
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
        if name == "_keep_groups":
            starts.append(named["offset"])
        real(self, grid, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Variant, "launch", launch)
    with recorded(), fake_gpu():
        for _, run in sanitize.cases(torch.device("cpu"), (torch.float32, torch.bfloat16)):
            run()
    kernels = {variant.kernel.__name__ for variant in offline.variants()}
    assert kernels <= reached
    assert {
        "_pre_acts gated",
        "_keep_groups gated",
        "_select gated",
        "_pre_acts in units of 8",
        "_append in units of 4",
    } <= reached
    assert max(tiles_of_a_program) > 10
    assert max(starts) > 0


@pytest.mark.parametrize("libtriton", ["the same", "of another Python"])
def test_kernels_that_are_carried_are_found(libtriton: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled into a folder, moved to another machine, and launched there: nothing is compiled."""
    import triton
    from fake_driver import fake_gpu, launch
    from triton.runtime.cache import triton_key

    from csae.bench import compiled

    forms = [variant for variant in compiled.forms("sm_90") if "_pre_acts[bfloat16" in str(variant)][:1]
    assert {type(form.constants["PRECISION"]) for form in forms} == {str}
    monkeypatch.setattr(compiled, "forms", lambda target: forms)
    for name in ("TRITON_CACHE_DIR", "TRITON_STORE_BINARY_ONLY"):  # `make` sets them
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    carried = tmp_path / "carried"
    said = compiled.make(carried, "sm_90", [], 1)
    assert said.startswith("1 kernels for sm_90")
    if libtriton != "the same":  # as a wheel for another Python has it: another key, and folders of other names
        file = carried / compiled.MADE_WITH
        made_with = json.loads(file.read_text())
        library = next((Path(triton.__path__[0]) / "_C").glob("libtriton.*"))
        other = made_with["key"].replace(hashlib.sha256(library.read_bytes()).hexdigest(), "0" * 64)
        assert other != made_with["key"]
        for _, rest in compiled._keys("sm_90"):
            (carried / compiled._name(triton_key() + rest)).rename(carried / compiled._name(other + rest))
        file.write_text(json.dumps(made_with | {"key": other}))
    moved = tmp_path / "moved"
    carried.rename(moved)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    monkeypatch.delenv("TRITON_STORE_BINARY_ONLY")
    assert compiled.install(moved) == "1 compiled kernels carried along"
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **given: hits.append(given["cache_hit"]))
    with fake_gpu():
        for form in forms:
            launch(form)
    assert hits == [True]


def test_kernels_of_another_triton_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.cache import triton_key

    from csae.bench import compiled
    from csae.errors import UserError

    with pytest.raises(UserError, match="holds no kernels"):
        compiled.install(tmp_path)
    other = {"triton": "3.7.0", "key": triton_key().replace("3.", "4.", 1), "target": "sm_90"}
    (tmp_path / compiled.MADE_WITH).write_text(json.dumps(other))
    assert compiled.install(tmp_path) == "compiled kernels left out: made with triton 3.7.0, not with the one here"
    (tmp_path / compiled.MADE_WITH).write_text(json.dumps({"triton": "", "key": triton_key(), "target": "sm_90"}))
    monkeypatch.setattr(compiled, "forms", lambda target: [])
    assert compiled.install(tmp_path).startswith("compiled kernels left out: none in ")
