"""The table of the fastest tiles, and how launchers read it."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

CPU = torch.device("cpu")


def test_best_is_the_default_unless_the_table_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import sparse_decode, tuning

    default = sparse_decode.variants()[0]
    other = default._replace(num_warps=default.num_warps * 2, constants={**default.constants, "COLUMNS": 64})
    changes = tuning.changes(default, other)
    assert changes == {"COLUMNS": 64, "num_warps": default.num_warps * 2}
    assert tuning.best(default, CPU) is default
    monkeypatch.setitem(tuning.table(), "cpu", {str(default): changes})
    assert tuning.best(default, CPU) == other
    assert tuning.best(other, CPU) == other
    assert tuning.changes(default, default) == {}


def test_what_is_tuned_for_a_device_is_checked_for_its_architecture_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from csae.kernels.triton import offline, sparse_decode, tuning

    default = sparse_decode.variants()[0]
    monkeypatch.setitem(tuning.table(), "Some GPU sm_90", {str(default): {"num_warps": 4 * default.num_warps}})
    offline._only_on.cache_clear()
    try:
        ((tuned, target),) = tuning.tuned_variants([default])
        assert target == "sm_90"
        assert str(tuned) in [str(variant) for variant in offline.modules()["sparse_decode"]]
        assert offline.compile_for(tuned, "sm_80") is None
        if os.environ.get("TRITON_INTERPRET") != "1":
            assert offline.compile_for(tuned, "sm_90") is not None
            assert offline.compile_for(default, "sm_80") is not None
    finally:
        offline._only_on.cache_clear()


def test_the_committed_table_names_what_there_is() -> None:
    from importlib import import_module

    from csae.kernels.triton import offline, tuning

    for device, entries in tuning.table().items():
        assert device.rpartition(" ")[2] in offline.TARGETS
        of_name = {str(variant): variant for variant in offline.variants()}
        for name, changes in entries.items():
            offered = import_module(of_name[name].kernel.fn.__module__).candidates(of_name[name])
            assert str(tuning.changed(of_name[name], changes)) in [str(other) for other in offered]
