"""A GPU that isn't there, for the tests of what triton compiles and finds in its cache: launches do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from csae.kernels.triton.variant import Variant

_NUMBERS = {"i32": 1, "i64": 1, "fp32": 0.5}


@contextmanager
def fake_gpu(capability: int = 90) -> Iterator[None]:
    """Within it triton takes the current device for one of this compute capability."""
    utils = SimpleNamespace(
        load_binary=lambda *_: (0, 0, 32, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 227 * 1024, "warpSize": 32},
    )
    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        launcher_cls=lambda *_: lambda *_: None,
        utils=utils,
    )
    before = driver._active
    kernels = {variant.kernel for variant in _all()}
    driver.set_active(fake)
    try:
        for kernel in kernels:
            kernel.device_caches.clear()
        yield
    finally:
        driver._active = before
        for kernel in kernels:
            kernel.device_caches.clear()


@contextmanager
def recorded() -> Iterator[list[tuple[ASTSource, dict[str, Any]]]]:
    """Within it nothing is compiled: the sources that would be, with their options, are listed."""
    found: list[tuple[ASTSource, dict[str, Any]]] = []
    kernel = SimpleNamespace(launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None)

    def compile_(source: ASTSource, target: object, options: dict[str, Any]) -> SimpleNamespace:
        found.append((source, options))
        return kernel

    real = triton.compiler.compile
    triton.compiler.compile = compile_
    try:
        yield found
    finally:
        triton.compiler.compile = real


def launch(variant: Variant) -> None:
    """Launch a variant as its launcher does, with tensors of a few elements."""
    arguments: list[Any] = []
    for name, type_ in variant.signature().items():
        if name in variant.descriptors:
            block = variant.block(name)
            base = torch.empty(block, dtype=variant.tensors[name])
            arguments.append(TensorDescriptor(base, list(base.shape), list(base.stride()), block))
        elif name in variant.tensors:
            arguments.append(torch.empty(16, dtype=variant.tensors[name]))
        elif type_ != "constexpr":
            arguments.append(_NUMBERS[type_])
    variant.launch((1,), *arguments)


def _all() -> list[Variant]:
    from csae.kernels.triton import offline

    return offline.variants()
