"""Which kernels an op runs on: Triton for CUDA tensors, else the portable ones (native inside, on a CPU)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from csae import versions
from csae.kernels import cpu, triton


def kernels(op: str, device: torch.device) -> ModuleType:
    """The module that implements `op` on `device`."""
    if device.type == "cuda" and triton.available():
        versions.check("triton")
        return import_module(f"csae.kernels.triton.{op}")
    if device.type == "cpu" and not cpu.available():
        cpu.warn_once()
    return import_module(f"csae.kernels.portable.{op}")


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op`: what a tracer sees of a native or a Triton call.

    Kernels take pointers, so nothing but the function of an operator may call them: there tensors are real, whoever
    traces, transforms or compiles. Dtypes are settled before, so that it runs without autocast.
    """
    return lambda function: torch.library.custom_op(f"csae::{name}", _precisely(function), mutates_args=mutates_args)


def operator_without_gradient(name: str, mutates_args: tuple[str, ...], fake: Callable[..., Any]) -> Any:
    """The same, of less overhead for many arguments that are written to (0.1 ms for twenty): no gradient is recorded,
    and what is written is not counted as a version of its tensor."""

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, _precisely(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"csae::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.csae, name).default

    return register


LIBRARY = torch.library.Library("csae", "FRAGMENT")


def _precisely(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*given: Any) -> Any:
        kind = next(tensor.device.type for tensor in given if isinstance(tensor, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*given)
        with torch.autocast(kind, enabled=False):
            return function(*given)

    return run


def refuse_second_derivative(backward: Any) -> None:
    """Make an operator that is the backward pass of another say that it has none itself."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{backward._qualname}: trying to differentiate twice; needed a first derivative only")

    backward.register_autograd(refuse)
