"""Where the tests of the Triton kernels run: on a CUDA device, or in Triton's interpreter on the CPU.

Triton decides at its first import whether it interprets, so without a GPU these tests run in a process of their own,
started by test_triton_interpreter.py with TRITON_INTERPRET=1; elsewhere they skip.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# The interpreter takes the bits of a bfloat16 for an integer: bfloat16 is for a GPU only.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]

needs_triton = [] if INTERPRETED else [pytest.mark.gpu]
if not INTERPRETED and DEVICE == "cpu":
    pytest.skip("no CUDA device: test_triton_interpreter.py runs these", allow_module_level=True)

if INTERPRETED:
    # At every call of a jit function the interpreter looks through triton.language for what it replaces.
    from triton.runtime import interpreter

    _replace, _first = interpreter._patch_builtin, {}

    def _replace_once(package: Any, builder: Any, scope: Any) -> None:
        is_builtin = interpreter.tl.core.is_builtin
        if package not in _first:
            _first[package] = [name for name, of in inspect.getmembers(package) if is_builtin(of)][:1]
        if any(is_builtin(getattr(package, name)) for name in _first[package]):
            _replace(package, builder, scope)

    interpreter._patch_builtin = _replace_once

    # Whether integers overflow it computes anew for each of their sums, and tells only where it debugs.
    _builder = interpreter.interpreter_builder
    _builder.options = replace(_builder.options, sanitize_overflow=_builder.options.debug)

    # At every load and cast it makes a table of dtypes.
    _find_dtype, _dtypes = interpreter._get_np_dtype, {}

    def _find_dtype_once(of: Any) -> Any:
        if of.scalar.is_ptr():
            return _find_dtype(of)
        if of.scalar.name not in _dtypes:
            _dtypes[of.scalar.name] = _find_dtype(of)
        return _dtypes[of.scalar.name]

    interpreter._get_np_dtype = _find_dtype_once


def random_normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def only_listed_variants(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a launch of a variant that `module.variants()`, which is checked offline, doesn't list."""
    from csae.kernels.triton.variant import Variant

    launch: Callable[..., None] = Variant.launch

    def checked(self: Any, *arguments: Any) -> None:
        launch(self, *arguments)
        assert self in module.variants()

    monkeypatch.setattr(Variant, "launch", checked)
